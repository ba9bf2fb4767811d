"""What the pipeline writes and the trainer reads: run file, documents, tokens, tables, errors.

May import: none of the other packages, and no torch.
Lost without it: the contract between pipeline and trainer.
"""

from typing import TYPE_CHECKING

from xkd_schemas.lazy_names import lazy_names

if TYPE_CHECKING:
    from xkd_schemas.cache.rows import open_cache
    from xkd_schemas.config import RunConfig
    from xkd_schemas.errors import XkdError
else:
    __getattr__ = lazy_names(
        __name__,
        {
            "RunConfig": "xkd_schemas.config:RunConfig",
            "XkdError": "xkd_schemas.errors:XkdError",
            "open_cache": "xkd_schemas.cache.rows:open_cache",
        },
    )

__all__ = ["RunConfig", "XkdError", "open_cache"]

"""What the pipeline writes and the trainer reads: run file, documents, tokens, tables, errors.

May import: none of the other packages, and no torch.
Lost without it: the contract between pipeline and trainer.
"""

import pkgutil
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any


def lazy_names(package: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """A `__getattr__` for a package: each name and the `module:attribute` that is imported when it is first used.

    >>> lazy_names("math2", {"root": "math:sqrt"})("root")(9.0)
    3.0
    """

    def find(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return pkgutil.resolve_name(homes[name])

    return find


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

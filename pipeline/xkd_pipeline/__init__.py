"""A corpus and a teacher become a cache.

May import: the trainer's models and losses, and schemas.
Lost without it: making caches; those that are there still train students.
"""

from typing import TYPE_CHECKING

from xkd_schemas import lazy_names

if TYPE_CHECKING:
    from xkd_pipeline.public import align, documents, plan, preprocess, teacher, verify

__all__ = ["align", "documents", "plan", "preprocess", "teacher", "verify"]

if not TYPE_CHECKING:
    __getattr__ = lazy_names(__name__, {name: f"xkd_pipeline.public:{name}" for name in __all__})

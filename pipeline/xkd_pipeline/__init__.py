"""A corpus and a teacher become a cache.

May import: the trainer's models and losses, and schemas.
Lost without it: making caches; those that are there still train students.
"""

from typing import TYPE_CHECKING

from xkd_schemas import lazy_names

if TYPE_CHECKING:
    from xkd_pipeline.maintain.verify import verify_run as verify
    from xkd_pipeline.reports.plan import make_plan as plan
    from xkd_pipeline.stages import align_stage as align
    from xkd_pipeline.stages import documents_stage as documents
    from xkd_pipeline.stages import preprocess
    from xkd_pipeline.stages import teacher_stage as teacher
else:
    __getattr__ = lazy_names(
        __name__,
        {
            "align": "xkd_pipeline.stages:align_stage",
            "documents": "xkd_pipeline.stages:documents_stage",
            "plan": "xkd_pipeline.reports.plan:make_plan",
            "preprocess": "xkd_pipeline.stages:preprocess",
            "teacher": "xkd_pipeline.stages:teacher_stage",
            "verify": "xkd_pipeline.maintain.verify:verify_run",
        },
    )

__all__ = ["align", "documents", "plan", "preprocess", "teacher", "verify"]

"""The stages, the plan and the check of a cache as functions of a run file, for notebooks and scripts."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from xkd_pipeline import stages
from xkd_pipeline.maintain.verify_rows import Finding
from xkd_pipeline.tables.build import Outcome
from xkd_pipeline.workers.contract import Workers
from xkd_schemas.config import RunConfig


def documents(run: RunConfig) -> Outcome:
    """Read and parse the corpus, as `xkd-cache documents`."""
    return stages.documents_stage(run, replace(Workers.of(run), gpus=0.0))


def teacher(run: RunConfig) -> Outcome:
    """Run the teacher over the documents and keep its signals, as `xkd-cache teacher`."""
    return stages.teacher_stage(run, Workers.of(run))


def align(run: RunConfig) -> Outcome:
    """Tokenize and align for the student, as `xkd-cache align`."""
    return stages.align_stage(run, replace(Workers.of(run), gpus=0.0))


def preprocess(run: RunConfig) -> list[Outcome]:
    """All three stages, as `xkd-cache preprocess`; what is there is reused."""
    return stages.preprocess(run, Workers.of(run))


def plan(run: RunConfig, *, sample: int = 256, budget: int | None = None) -> dict[str, Any]:
    """What the cache will need, as `xkd-cache plan --json`; reads `sample` rows, loads no weights.

    Args:
        run: Corpus, teacher, losses, and a student if its table is to be counted.
        sample: Rows to read at most.
        budget: Bytes that the whole cache may take.
    """
    from xkd_pipeline.reports.plan import make_plan

    return make_plan(run, sample=sample, budget=budget, rate=None)


def verify(run: RunConfig, *, level: str = "full") -> list[Finding]:
    """Everything that is wrong with the cache, as `xkd-cache verify`; an empty list if it is whole.

    Args:
        run: Names the cache.
        level: quick, full or deep.
    """
    from xkd_pipeline.maintain.verify import verify as check

    return check(Path(run.cache), level)

"""Where shards are made: in this process, or by worker processes on Ray.

A stage is a picklable bag of settings; `load()` gives a function from a job to a commit record.
The same function runs either way, so the bytes are the same.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from xkd_pipeline.workers.contract import (
    AS_PLANNED,
    KEPT,
    Make,
    Stage,
    Workers,
    first_line,
    halve_batch,
    out_of_memory,
    shard_of,
    with_care,
)
from xkd_schemas.cache.manifest import Commit, MadeDifferently
from xkd_schemas.errors import OutOfMemory


def make_shards(
    stage: Stage,
    jobs: Iterable[Any],
    workers: Workers,
    done: Callable[[Commit], None],
    cares: Mapping[int, MadeDifferently] | None = None,
) -> None:
    """Make every job and hand each record to `done` as soon as it is there, in any order.

    `cares` are shards that are known to need care: they are made so from the start.

    Raises:
        WorkersGone: Workers died or hung more often than they are restarted; what was handed over stays.
        OutOfMemory: Not even one document of a shard fits.
        XkdError: What a stage raised, as it raised it.
    """
    known = cares or {}
    if workers.count == 0:
        make = _load(stage)
        for job in jobs:
            done(_make(make, stage, job, known.get(shard_of(job), AS_PLANNED)))
        return
    from xkd_pipeline.workers.ray_pool import RayPool
    from xkd_pipeline.workers.scheduler import Schedule

    with RayPool(stage, workers) as pool:
        Schedule(pool, stage, jobs, workers, known).run(done)


def _load(stage: Stage) -> Make:
    try:
        return stage.load()
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        reason = first_line(error)
    raise OutOfMemory(
        f"out of memory while loading: {reason}", kept=KEPT, fix="use a halve_batch model, or a machine with more"
    )


def _make(make: Make, stage: Stage, job: Any, care: MadeDifferently) -> Commit:
    while True:
        try:
            return with_care(make(job, care), care)
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            reason = first_line(error)
        care = halve_batch(stage, job, care, reason)  # out of the handler, whose traceback holds on to the memory

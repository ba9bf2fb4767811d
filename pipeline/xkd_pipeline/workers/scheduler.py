"""How shards are made, in this process or on workers: what is tried again, how, and when it is given up.

A stage is a picklable bag of settings; `load()` gives a function from a job to a commit record. The same function runs
either way, so the bytes are the same. The scheduler knows no Ray: a pool starts and kills workers, and reports.

A shard whose worker dies is given to a fresh one, three times in all. Then its rows are tried apart by halves,
and those that kill every worker alone are left out. Rows that only kill together, and shards that run out of memory,
go on in batches half as large. A worker that is silent for too long is killed; its shard is tried three times.
"""

import statistics
import time
from collections import deque
from collections.abc import Callable, Generator, Hashable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from xkd_pipeline.workers.contract import (
    AGAIN,
    AS_PLANNED,
    KEPT,
    Failed,
    Make,
    Report,
    Stage,
    Workers,
    first_line,
    halve_batch,
    out_of_memory,
    shard_of,
)  # fmt: skip
from xkd_schemas.cache.manifest import Commit, MadeDifferently
from xkd_schemas.console import warn
from xkd_schemas.errors import OutOfMemory, WorkersGone, XkdError
from xkd_schemas.progress import remark

TRIES: Final = 3  # workers that a shard, or a row, may kill or hang; starts of a worker that may fail in a row
MOST_LOST: Final = 16
"""Rows of one shard that may be left out at once; if more kill their worker, something else is wrong."""
FIRST_SECONDS: Final = 1800.0  # how long a worker may load at least, and a shard take while none has finished
SHORTEST_SECONDS: Final = 300.0
MEDIANS: Final = 5


class Pool(Protocol):
    """Worker processes. Both `give` and `reports` raise what a stage raised, and WorkersGone when all is lost."""

    def start(self) -> Hashable:
        """Start a worker; it reports None or Failed."""

    def give(self, worker: Hashable, job: Any, care: MadeDifferently) -> None:
        """Let a worker make a shard; it reports a Commit or Failed."""

    def reports(self, seconds: float) -> list[Report]:
        """What there is to report; waits for the first so long, then returns none."""

    def kill(self, worker: Hashable) -> None:
        """End a worker, which reports no more."""


@dataclass(kw_only=True, slots=True)
class _Task:
    job: Any
    shard: int
    care: MadeDifferently
    deaths: int = 0
    hangs: int = 0
    search: Generator[tuple[int, ...], bool, None] | None = None
    rows: tuple[int, ...] = ()  # what the search wants tried alone
    culprits: list[int] = field(default_factory=list)


class Schedule:
    """One run over some jobs. `clock` is monotonic seconds."""

    def __init__(
        self,
        pool: Pool,
        stage: Stage,
        jobs: Iterable[Any],
        workers: Workers,
        cares: Mapping[int, MadeDifferently],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._pool, self._stage, self._jobs, self._clock = pool, stage, iter(jobs), clock
        self._cares, self._count, self._stall = cares, workers.count, workers.stall_seconds
        self._queue: deque[_Task] = deque()
        self._loading: dict[Hashable, float] = {}
        self._idle: list[Hashable] = []
        self._busy: dict[Hashable, tuple[_Task, float]] = {}
        self._seconds: list[float] = []
        self._bad_starts = 0

    def run(self, done: Callable[[Commit], None]) -> None:
        """Until every job is made and handed to `done`; raises as `make_shards`."""
        while True:
            self._hand_out()
            if not self._busy and not self._queue:
                return
            remark(self._at_work())
            for worker, what in self._pool.reports(1.0):
                if worker in self._loading:
                    self._note_start(worker, what)
                elif worker in self._busy:
                    self._note_report(worker, what, done)
            self._end_the_silent()

    def _at_work(self) -> str:
        shards = sorted(task.shard for task, _ in self._busy.values())
        loading = f", {len(self._loading)} workers loading" if self._loading else ""
        return f"at work: shard {', '.join(map(str, shards[:8])) or 'none'}{', ...' * (len(shards) > 8)}{loading}"

    def _hand_out(self) -> None:
        """Start as many workers as there is work for, and give the idle ones a task each."""
        room = self._count - len(self._busy)
        while len(self._queue) < room and (job := next(self._jobs, None)) is not None:
            shard = shard_of(job)
            self._queue.append(_Task(job=job, shard=shard, care=self._cares.get(shard, AS_PLANNED)))
        for _ in range(min(room, len(self._queue)) - len(self._idle) - len(self._loading)):
            self._loading[self._pool.start()] = self._clock()
        while self._idle and self._queue:
            worker, task = self._idle.pop(), self._queue.popleft()
            self._busy[worker] = task, self._clock()
            care = task.care
            if task.search is not None:  # without the rows that are not tried now
                others = set(range(self._stage.rows(task.job))) - set(task.rows)
                care = care.model_copy(update={"lost": tuple(sorted(others))})
            self._pool.give(worker, task.job, care)

    def _note_start(self, worker: Hashable, what: Commit | Failed | None) -> None:
        del self._loading[worker]
        if isinstance(what, Failed):
            self._note_bad_start(what.reason, OutOfMemory if what.memory else WorkersGone)
        else:
            self._idle.append(worker)
            self._bad_starts = 0

    def _note_bad_start(self, reason: str, kind: type[XkdError] = WorkersGone) -> None:
        self._bad_starts += 1
        if self._bad_starts < TRIES:
            return
        self._count, self._bad_starts = self._count - 1, 0
        if self._count == 0 or not (self._busy or self._idle):
            raise kind(f"no worker starts, {TRIES} in a row ended in loading: {reason}", kept=KEPT, fix=AGAIN)
        warn(f"{TRIES} workers in a row did not start: {reason}; continuing with {self._count}")

    def _note_report(self, worker: Hashable, what: Commit | Failed | None, done: Callable[[Commit], None]) -> None:
        task, since = self._busy.pop(worker)
        if not isinstance(what, Failed) or what.alive:
            self._idle.append(worker)
        if isinstance(what, Failed) and what.alive:
            self._try_smaller(task, what.reason)
        elif task.search is not None:
            self._search_on(task, killed=isinstance(what, Failed))
        elif isinstance(what, Failed):
            self._note_death(task, what)
        elif what is not None:
            self._seconds.append(self._clock() - since)
            done(what.model_copy(update={"care": task.care or None}))

    def _try_smaller(self, task: _Task, reason: str, kind: type[XkdError] = OutOfMemory) -> None:
        task.care, task.deaths = halve_batch(self._stage, task.job, task.care, reason, kind), 0
        self._queue.appendleft(task)

    def _note_death(self, task: _Task, death: Failed) -> None:
        task.deaths += 1
        if task.deaths < TRIES:
            warn(f"shard {task.shard}: its worker died ({death.reason}); try {task.deaths + 1} of {TRIES}")
            self._queue.appendleft(task)
        elif death.memory:
            self._try_smaller(task, death.reason)
        else:
            rows = tuple(row for row in range(self._stage.rows(task.job)) if row not in task.care.lost)
            if not rows:
                raise WorkersGone(f"shard {task.shard} kills its worker even without its rows", kept=KEPT, fix=AGAIN)
            warn(f"shard {task.shard}: {TRIES} workers died ({death.reason}); trying its rows separately")
            task.culprits = []
            task.search = find_culprits(rows, task.culprits)
            self._search_on(task, killed=None)

    def _search_on(self, task: _Task, *, killed: bool | None) -> None:
        """Take the search one step on; at its end the shard is made without what it found."""
        assert task.search is not None
        found = task.culprits
        with suppress(StopIteration):
            task.rows = task.search.send(killed)  # type: ignore[arg-type]  # None starts it
            if len(found) <= MOST_LOST:
                self._queue.appendleft(task)
                return
        task.search, task.deaths = None, 0
        if len(found) > MOST_LOST:
            raise WorkersGone(
                f"shard {task.shard}: more than {MOST_LOST} rows kill their worker, so the rows are not the cause",
                kept=KEPT,
                fix=f"run with --workers 0 to see what happens in this process; {AGAIN}",
            )
        if found:
            warn(f"shard {task.shard}: left out, as they kill their worker: row {', '.join(map(str, found))}")
            task.care = task.care.model_copy(update={"lost": tuple(sorted({*task.care.lost, *found}))})
            self._queue.appendleft(task)
        else:
            self._try_smaller(task, "its rows kill their worker together and not alone", WorkersGone)

    def _end_the_silent(self) -> None:
        now = self._clock()
        for worker, (task, since) in list(self._busy.items()):
            if now - since <= (limit := self._limit()):
                continue
            del self._busy[worker]
            self._pool.kill(worker)
            task.hangs += 1
            if task.hangs >= TRIES:
                raise WorkersGone(
                    f"shard {task.shard} was not finished within {limit:g} s, {TRIES} times",
                    kept=KEPT,
                    fix="allow it more with --stall-timeout SECONDS, or look at its documents",
                )
            warn(f"shard {task.shard}: no answer for {limit:g} s, worker killed; try {task.hangs + 1} of {TRIES}")
            self._queue.appendleft(task)
        for worker, since in list(self._loading.items()):
            if now - since > max(FIRST_SECONDS, self._stall or 0.0):
                del self._loading[worker]
                self._pool.kill(worker)
                self._note_bad_start("it does not answer")

    def _limit(self) -> float:
        if self._stall is not None:
            return self._stall
        if not self._seconds:
            return FIRST_SECONDS
        return max(SHORTEST_SECONDS, MEDIANS * statistics.median(self._seconds))


def find_culprits(rows: tuple[int, ...], found: list[int]) -> Generator[tuple[int, ...], bool, None]:
    """Yield some of `rows`, which have killed their process together, and be sent whether these kill it too.

    Rows that kill alone, TRIES times in a row, are added to `found`, in order. A group that kills once is searched
    further: a wrong suspicion costs time only. Where the first half is harmless the second is taken for guilty
    untried, so rows that kill only in company are no culprits.
    """
    if len(rows) == 1:
        for _ in range(TRIES):
            if not (yield rows):
                return
        found.append(rows[0])
        return
    first, second = rows[: len(rows) // 2], rows[len(rows) // 2 :]
    if (yield first):
        yield from find_culprits(first, found)
        if not (yield second):
            return
    yield from find_culprits(second, found)


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
        f"out of memory while loading: {reason}", kept=KEPT, fix="use a smaller model, or a machine with more"
    )


def _make(make: Make, stage: Stage, job: Any, care: MadeDifferently) -> Commit:
    while True:
        try:
            return make(job, care).model_copy(update={"care": care or None})
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            reason = first_line(error)
        care = halve_batch(stage, job, care, reason)  # out of the handler, whose traceback holds on to the memory

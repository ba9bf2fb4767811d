"""What is tried again, how often, and when it is given up; with a pool and a clock that are made up."""

from collections import deque
from collections.abc import Callable, Hashable
from contextlib import suppress
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xkd_pipeline.workers.contract import Failed, Report, Workers
from xkd_pipeline.workers.scheduler import FIRST_SECONDS, SHORTEST_SECONDS, Schedule, find_culprits
from xkd_schemas.cache.manifest import Commit, MadeDifferently
from xkd_schemas.errors import OutOfMemory, WorkersGone, XkdError

STAGE = SimpleNamespace(rows=lambda _job: 8, batch=lambda _job: 4)
NEVER = object()
"""What a worker reports that is not heard of again."""


def made(unit: int) -> Commit:
    return Commit(unit=unit, file=f"{unit}.arrow", rows=1, size=1, sha256="0", frame_xxh3="0", batches=())


class FakePool:
    """`fate(unit, care, tries so far)` says what becomes of a shard. A wait takes 60 s."""

    def __init__(
        self, fate: Callable[[int, MadeDifferently, int], object], starts: Callable[[int], object] | None = None
    ) -> None:
        self.fate, self.starts = fate, starts or (lambda _number: None)
        self.given: list[tuple[int, MadeDifferently]] = []
        self.killed: list[Hashable] = []
        self.started = 0
        self.now = 0.0
        self._reports: deque[Report] = deque()

    def start(self) -> Hashable:
        self.started += 1
        if (what := self.starts(self.started)) is not NEVER:
            self._reports.append((self.started, what))
        return self.started

    def give(self, worker: Hashable, job: int, care: MadeDifferently) -> None:
        tries = sum(unit == job for unit, _ in self.given)
        self.given.append((job, care))
        if (what := self.fate(job, care, tries)) is not NEVER:
            self._reports.append((worker, what))

    def reports(self, _seconds: float) -> list[Report]:
        if self._reports:
            return [self._reports.popleft()]
        self.now += 60.0
        return []

    def kill(self, worker: Hashable) -> None:
        self.killed.append(worker)


def ran(pool: FakePool, jobs: range, *, count: int = 2, stall: float | None = None, cares=None) -> list[Commit]:
    done: list[Commit] = []
    workers = Workers(count=count, stall_seconds=stall)
    Schedule(pool, STAGE, jobs, workers, cares or {}, clock=lambda: pool.now).run(done.append)
    return sorted(done, key=lambda commit: commit.unit)


def test_every_shard_is_made_once_and_no_more_workers_are_started_than_there_is_work() -> None:
    pool = FakePool(lambda unit, _care, _tries: made(unit))

    assert ran(pool, range(2), count=9) == [made(0), made(1)]
    assert (pool.started, len(pool.given)) == (2, 2)


def test_the_shards_at_work_are_said_while_they_are(monkeypatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("xkd_pipeline.workers.scheduler.remark", said.append)
    ran(FakePool(lambda unit, _care, _tries: made(unit)), range(3))

    assert said[0] == "at work: shard none, 2 workers loading"
    assert {"at work: shard 0", "at work: shard 2"} <= {line.partition(",")[0] for line in said}


def test_a_shard_whose_worker_dies_is_given_to_a_fresh_one() -> None:
    pool = FakePool(lambda unit, _care, tries: Failed("kill") if (unit, tries) in ((1, 0), (1, 1)) else made(unit))

    assert ran(pool, range(4)) == [made(unit) for unit in range(4)]
    assert pool.started == 4


def test_a_shard_that_needed_care_before_is_made_with_it_at_once() -> None:
    pool = FakePool(lambda unit, _care, _tries: made(unit))
    care = MadeDifferently(lost=(3,), batch=2)

    assert [commit.care for commit in ran(pool, range(2), cares={1: care})] == [None, care]
    assert (1, care) in pool.given


def test_rows_that_kill_together_are_made_in_smaller_batches() -> None:
    def fate(unit: int, care: MadeDifferently, _tries: int) -> object:
        return Failed("killed") if len(care.lost) == 0 and care.batch != 1 else made(unit)

    assert [commit.care for commit in ran(FakePool(fate), range(1))] == [MadeDifferently(batch=1)]


def test_a_shard_that_kills_in_any_size_is_named() -> None:
    with pytest.raises(WorkersGone, match=r"shard 0: even a batch of one document fails.*rows kill .* together"):
        ran(FakePool(lambda _unit, care, _tries: made(0) if care.lost else Failed("killed")), range(1))


def test_where_every_row_kills_the_rows_are_not_to_blame(monkeypatch) -> None:
    monkeypatch.setattr("xkd_pipeline.workers.scheduler.MOST_LOST", 4)
    pool = FakePool(lambda unit, _care, _tries: Failed("kill") if unit == 0 else made(unit))
    with pytest.raises(WorkersGone, match="shard 0: more than 4 rows kill their worker"):
        ran(pool, range(2))
    assert len(pool.given) < 32  # it ends with the fifth row, and does not try all eight


@pytest.mark.parametrize("death", [Failed("no memory", memory=True, alive=True), Failed("low on memory", memory=True)])
def test_a_shard_out_of_memory_is_made_in_smaller_batches_and_the_record_says_so(death: Failed) -> None:
    pool = FakePool(lambda unit, care, _tries: death if unit == 0 and care.batch != 1 else made(unit))

    assert [commit.care for commit in ran(pool, range(2))] == [MadeDifferently(batch=1), None]
    assert (pool.started == 2) == death.alive  # a worker that lives on is given the next shard


def test_out_of_memory_with_one_document_ends_the_run() -> None:
    with pytest.raises(OutOfMemory, match="shard 0: even a batch of one document fails: no memory"):
        ran(FakePool(lambda _unit, _care, _tries: Failed("no memory", memory=True, alive=True)), range(1))


def test_a_shard_that_hangs_three_workers_is_named() -> None:
    pool = FakePool(lambda _unit, _care, _tries: NEVER)

    with pytest.raises(WorkersGone, match="shard 0 was not finished within 100 s, 3 times"):
        ran(pool, range(1), stall=100.0)
    assert (pool.started, len(pool.killed)) == (3, 3)


def test_how_long_a_shard_may_take_is_learnt_from_the_others() -> None:
    pool = FakePool(lambda unit, _care, tries: NEVER if (unit, tries) == (3, 0) else made(unit))
    ran(pool, range(4), count=1)
    assert SHORTEST_SECONDS < pool.now < 2 * SHORTEST_SECONDS

    first = FakePool(lambda unit, _care, tries: NEVER if tries == 0 else made(unit))
    ran(first, range(1), count=1)
    assert FIRST_SECONDS < first.now < FIRST_SECONDS + 120


@pytest.mark.parametrize(
    ("what", "kind"),
    [
        (Failed("no such library"), WorkersGone),
        (NEVER, WorkersGone),
        (Failed("low on memory", memory=True), OutOfMemory),
        (Failed("no memory for 9 GiB", memory=True, alive=True), OutOfMemory),
    ],
)
def test_workers_that_never_start_end_the_run_as_what_keeps_them(what: object, kind: type[XkdError]) -> None:
    pool = FakePool(lambda unit, _care, _tries: made(unit), starts=lambda _number: what)

    with pytest.raises(kind, match="no worker starts, 3 in a row ended in loading"):
        ran(pool, range(4), count=1)
    assert pool.started == 3


def test_a_worker_that_cannot_be_replaced_is_done_without() -> None:
    pool = FakePool(
        lambda unit, _care, tries: Failed("node lost") if (unit, tries) == (0, 0) else made(unit),
        starts=lambda number: None if number < 3 else Failed("no room"),
    )

    assert ran(pool, range(6)) == [made(unit) for unit in range(6)]
    assert pool.started <= 5


def test_a_shard_is_given_to_three_workers_and_then_the_rows_that_kill_are_left_out() -> None:
    pool = FakePool(lambda unit, care, _tries: made(unit) if {2, 5} <= set(care.lost) else Failed("exit 9"))

    assert [commit.care for commit in ran(pool, range(1), count=1)] == [MadeDifferently(lost=(2, 5))]
    assert [care.lost for _, care in pool.given[:4]] == [(), (), (), pool.given[3][1].lost]
    assert pool.given[3][1].lost != ()


def search(size: int, kills) -> tuple[set[int], int]:
    """What a search finds, and how many groups it had tried; `kills` says whether a group kills."""
    found: list[int] = []
    tries, count = find_culprits(tuple(range(size)), found), 0
    with suppress(StopIteration):
        group = next(tries)
        while True:
            count += 1
            group = tries.send(kills(group))
    assert found == sorted(found)
    return set(found), count


@given(st.integers(1, 300), st.sets(st.integers(0, 299), min_size=1, max_size=6))
def test_exactly_the_rows_that_kill_are_found(size: int, bad: set[int]) -> None:
    bad = {row % size for row in bad}

    found, tried = search(size, lambda group: bad & set(group))

    assert found == bad
    assert tried <= len(bad) * (2 * size.bit_length() + 3)


@given(st.integers(2, 100), st.data())
def test_rows_that_kill_only_in_company_are_no_culprits(size: int, data: st.DataObject) -> None:
    pair = {data.draw(st.integers(0, size - 2)), size - 1}

    assert search(size, lambda group: pair <= set(group))[0] == set()


@given(st.integers(1, 100), st.randoms())
def test_a_kill_from_outside_that_happens_twice_in_a_row_at_most_costs_no_row(size: int, chance) -> None:
    kills = 0

    def unlucky(_group: tuple[int, ...]) -> bool:
        nonlocal kills
        kills = kills + 1 if kills < 2 and chance.random() < 0.5 else 0
        return kills > 0

    assert search(size, unlucky)[0] == set()

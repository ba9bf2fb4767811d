"""Additions to a finished table: nothing that was there is touched, a fault at any operation loses nothing."""

import os
import random
import signal
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fake_stage import UNITS, FakeStage, build_all
from forked import in_a_copy
from small_cache import files_of
from xkd_pipeline.build import Built, build
from xkd_pipeline.clear import spare
from xkd_pipeline.progress import table_states
from xkd_pipeline.run import Workers
from xkd_pipeline.store import Store, locked
from xkd_pipeline.verify import verify
from xkd_schemas import faults, manifest
from xkd_schemas.additions import parts_of, plans_of, records_of
from xkd_schemas.errors import BadData, DiskFailed, Mismatch
from xkd_schemas.manifest import Commit, Manifest, Plan, Unit, is_whole, read_record, sealed, to_json
from xkd_schemas.table import Table

SPEC = {"seed": 1, "parser": {"name": "a"}}
SEED = int(os.environ.get("XKD_FAULT_SEED", "20261124"))
ROUNDS = int(os.environ.get("XKD_FAULT_ROUNDS", "12"))


def units_to(end: int) -> tuple[Unit, ...]:
    return tuple(Unit(source="x", first=3 * n, rows=3) for n in range(end))


def grown_to(root: Path, end: int, corpus: str = "more", spec: dict[str, object] | None = None) -> Built:
    """Add units up to `end` to the table "documents"."""
    with locked(root):
        store = Store(root, "documents", (spec or SPEC) | {"corpus": corpus}, units_to(end), more=True)
        stage = FakeStage(folder=store.part(end - 1), at=-1)
        return build(store, stage, list, Workers())


def test_an_addition_is_behind_what_was_there_and_touches_nothing(tmp_path: Path) -> None:
    build_all(tmp_path)
    before = files_of(tmp_path)

    first = grown_to(tmp_path, UNITS + 2)
    second = grown_to(tmp_path, UNITS + 3, "yet more")

    after = files_of(tmp_path)
    assert {n for n in before if before[n] != after[n]} == {"documents/manifest.json", "README.md", "SHA256SUMS"}
    assert [(b.made, b.kept) for b in (first, second)] == [(2, UNITS), (1, UNITS + 2)]
    table = Table(tmp_path, "documents")
    expected = [f"u{unit}r{row}" for unit in range(UNITS + 3) for row in range(unit % 3 + 1)]
    assert [row["doc_id"] for row in table] == expected
    assert table.manifest.starts == (UNITS, UNITS + 2)
    assert list(table.manifest.roots.values()) == [UNITS, UNITS + 2, UNITS + 3]
    assert [p.relative_to(tmp_path).as_posix() for p in parts_of(table.folder)[1:]] == [
        "documents/added/1", "documents/added/2",
    ]  # fmt: skip
    assert verify(tmp_path, "full") == []
    assert spare(tmp_path, older_than=0.0, now=2.0**40) == []


def test_the_same_addition_again_makes_nothing_and_the_first_command_still_fits(tmp_path: Path) -> None:
    build_all(tmp_path)
    grown_to(tmp_path, UNITS + 2)
    before = files_of(tmp_path)

    assert grown_to(tmp_path, UNITS + 2).made == 0
    assert build_all(tmp_path).made == 0

    assert files_of(tmp_path) == before


def test_a_reader_that_knows_no_additions_asks_for_an_upgrade(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build_all(tmp_path)
    assert read_record(tmp_path / "documents/manifest.json", Manifest).min_reader == 1
    grown_to(tmp_path, UNITS + 1)
    monkeypatch.setattr(manifest, "FORMAT", 1)

    with pytest.raises(Mismatch, match=r"format 2, this program reads up to 1. Next: upgrade xkd-toolkit"):
        Table(tmp_path, "documents")
    read_record(tmp_path / "documents/plan.json", Plan)


def work(root: Path) -> None:
    grown_to(root, UNITS + 2)


def points(root: Path) -> list[str]:
    with faults.injected("*:0:count") as fault:
        work(root)
    return fault.points


def first_state(root: Path) -> list[str]:
    """The documents that were there before, read from the table as it is."""
    return [row["doc_id"] for row in Table(root, "documents")][:9]


@pytest.mark.parametrize("how", ["kill", "cut"])
def test_a_fault_at_any_operation_of_an_addition_loses_nothing(tmp_path: Path, how: str) -> None:
    build_all(tmp_path / "whole")
    names = points(tmp_path / "whole")
    undisturbed, there = files_of(tmp_path / "whole"), first_state(tmp_path / "whole")
    chance = random.Random(SEED)
    numbers = range(1, len(names) + 1) if how == "kill" else [chance.randint(1, len(names)) for _ in range(2 * ROUNDS)]
    for number in numbers:
        root = tmp_path / f"{how}{number}"
        if root.exists():
            continue
        build_all(root)

        def dying(root: Path = root, number: int = number) -> None:
            with faults.injected(f"*:{number}:{how}", str(number) if number % 2 else ""):
                work(root)

        status = in_a_copy(dying)
        assert os.WIFSIGNALED(status)
        assert os.WTERMSIG(status) == signal.SIGKILL
        assert first_state(root) == there, f"{how} at operation {number}, {names[number - 1]}"
        work(root)
        assert files_of(root) == undisturbed, f"{how} at operation {number}, {names[number - 1]}"


def test_an_operation_that_fails_is_a_disk_error_and_the_table_stays_readable(tmp_path: Path) -> None:
    build_all(tmp_path / "whole")
    count, undisturbed = len(points(tmp_path / "whole")), files_of(tmp_path / "whole")
    for number in range(1, count + 1, 3):
        root = tmp_path / f"{number}"
        build_all(root)
        with faults.injected(f"*:{number}:ENOSPC"), pytest.raises(DiskFailed):
            work(root)
        assert len(first_state(root)) == 9
        work(root)
        assert files_of(root) == undisturbed


def begun(root: Path) -> None:
    """An addition of two units of which one is there."""
    build_all(root)
    with faults.injected("commit.link:2:EIO"), pytest.raises(DiskFailed):
        work(root)


def test_an_unfinished_addition_is_told_of_and_nothing_else_can_be_added(tmp_path: Path) -> None:
    begun(tmp_path)

    assert [(bad.file, bad.reason) for bad in verify(tmp_path, "full")] == [
        ("documents/added/1/plan.json", "what is added is not finished, 1 of 2 units are")
    ]
    (state,) = table_states(tmp_path)
    assert (state["sealed"], state["units"], state["done"], state["additions"]) == (False, UNITS + 2, UNITS + 1, 1)
    refusal = r"addition 1 is not finished.* repeat the command that began it, or drop it: rm -r .*added/1"
    with pytest.raises(Mismatch, match=refusal):
        grown_to(tmp_path, UNITS + 4, "something else")
    assert build_all(tmp_path).made == 0, "the first command goes on with what is finished"
    work(tmp_path)
    assert verify(tmp_path, "full") == []


def test_the_first_command_makes_its_own_units_and_never_cuts_the_table(tmp_path: Path) -> None:
    build_all(tmp_path)
    work(tmp_path)
    before = files_of(tmp_path)
    next((tmp_path / "documents").glob("00001-*.arrow")).unlink()
    assert build_all(tmp_path).made == 1
    assert files_of(tmp_path) == before

    next((tmp_path / "documents/added/1").glob(f"{UNITS:05d}-*.arrow")).unlink()
    with pytest.raises(Mismatch, match=rf"unit {UNITS} belongs to what was added.*xkd-cache repair"):
        build_all(tmp_path)
    work(tmp_path)
    assert files_of(tmp_path) == before


def test_another_parser_or_units_that_do_not_go_on_are_refused(tmp_path: Path) -> None:
    build_all(tmp_path)
    before = files_of(tmp_path)

    with pytest.raises(Mismatch, match=r"parser.name: cache has a, this run has b"):
        grown_to(tmp_path, UNITS + 1, spec={"seed": 1, "parser": {"name": "b"}})
    with pytest.raises(BadData, match=r"does not come after what is there"):
        Store(tmp_path, "documents", SPEC | {"corpus": "m"}, units_to(UNITS + 1)[1:], more=True)
    assert files_of(tmp_path) == before


def test_a_plan_that_does_not_go_on_is_refused_by_name(tmp_path: Path) -> None:
    build_all(tmp_path)
    work(tmp_path)
    path = tmp_path / "documents/added/1/plan.json"
    plan = read_record(path, Plan)
    path.write_bytes(to_json(plan.model_copy(update={"units": plan.units[1:]})))

    with pytest.raises(BadData, match=r"added/1/plan.json does not go on where documents ends"):
        plans_of(tmp_path / "documents")
    assert verify(tmp_path, "quick")[0].table == "documents"


def test_a_record_in_another_part_does_not_count(tmp_path: Path) -> None:
    build_all(tmp_path)
    work(tmp_path)
    added = tmp_path / "documents/added/1"
    name = records_of(tmp_path / "documents")[-1].name
    before = files_of(tmp_path)
    (added / "commits" / name).rename(tmp_path / "documents/commits" / name)

    assert grown_to(tmp_path, UNITS + 2).made == 1
    assert files_of(tmp_path) == before


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4), data=st.data())
def test_every_state_of_a_manifest_is_known_by_its_root(sizes: list[int], data: st.DataObject) -> None:
    ends = [sum(sizes[: n + 1]) for n in range(len(sizes))]
    plan, states = Plan(table="documents", spec={"n": 0}, units=units_to(ends[0])), []
    commits = [
        Commit(unit=n, file=f"{n:05d}-ab.arrow", rows=1, size=9, sha256="0", frame_xxh3="1", batches=())
        for n in range(ends[-1])
    ]
    for number, end in enumerate(ends):
        made = sealed(plan, tuple(commits[:end]), {"std": float(number)}, {})
        states.append(made)
        assert is_whole(made)
        assert made.roots == {s.root: len(s.commits) for s in states}
        assert all(made.constants_at(s.root) == s.constants for s in states)
        state = manifest.Generation(
            units=end, commits=manifest.commits_digest(made.commits), root=made.root, constants=made.constants
        )
        nxt = ends[min(number + 1, len(ends) - 1)]
        plan = Plan(
            table="documents", spec={"n": number + 1}, units=units_to(nxt), format=2, min_reader=2,
            earlier=(*made.earlier, state),
        )  # fmt: skip
    if len(ends) > 1:
        at = data.draw(st.integers(0, ends[-2] - 1))
        other = [c.model_copy(update={"size": 10}) if c.unit == at else c for c in commits]
        last = Plan(
            table="documents", spec=states[-1].spec, units=units_to(ends[-1]), format=2, min_reader=2,
            earlier=states[-1].earlier,
        )  # fmt: skip
        changed = sealed(last, tuple(other), {}, {})
        assert is_whole(changed)
        kept = {root for root, size in changed.roots.items() if root in states[-1].roots}
        assert kept == {s.root for s, end in zip(states, ends, strict=True) if end <= at}
    assert not is_whole(states[-1].model_copy(update={"format": 3}))

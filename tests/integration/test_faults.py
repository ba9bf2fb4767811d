"""Every operation on the disk fails once, dies once or loses its power once; the next run gives the undisturbed bytes.

XKD_FAULT_ROUNDS sets how many of each are drawn where not all are tried.
"""

import errno
import os
import random
import signal
import time
from pathlib import Path
from typing import NamedTuple

import pytest

import faulty_disk
from damages import ROUNDS, SEED
from fake_stage import FakeStage, opened, run
from small_cache import files_of
from xkd_pipeline.tables.writer import Built
from xkd_schemas.errors import DiskFailed, XkdError


def work(root: Path) -> Built:
    """The smallest run that writes every kind of file but a model's; a note beside it counts finished units."""
    note = root.with_suffix(".finished")
    return run(root, units=2, watch=lambda commits: note.write_text(str(len(commits))) and None)


def dying(root: Path, fault: str, *, seed: str = "", synced: bool = True) -> None:
    with faulty_disk.injected(fault, seed, synced=synced):
        assert faulty_disk.exit_code_of(lambda: work(root)) == -signal.SIGKILL, f"{fault}: not killed"


class Undisturbed(NamedTuple):
    points: list[str]
    """Each operation on the disk."""
    files: dict[str, bytes]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    root = tmp_path_factory.mktemp("undisturbed") / "t"
    with faulty_disk.injected("*:0:count") as fault:
        work(root)
    return Undisturbed(fault.points, files_of(root))


def test_every_operation_failing_once_is_a_disk_error_and_the_next_run_is_undisturbed(
    tmp_path: Path, undisturbed: Undisturbed
) -> None:
    wanted = {"commit.write", "commit.link", "manifest.rename", "rejects.write", "folder.sync", "folder.mkdir"}
    assert wanted <= set(undisturbed.points)
    for number, point in enumerate(undisturbed.points, start=1):
        name = ("ENOSPC", "EIO")[number % 2]
        root = tmp_path / f"{number}"
        with faulty_disk.injected(f"*:{number}:{name}"), pytest.raises(DiskFailed) as caught:
            work(root)
        assert os.strerror(getattr(errno, name)) in str(caught.value), point
        work(root)
        assert files_of(root) == undisturbed.files, f"{name} at operation {number}, {point}"


def test_a_kill_at_any_kind_of_operation_loses_nothing(tmp_path: Path, undisturbed: Undisturbed) -> None:
    """The first and the last of each kind, and some between."""
    points = undisturbed.points
    numbers = {points.index(point) + 1 for point in points} | {len(points) - points[::-1].index(p) for p in points}
    for number in numbers.union(random.Random(SEED).choices(range(1, len(points) + 1), k=ROUNDS)):
        root = tmp_path / f"{number}"
        dying(root, f"*:{number}:kill")
        work(root)
        assert files_of(root) == undisturbed.files, f"killed at operation {number}, {points[number - 1]}"


def test_a_worker_that_outlives_its_driver_changes_no_byte(tmp_path: Path, undisturbed: Undisturbed) -> None:
    """The same command is run at once, while it still writes."""
    stage = FakeStage(folder=opened(tmp_path / "t", units=2).folder, troubles={0: "slow"})
    worker = os.fork()
    if worker == 0:
        try:
            stage.load()(1)
        finally:  # its file may have been swept away by then
            os._exit(0)
    while not any(stage.folder.glob(".tmp-*")):
        time.sleep(0.01)

    work(tmp_path / "t")

    os.waitpid(worker, 0)
    assert work(tmp_path / "t").kept == 2
    assert files_of(tmp_path / "t") == undisturbed.files


def bad_after_cuts(tmp_path: Path, undisturbed: Undisturbed, *, synced: bool) -> int:
    """Cut the power at drawn operations; how many times a finished unit is lost or bytes differ."""
    chance, bad = random.Random(SEED), 0
    for cut in range(2 * ROUNDS):
        number = chance.randint(1, len(undisturbed.points))
        root = tmp_path / f"{cut}"
        dying(root, f"*:{number}:cut", seed=str(chance.randrange(2**30)) if cut % 2 else "", synced=synced)
        note = root.with_suffix(".finished")
        known = int(note.read_text()) if note.exists() else 0
        try:
            bad += work(root).kept < known or files_of(root) != undisturbed.files
        except XkdError:
            bad += 1
    return bad


def test_a_power_cut_loses_nothing_that_was_committed(tmp_path: Path, undisturbed: Undisturbed) -> None:
    assert bad_after_cuts(tmp_path, undisturbed, synced=True) == 0


def test_the_simulated_power_cut_finds_a_program_that_does_not_fsync(tmp_path: Path, undisturbed: Undisturbed) -> None:
    assert bad_after_cuts(tmp_path, undisturbed, synced=False) > ROUNDS // 2

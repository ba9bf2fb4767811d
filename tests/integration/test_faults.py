"""Every operation on the disk fails once, dies once or loses its power once; the next run gives the undisturbed bytes.

XKD_FAULT_ROUNDS sets how many of each are drawn where not all are tried.
"""

import errno
import os
import random
import signal
import subprocess
from pathlib import Path

import pytest

import faulty_disk
from damages import ROUNDS, SEED
from fake_stage import build_all
from small_cache import files_of
from xkd_pipeline.tables.writer import Built, locked
from xkd_schemas.errors import DiskFailed, XkdError


def work(root: Path) -> Built:
    """The smallest run that writes every kind of file but a model's; a note beside it counts finished units."""
    note = root.with_suffix(".finished")
    with locked(root):
        return build_all(root, watch=lambda commits: note.write_text(str(len(commits))) and None)


def finished(root: Path) -> int:
    """Units that the last run was told are done."""
    note = root.with_suffix(".finished")
    return int(note.read_text()) if note.exists() else 0


def counted(root: Path) -> list[str]:
    with faulty_disk.injected("*:0:count") as fault:
        work(root)
    return fault.points


def dying(root: Path, fault: str, *, seed: str = "", synced: bool = True) -> None:
    with faulty_disk.injected(fault, seed, synced=synced):
        assert faulty_disk.exit_code_of(lambda: work(root)) == -signal.SIGKILL, f"{fault}: not killed"


def test_every_operation_failing_once_is_a_disk_error_and_the_next_run_is_undisturbed(tmp_path: Path) -> None:
    points = counted(tmp_path / "undisturbed")
    undisturbed = files_of(tmp_path / "undisturbed")
    assert {"commit.write", "commit.link", "manifest.rename", "folder.sync", "folder.mkdir"} <= set(points)
    for number, point in enumerate(points, start=1):
        name = ("ENOSPC", "EIO")[number % 2]
        root = tmp_path / f"{number}"
        with faulty_disk.injected(f"*:{number}:{name}"), pytest.raises(DiskFailed) as caught:
            work(root)
        assert os.strerror(getattr(errno, name)) in str(caught.value), point
        work(root)
        assert files_of(root) == undisturbed, f"{name} at operation {number}, {point}"


def test_a_kill_at_any_kind_of_operation_loses_nothing(tmp_path: Path) -> None:
    """The first and the last of each kind, and some between."""
    points = counted(tmp_path / "undisturbed")
    undisturbed = files_of(tmp_path / "undisturbed")
    numbers = {points.index(point) + 1 for point in points} | {len(points) - points[::-1].index(p) for p in points}
    for number in numbers.union(random.Random(SEED).choices(range(1, len(points) + 1), k=ROUNDS)):
        root = tmp_path / f"{number}"
        dying(root, f"*:{number}:kill")
        work(root)
        assert files_of(root) == undisturbed, f"killed at operation {number}, {points[number - 1]}"


def bad_after_cuts(tmp_path: Path, cuts: int, *, synced: bool) -> int:
    """Cut the power `cuts` times at drawn operations; how many times a finished unit is lost or bytes differ."""
    points = counted(tmp_path / "undisturbed")
    undisturbed = files_of(tmp_path / "undisturbed")
    chance = random.Random(SEED)
    bad = 0
    for cut in range(cuts):
        number = chance.randint(1, len(points))
        root = tmp_path / f"{synced}-{cut}"
        dying(root, f"*:{number}:cut", seed=str(chance.randrange(2**30)) if cut % 2 else "", synced=synced)
        known = finished(root)
        try:
            bad += work(root).kept < known or files_of(root) != undisturbed
        except XkdError:
            bad += 1
    return bad


def test_a_power_cut_loses_nothing_that_was_committed(tmp_path: Path) -> None:
    assert bad_after_cuts(tmp_path, 2 * ROUNDS, synced=True) == 0


def test_the_simulated_power_cut_finds_a_program_that_does_not_fsync(tmp_path: Path) -> None:
    assert bad_after_cuts(tmp_path, 2 * ROUNDS, synced=False) > ROUNDS // 2


@pytest.mark.slow
def test_a_disk_that_is_full_at_any_size_is_a_disk_error_and_the_same_run_goes_on_with_room(tmp_path: Path) -> None:
    """A tmpfs of one page more each time, until the run fits; needs the right to mount one."""
    build_all(tmp_path / "undisturbed")
    undisturbed, disk, fits = files_of(tmp_path / "undisturbed"), tmp_path / "disk", False
    disk.mkdir()
    for pages in range(1, 200):
        mount = ["mount", "-t", "tmpfs", "-o", f"size={4 * pages}k", "tmpfs", disk]
        if subprocess.run(mount, capture_output=True, check=False).returncode:
            pytest.skip("no tmpfs can be mounted here")
        try:
            try:
                build_all(disk / "cache")
                fits = True
            except DiskFailed:
                subprocess.run(["mount", "-o", "remount,size=4m", disk], check=True)
                build_all(disk / "cache")
            assert files_of(disk / "cache") == undisturbed
        finally:
            subprocess.run(["umount", disk], check=True)
        if fits:
            break
    assert fits
    assert pages > 9

"""Every operation on the disk fails once, dies once or loses its power once; the next run gives the undisturbed bytes.

XKD_FAULT_ROUNDS sets how many of each are drawn where not all are tried; `python -m tests.fault_table` runs the
full numbers.
"""

import errno
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from fake_stage import build_all
from small_cache import files_of
from xkd_pipeline.build import Built
from xkd_pipeline.store import locked
from xkd_schemas import faults, files
from xkd_schemas.errors import DiskFailed, XkdError

ROUNDS = int(os.environ.get("XKD_FAULT_ROUNDS", "12"))
SEED = int(os.environ.get("XKD_FAULT_SEED", "20261124"))


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
    with faults.injected("*:0:count") as fault:
        work(root)
    return fault.points


def in_a_copy(job: Callable[[], object]) -> int:
    """Fork and do it; the exit status as os.waitpid gives it."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            job()
            code = 0
        except DiskFailed:
            code = 74
        finally:
            os._exit(code)
    return os.waitpid(child, 0)[1]


def dying(root: Path, fault: str, *, seed: str = "", synced: bool = True) -> None:
    """Work in a copy of this process that `fault` kills."""

    def job() -> None:
        if not synced:
            files._fsync = lambda descriptor: None
        with faults.injected(fault, seed):
            work(root)

    status = in_a_copy(job)
    assert os.WIFSIGNALED(status), f"{fault}: not killed"
    assert os.WTERMSIG(status) == signal.SIGKILL


def test_every_operation_failing_once_is_a_disk_error_and_the_next_run_is_undisturbed(tmp_path: Path) -> None:
    points = counted(tmp_path / "undisturbed")
    undisturbed = files_of(tmp_path / "undisturbed")
    assert {"shard.write", "commit.link", "manifest.rename", "folder.sync", "folder.mkdir"} <= set(points)
    for number, point in enumerate(points, start=1):
        name = ("ENOSPC", "EIO")[number % 2]
        root = tmp_path / f"{number}"
        with faults.injected(f"*:{number}:{name}"), pytest.raises(DiskFailed) as caught:
            work(root)
        assert caught.value.exit_code == 74
        assert os.strerror(getattr(errno, name)) in str(caught.value), point
        work(root)
        assert files_of(root) == undisturbed, f"{name} at operation {number}, {point}"


def test_a_kill_at_any_operation_loses_nothing(tmp_path: Path) -> None:
    points = counted(tmp_path / "undisturbed")
    undisturbed = files_of(tmp_path / "undisturbed")
    for number, point in enumerate(points, start=1):
        root = tmp_path / f"{number}"
        dying(root, f"*:{number}:kill")
        work(root)
        assert files_of(root) == undisturbed, f"killed at operation {number}, {point}"


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

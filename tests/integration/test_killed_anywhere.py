"""A writer killed at any moment loses no finished unit, and running again gives the bytes of an undisturbed run.

The writer is a forked copy of this process that kills itself (SIGKILL: no handler, no `finally`) before the first
call that changes what is on disk, then another before the second, and so on through all of them.
"""

import io
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import small_cache
from fake_stage import UNITS, build_all
from small_cache import IN_PROCESS, files_of
from xkd_pipeline.stages import documents_stage, teacher_stage
from xkd_pipeline.tables.writer import locked

CHANGES: tuple[tuple[Any, str], ...] = (
    (io, "open"), (os, "link"), (os, "rename"), (os, "replace"), (os, "unlink"), (os, "mkdir")
)  # fmt: skip
"""Every call our writers make that changes a folder; of `io.open` only those that make a file."""


def in_a_copy(work: Callable[[], object], die_at: int | None = None) -> int:
    """Fork and work, dying before change number `die_at`; how many changes there were, or -1 if it died."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os._exit(_child(work, die_at, writing))
    os.close(writing)
    with os.fdopen(reading) as pipe:
        said = pipe.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return -1
    assert os.WEXITSTATUS(status) == 0, "the writer failed, see its traceback on stderr"
    return int(said)


def _child(work: Callable[[], object], die_at: int | None, writing: int) -> int:
    count = 0

    def dying(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            if real is not io_open or "x" in str(args[1:2]):
                if count == die_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                count += 1
            return real(*args, **kwargs)

        return call

    io_open = io.open
    originals = [(owner, name, getattr(owner, name)) for owner, name in CHANGES]
    for owner, name, real in originals:
        setattr(owner, name, dying(real))
    try:
        work()
    except BaseException:
        traceback.print_exc(file=sys.__stderr__)
        return 1
    os.write(writing, str(count).encode())
    return 0


def test_a_writer_killed_before_any_change_of_the_disk_loses_nothing(tmp_path: Path) -> None:
    def work(root: Path) -> None:
        with locked(root):
            build_all(root)

    changes = in_a_copy(lambda: work(tmp_path / "undisturbed"))
    undisturbed = files_of(tmp_path / "undisturbed")
    kept = []

    for die_at in range(changes):
        root = tmp_path / f"{die_at}"
        assert in_a_copy(lambda root=root: work(root), die_at) == -1
        records = len(list((root / "documents" / "commits").glob("[0-9]*.json")))

        with locked(root):
            built = build_all(root)

        assert (built.made, built.kept) == (UNITS - records, records), f"killed before change {die_at}"
        assert files_of(root) == undisturbed, f"killed before change {die_at}"
        kept.append(records)
    assert kept == sorted(kept)
    assert set(kept) == set(range(UNITS + 1))


@pytest.mark.parametrize("part", ["manifest.json", "commits/00001.json"])
def test_a_damaged_record_of_one_table_does_not_stop_the_command_that_makes_another(tmp_path: Path, part: str) -> None:
    cache, made = small_cache.copied(tmp_path), small_cache.made()
    run = small_cache.run_file(
        cache,
        documents={"corpus": [str(made / "corpus.jsonl")]},
        teacher={"model": str(made / "teacher")},
    )
    before = files_of(cache)
    (cache / "teachers" / "T" / part).write_bytes(b"{")

    again = [stage(run, IN_PROCESS).values["made"] for stage in (documents_stage, teacher_stage)]

    assert again == [0, 0 if part == "manifest.json" else 1]
    assert files_of(cache) == before

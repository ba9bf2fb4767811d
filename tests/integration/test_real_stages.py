"""Documents, teacher and align on a failing disk, killed and cut off from power at any moment.

The three commands run on a small corpus in a warm copy of this process: forked when everything is imported and loaded,
it runs the command line's own functions without the seconds that a program takes to start. XKD_FAULT_ROUNDS sets how
often.
"""

import functools
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import pytest

import faulty_disk
import small_cache
from damages import ROUNDS, SEED
from small_cache import files_of
from xkd_pipeline.cli.app import app
from xkd_pipeline.tables.writer import Store
from xkd_schemas.cache.manifest import Commit
from xkd_schemas.errors import BadData, DiskFailed

PATIENCE = 120.0
"""Seconds after which a run counts as hung."""


@functools.cache
def corpus() -> Path:
    return small_cache.write_rows(small_cache.made() / "six.jsonl", small_cache.corpus_rows(6))


def commands(cache: Path) -> Iterator[list[str]]:
    """Six documents in three shards; the teacher and the student are tiny and random, the parser is spaCy's."""
    made = small_cache.made()
    yield [
        "documents", str(corpus()), "--out", str(cache), "--spacy-model", small_cache.SPACY,
        "--set", "documents.rows_per_shard=2",
    ]  # fmt: skip
    yield ["teacher", str(cache), "--model", str(made / "teacher"), "--name", "T", "--dtype", "float32"]
    yield ["align", str(cache), "--student", str(made / "student"), "--name", "S", "--teacher", "T"]


def run(cache: Path) -> None:
    for command in commands(cache):
        app(command, standalone_mode=False)


def start(cache: Path, fault: str = "", seed: str = "") -> int:
    child = os.fork()
    if child:
        return child
    try:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(os.open(cache.with_suffix(".said"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), 2)
        sys.stderr = os.fdopen(2, "w", closefd=False)
        note_commits(cache)
        with faulty_disk.injected(fault, seed) if fault else nullcontext():
            run(cache)
        os._exit(0)
    except BadData:
        os._exit(65)
    except BaseException:
        traceback.print_exc()
    os._exit(1)


def note_commits(cache: Path) -> None:
    """From now on each commit of this process is noted outside of the cache once it is done."""
    real, note = Store.commit, os.open(cache.with_suffix(".told"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def noted(store: Store, commit: Commit) -> None:
        real(store, commit)
        table = store.folder.relative_to(store.root).as_posix()
        os.write(note, f"{table} {commit.unit} {commit.size} {commit.file}\n".encode())

    Store.commit = noted


def exit_code(child: int, seconds: float | None = None) -> int | None:
    """Exit code of a child that is killed after so many seconds, or waited for; None where it hangs."""
    until = time.monotonic() + (PATIENCE if seconds is None else seconds)
    while time.monotonic() < until:
        process, status = os.waitpid(child, os.WNOHANG)
        if process:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None if seconds is None else -signal.SIGKILL


@dataclass
class Undisturbed:
    """A run that nobody disturbs: what it leaves, how long it takes, how many operations on the disk it is."""

    files: dict[str, bytes]
    seconds: float
    operations: int


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """Everything is loaded here, so that copies have it when they are forked; then the commands run once in a copy."""
    folder = tmp_path_factory.mktemp("undisturbed")
    small_cache.made()
    with faulty_disk.injected("*:0:count") as fault:
        run(folder / "counted")
    assert {"file.fsync", "tokenizer.rename", "sums.rename"} <= set(fault.points)
    begun = time.monotonic()
    assert exit_code(start(folder / "forked")) == 0
    seconds = time.monotonic() - begun
    files = files_of(folder / "forked")
    assert files == files_of(folder / "counted")
    return Undisturbed(files=files, seconds=seconds, operations=fault.seen)


def differs(cache: Path, whole: Undisturbed) -> bool:
    """True, and the names on standard error, where a folder is not that of the undisturbed run."""
    left = files_of(cache)
    names = sorted(n for n in left.keys() | whole.files.keys() if left.get(n) != whole.files.get(n))
    if names:
        sys.stderr.write(f"{cache.name} differs in {', '.join(names)}\n")
    return bool(names)


def committed(cache: Path) -> dict[str, tuple[int, int]]:
    """Commit records of all tables, and which files record and shard are: made again, they would be others."""
    found = {}
    for record in cache.rglob("commits/[0-9]*.json"):
        shard = record.parents[1] / json.loads(record.read_bytes())["file"]
        found[record.relative_to(cache).as_posix()] = (record.stat().st_ino, shard.stat().st_ino)
    return found


def test_a_disk_error_anywhere_leaves_nothing_behind(tmp_path: Path, whole: Undisturbed) -> None:
    for number in random.Random(SEED).choices(range(1, whole.operations + 1), k=max(3, ROUNDS // 4)):
        cache = tmp_path / f"{number}"
        shutil.rmtree(cache, ignore_errors=True)
        with faulty_disk.injected(f"*:{number}:{('ENOSPC', 'EIO')[number % 2]}"), pytest.raises(DiskFailed):
            run(cache)
        run(cache)
        assert not differs(cache, whole)


def test_killed_at_any_time_the_same_commands_finish_with_the_same_bytes(tmp_path: Path, whole: Undisturbed) -> None:
    """SIGKILL after a random time and at a drawn operation, in turn; the same commands again until they end."""
    chance, rounds, kills = random.Random(SEED), ROUNDS // 2, 0
    while kills < rounds:
        cache = tmp_path / f"{kills}"
        kept: dict[str, tuple[int, int]] = {}
        code: int | None = -signal.SIGKILL
        while code == -signal.SIGKILL:
            timed = kills % 2 == 0 and kills < rounds
            fault = "" if timed or kills >= rounds else f"*:{chance.randint(1, whole.operations)}:kill"
            code = exit_code(start(cache, fault), chance.uniform(0, whole.seconds) if timed else None)
            now = committed(cache)
            assert kept.items() <= now.items()
            kept = now
            kills += code == -signal.SIGKILL
        assert code == 0
        assert not differs(cache, whole)
        shutil.rmtree(cache)


def is_there(cache: Path, line: str) -> bool:
    table, unit, size, file = line.split()
    shard, record = cache / table / file, cache / table / f"commits/{int(unit):05d}.json"
    return shard.is_file() and shard.stat().st_size == int(size) and record.is_file() and record.stat().st_size > 0


def test_a_power_cut_loses_no_shard_that_was_told_to_be_done(tmp_path: Path, whole: Undisturbed) -> None:
    """At drawn operations, every other time keeping a drawn part of what was not synced."""
    chance = random.Random(SEED)
    for number in range(ROUNDS // 3):
        cache = tmp_path / f"cut{number}"
        seed = str(chance.randrange(2**30)) if number % 2 else ""
        assert exit_code(start(cache, f"*:{chance.randint(1, whole.operations)}:cut", seed)) == -signal.SIGKILL
        assert all(is_there(cache, line) for line in cache.with_suffix(".told").read_text().splitlines())
        assert exit_code(start(cache)) == 0
        assert not differs(cache, whole)
        shutil.rmtree(cache)

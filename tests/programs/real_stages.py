"""The three commands on a small corpus in a warm copy of this process that is killed, by a timer or by a fault.

A copy is forked when everything is imported and loaded, and then runs the command line's own functions: the code of
`xkd-cache documents`, `teacher` and `align` without the seconds that it takes to start. For tests and fault_table.py.
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
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import faulty_disk
import small_cache
from small_cache import files_of
from xkd_pipeline.cli.app import app
from xkd_pipeline.parsing import spacy_parser
from xkd_pipeline.tables.writer import Store
from xkd_schemas.cache.manifest import Commit
from xkd_schemas.errors import BadData

PATIENCE = 120.0
"""Seconds after which a run counts as hung."""


def warm() -> None:
    """Keep spaCy's pipeline between runs, so that a copy has it when it is forked."""
    spacy_parser.load_pipeline = functools.cache(spacy_parser.load_pipeline)


def commands(cache: Path) -> Iterator[list[str]]:
    """Twelve documents in six shards; the teacher and the student are tiny and random, the parser is spaCy's."""
    made = small_cache.made()
    yield [
        "documents", str(made / "corpus.jsonl"), "--out", str(cache), "--spacy-model", small_cache.SPACY,
        "--set", "documents.rows_per_shard=2",
    ]  # fmt: skip
    yield ["teacher", str(cache), "--model", str(made / "teacher"), "--name", "T", "--dtype", "float32"]
    yield ["align", str(cache), "--student", str(made / "student"), "--name", "S", "--teacher", "T"]


def started(cache: Path, fault: str = "", seed: str = "", *, synced: bool = True) -> int:
    """Fork a copy that runs the commands; its process id."""
    child = os.fork()
    if child:
        return child
    try:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(os.open(cache.with_suffix(".said"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), 2)
        sys.stderr = os.fdopen(2, "w", closefd=False)
        _tell_commits(cache)
        with faulty_disk.injected(fault, seed, synced=synced) if fault else nullcontext():
            for command in commands(cache):
                app(command, standalone_mode=False)
        os._exit(0)
    except BadData:
        os._exit(65)
    except BaseException:
        traceback.print_exc()
    os._exit(1)


def ended(child: int, seconds: float) -> int | None:
    """Wait for a child that we started; its status, or None where it is still there after so many seconds."""
    until = time.monotonic() + seconds
    while True:
        process, status = os.waitpid(child, os.WNOHANG)
        if process:
            return status
        if time.monotonic() > until:
            return None
        time.sleep(0.002)


def killed(child: int) -> None:
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def finish(cache: Path) -> int | None:
    """Run the commands to their end; exit code, or None for a hang."""
    child = started(cache)
    status = ended(child, PATIENCE)
    if status is None:
        killed(child)
        return None
    return os.waitstatus_to_exitcode(status)


def committed(cache: Path) -> dict[str, tuple[int, int]]:
    """Commit records of all tables, and which files record and shard are: made again, they would be others."""
    found = {}
    for record in cache.rglob("commits/[0-9]*.json"):
        shard = record.parents[1] / json.loads(record.read_bytes())["file"]
        found[record.relative_to(cache).as_posix()] = (record.stat().st_ino, shard.stat().st_ino)
    return found


@dataclass
class Undisturbed:
    """A run that nobody disturbs: what it leaves, how long it takes, how many operations on the disk it is."""

    files: dict[str, bytes]
    seconds: float
    operations: int


def undisturbed(folder: Path) -> Undisturbed:
    """Load everything here, then run once in a copy."""
    with faulty_disk.injected("*:0:count") as fault, Path(os.devnull).open("w") as quiet, redirect_stdout(quiet):
        small_cache.made()
        fault.seen = 0
        for command in commands(folder / "counted"):
            app(command, standalone_mode=False)
    start = time.monotonic()
    assert finish(folder / "undisturbed") == 0
    seconds = time.monotonic() - start
    whole, counted = files_of(folder / "undisturbed"), files_of(folder / "counted")
    differing = [name for name in whole.keys() | counted.keys() if whole.get(name) != counted.get(name)]
    assert not differing, differing
    return Undisturbed(files=whole, seconds=seconds, operations=fault.seen)


def kills(folder: Path, rounds: int, chance: random.Random) -> Counter[str]:
    """SIGKILL after a random time and at a drawn operation, in turn; the same command again until it ends."""
    whole = undisturbed(folder)
    found = Counter(kills=0, captures=0, lost=0, differ=0, hung=0, failed=0)
    while found["kills"] < rounds:
        cache = folder / f"{found['captures']}"
        found["captures"] += 1
        kept: dict[str, tuple[int, int]] = {}
        code: int | None = -signal.SIGKILL
        while code == -signal.SIGKILL:
            timed = found["kills"] % 2 == 0 and found["kills"] < rounds
            fault = "" if timed or found["kills"] >= rounds else f"*:{chance.randint(1, whole.operations)}:kill"
            code = _run(started(cache, fault), chance.uniform(0, whole.seconds) if timed else None)
            now = committed(cache)
            found["lost"] += any(now.get(name) != files for name, files in kept.items())
            kept = now
            found["kills"] += code == -signal.SIGKILL
        found["hung"] += code is None
        found["failed"] += code not in (0, None)
        found["differ"] += _differs(cache, whole)
        shutil.rmtree(cache)
    return found


def _run(child: int, seconds: float | None) -> int | None:
    """Exit code of a child that is killed after so many seconds, or waited for; None where it hangs."""
    status = ended(child, PATIENCE if seconds is None else seconds)
    if status is not None:
        return os.waitstatus_to_exitcode(status)
    killed(child)
    return None if seconds is None else -signal.SIGKILL


def cuts(folder: Path, rounds: int, chance: random.Random, *, synced: bool = True) -> Counter[str]:
    """The power is cut at a drawn operation, every other time keeping a drawn part of what was not synced."""
    whole = undisturbed(folder)
    found = Counter(cuts=0, lost=0, differ=0, failed=0)
    for number in range(rounds):
        cache = folder / f"cut{number}"
        seed = str(chance.randrange(2**30)) if number % 2 else ""
        child = started(cache, f"*:{chance.randint(1, whole.operations)}:cut", seed, synced=synced)
        assert _run(child, None) == -signal.SIGKILL
        found["cuts"] += 1
        found["lost"] += not all(is_there(cache, line) for line in told(cache))
        found["failed"] += finish(cache) != 0
        found["differ"] += _differs(cache, whole)
        shutil.rmtree(cache, ignore_errors=True)
    return found


def _differs(cache: Path, whole: Undisturbed) -> bool:
    """True, and the names on standard error, where a folder is not that of the undisturbed run."""
    left = files_of(cache)
    names = sorted(n for n in left.keys() | whole.files.keys() if left.get(n) != whole.files.get(n))
    if names:
        sys.stderr.write(f"{cache.name} differs in {', '.join(names)}\n")
    return bool(names)


def told(cache: Path) -> list[str]:
    """Table, unit, size and file of every commit that a run was told is done; written outside of the cache."""
    note = cache.with_suffix(".told")
    return note.read_text().splitlines() if note.exists() else []


def is_there(cache: Path, line: str) -> bool:
    table, unit, size, file = line.split()
    shard, record = cache / table / file, cache / table / f"commits/{int(unit):05d}.json"
    return shard.is_file() and shard.stat().st_size == int(size) and record.is_file() and record.stat().st_size > 0


def _tell_commits(cache: Path) -> None:
    """From now on each commit of this process is noted once it is done."""
    real, note = Store.commit, os.open(cache.with_suffix(".told"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def noted(store: Store, commit: Commit) -> None:
        real(store, commit)
        table = store.folder.relative_to(store.root).as_posix()
        os.write(note, f"{table} {commit.unit} {commit.size} {commit.file}\n".encode())

    Store.commit = noted

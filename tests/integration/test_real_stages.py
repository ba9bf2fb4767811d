"""Documents, teacher and align on a failing disk, killed and cut off from power at drawn operations.

The three commands run on a small corpus in warm copies of this process: forked when everything is imported and loaded,
they run the command line's own functions without the seconds that a program takes to start. XKD_FAULT_ROUNDS sets how
often.
"""

import json
import random
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import faulty_disk
import small_cache
from damages import ROUNDS, SEED
from small_cache import files_of
from xkd_pipeline.cli.app import app
from xkd_pipeline.tables.writer import Store
from xkd_schemas.cache.manifest import Commit
from xkd_schemas.errors import DiskFailed


class Undisturbed(NamedTuple):
    """What a run leaves that nobody disturbs, and how many operations on the disk it is."""

    corpus: Path
    files: dict[str, bytes]
    operations: int


def run(cache: Path, corpus: Path) -> None:
    """Six documents in three shards; the teacher and the student are tiny and random, the parser is spaCy's."""
    made = small_cache.made()
    spacy = ["--spacy-model", small_cache.SPACY, "--set", "documents.rows_per_shard=2"]
    for command in (
        ["documents", corpus, "--out", cache, *spacy],
        ["teacher", cache, "--model", made / "teacher", "--name", "T", "--dtype", "float32"],
        ["align", cache, "--student", made / "student", "--name", "S", "--teacher", "T"],
    ):
        app([*map(str, command)], standalone_mode=False)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Undisturbed]:
    """Everything is loaded by a first run, so that copies have it when they are forked; a second one is counted."""
    folder = tmp_path_factory.mktemp("undisturbed")
    corpus = small_cache.write_rows(folder / "six.jsonl", small_cache.corpus_rows(6))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOKENIZERS_PARALLELISM", "false")
        run(folder / "first", corpus)
        with faulty_disk.injected("*:0:count") as fault:
            run(folder / "counted", corpus)
        assert {"file.fsync", "tokenizer.rename", "sums.rename"} <= set(fault.points)
        files = files_of(folder / "counted")
        assert files == files_of(folder / "first")
        yield Undisturbed(corpus, files, fault.seen)


def is_killed(cache: Path, corpus: Path, fault: str, seed: str = "") -> bool:
    """Run in a copy of this process, which notes each commit outside of the cache once it is done; or to the end."""
    commit = Store.commit
    cache.with_suffix(".told").touch()

    def noted(store: Store, record: Commit) -> None:
        commit(store, record)
        with cache.with_suffix(".told").open("a") as note:
            table = store.folder.relative_to(store.root).as_posix()
            note.write(f"{table} {record.unit} {record.size} {record.file}\n")

    def work() -> None:
        Store.commit = noted
        run(cache, corpus)

    with faulty_disk.injected(fault, seed):
        code = faulty_disk.exit_code_of(work)
    assert code in (0, -signal.SIGKILL)
    return code != 0


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
            run(cache, whole.corpus)
        run(cache, whole.corpus)
        assert not differs(cache, whole)


def test_killed_at_any_operation_the_same_commands_finish_with_the_same_bytes(
    tmp_path: Path, whole: Undisturbed
) -> None:
    """Again and again, until the drawn operation is none of those that are left."""
    chance, kills = random.Random(SEED), 0
    while kills < ROUNDS // 2:
        cache, kept = tmp_path / f"{kills}", dict[str, tuple[int, int]]()
        while is_killed(cache, whole.corpus, f"*:{chance.randint(1, whole.operations)}:kill"):
            kills += 1
            now = committed(cache)
            assert kept.items() <= now.items()
            kept = now
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
        assert is_killed(cache, whole.corpus, f"*:{chance.randint(1, whole.operations)}:cut", seed)
        assert all(is_there(cache, line) for line in cache.with_suffix(".told").read_text().splitlines())
        run(cache, whole.corpus)
        assert not differs(cache, whole)
        shutil.rmtree(cache)

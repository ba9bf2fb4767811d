"""Links below a cache are refused by whoever reads, writes or deletes there, and so are files that nothing names."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import small_cache
from small_cache import IN_PROCESS
from xkd_pipeline.maintain.export_parquet import export_parquet
from xkd_pipeline.maintain.gc import collect
from xkd_pipeline.maintain.repair import repair
from xkd_pipeline.maintain.verify import verify
from xkd_pipeline.reports.report import write_report
from xkd_pipeline.stages import align_stage
from xkd_pipeline.tables.dataset_card import table_states
from xkd_pipeline.tables.writer import locked
from xkd_schemas.cache.table import Table
from xkd_schemas.errors import InputMissing, Refused
from xkd_trainer.data.cache import Cache
from xkd_trainer.models.loading import load_tokenizer


def hold(cache: Path) -> None:
    with locked(cache):
        pass


def align(cache: Path) -> None:
    align_stage(small_cache.run_file(cache, student={"tokenizer": str(small_cache.made() / "student")}), IN_PROCESS)


COMMANDS: dict[str, Callable[[Path], object]] = {
    "gc": lambda cache: collect(cache, older_than=0, dry_run=False),
    "gc --dry-run": lambda cache: collect(cache, older_than=0, dry_run=True),
    "verify": verify,
    "repair": lambda cache: repair(cache, IN_PROCESS),
    "status": table_states,
    "report": lambda cache: write_report(cache, cache.parent / "report.html"),
    "export": lambda cache: export_parquet(cache, cache.parent / "out"),
    "align": align,
    "any writer": hold,
    "training": lambda cache: Cache(cache, student="S"),
}
READERS = {name: run for name, run in COMMANDS.items() if name in ("report", "export", "align", "training")}


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A folder of the user's with files that are old and named as those of a cache."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    for name in ("00000-0123456789ab.jsonl", "00000.json", ".tmp-1-a", "letter"):
        (folder / name).write_text("dear")
        os.utime(folder / name, (0, 0))
    return folder


@pytest.mark.parametrize("command", COMMANDS)
def test_a_linked_folder_is_refused_by_name_and_nothing_in_it_is_touched(
    tmp_path: Path, elsewhere: Path, command: str
) -> None:
    cache, before = small_cache.copied(tmp_path), sorted(elsewhere.iterdir())
    for place in ("documents/rejects", "students/S/added"):
        (cache / place).symlink_to(elsewhere)
        with pytest.raises(Refused, match=rf"{place} is a symbolic link"):
            COMMANDS[command](cache)
        (cache / place).unlink()

    assert sorted(elsewhere.iterdir()) == before
    assert {path.read_text() for path in before} == {"dear"}


@pytest.mark.parametrize(
    "place", ["README.md", "LOCK", "documents", "teachers/T/tokenizer", "students/S/manifest.json"]
)
def test_a_file_or_folder_that_was_replaced_by_a_link_is_refused_too(tmp_path: Path, place: str) -> None:
    cache = small_cache.copied(tmp_path)
    (cache / place).rename(tmp_path / "moved")
    (cache / place).symlink_to(tmp_path / "moved")

    for command in ("gc", "verify", "status", "any writer"):
        with pytest.raises(Refused, match=rf"{place} is a symbolic link"):
            COMMANDS[command](cache)


def test_a_tokenizer_behind_a_link_is_not_loaded(tmp_path: Path) -> None:
    cache = small_cache.copied(tmp_path)
    (cache / "teachers").rename(tmp_path / "moved")
    (cache / "teachers").symlink_to(tmp_path / "moved")

    with pytest.raises(Refused, match="teachers is a symbolic link"):
        load_tokenizer(str(cache / "teachers/T/tokenizer"))


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    cache = small_cache.copied(tmp_path)
    (cache / "documents/manifest.json").unlink()
    os.mkfifo(cache / "documents/manifest.json")

    with pytest.raises(Refused, match=r"manifest\.json is neither a file nor a folder"):
        Table(cache, "documents")


@pytest.mark.parametrize("place", ["xxhash.py", "torch/__init__.py", "teachers/json.py", "documents/commits/re.py"])
def test_a_file_that_no_manifest_names_is_refused_by_verify_and_by_opening(tmp_path: Path, place: str) -> None:
    cache = small_cache.copied(tmp_path)
    (cache / place).parent.mkdir(exist_ok=True)
    (cache / place).write_text("raise SystemExit('ran')")
    shown = place.partition("/__init__")[0]

    for run in READERS.values():
        with pytest.raises(Refused, match=rf"{shown}: no manifest names it"):
            run(cache)
    assert [bad.file for bad in verify(cache) if "no manifest names it" in bad.reason] == [shown]


def test_what_a_late_worker_leaves_is_reported_by_verify_removed_by_gc_and_keeps_nobody_from_reading(
    tmp_path: Path,
) -> None:
    cache = small_cache.copied(tmp_path)
    loose = cache / "documents/00001-0123456789ab.arrow"
    loose.write_text("late")
    os.utime(loose, (time.time() - 3600,) * 2)
    (cache / "documents/.tmp-1-a").touch()

    assert len(Table(cache, "documents")) == 12
    assert [bad.file for bad in verify(cache)] == ["documents/00001-0123456789ab.arrow"]
    COMMANDS["gc"](cache)
    assert verify(cache) == []


@pytest.mark.parametrize("command", ["gc", "gc --dry-run", "repair", "verify"])
def test_a_folder_that_is_not_there_or_no_cache_is_left_as_it_is(tmp_path: Path, command: str) -> None:
    mine = tmp_path / "mine/documents/00000-0123456789ab.arrow"
    mine.parent.mkdir(parents=True)
    mine.write_text("of somebody else")
    os.utime(mine, (0, 0))

    for folder, said in (("mistyped", "is not a folder"), ("mine", "mine is no cache: it holds no table")):
        with pytest.raises(InputMissing, match=said):
            COMMANDS[command](tmp_path / folder)
    assert {path for path in tmp_path.rglob("*") if path.name == "LOCK" or path.is_file()} == {mine}


def test_a_manifest_vouches_for_names_of_its_own_table_alone(tmp_path: Path) -> None:
    cache = small_cache.copied(tmp_path)
    files = json.loads((cache / "teachers/T/manifest.json").read_text())["files"]
    (cache / "documents" / next(iter(files))).write_text("{}")

    with pytest.raises(Refused, match="no manifest names it"):
        Table(cache, "documents")

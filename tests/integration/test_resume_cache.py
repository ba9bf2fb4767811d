"""A whole cache that was damaged, half made or interrupted becomes the cache of an undisturbed run, byte for byte."""

from collections.abc import Callable
from pathlib import Path

import pytest

import small_cache
from damages import flipped
from small_cache import IN_PROCESS, files_of, run_file
from xkd_pipeline.stages import align_stage, documents_stage, teacher_stage
from xkd_schemas.config import RunConfig


def source_run(root: Path) -> RunConfig:
    source = small_cache.made()
    return run_file(
        root,
        documents={"corpus": [str(source / "corpus.jsonl")]},
        teacher={"model": str(source / "teacher")},
        student={"tokenizer": str(source / "student")},
    )


def flip(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(flipped(content, 4 * len(content)))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "shards": lambda c: [flip(next(c.glob(f"{t}/00001-*.arrow"))) for t in ("documents", "teachers/T", "students/S")],
    "manifests": lambda c: [path.write_bytes(b"") for path in c.rglob("manifest.json")],
    "head": lambda c: flip(c / "teachers/T/head.safetensors"),
    "embeddings": lambda c: (c / "teachers/T/embeddings.safetensors").unlink(),
    "student tokenizer": lambda c: (c / "students/S/tokenizer/tokenizer.json").write_text("{}"),
    "sums and card": lambda c: [(c / name).unlink() for name in ("SHA256SUMS", "README.md")],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_running_the_commands_again_mends_a_damaged_cache(tmp_path: Path, damage: str) -> None:
    cache = small_cache.copied(tmp_path)
    before = files_of(cache)
    DAMAGES[damage](cache)
    assert files_of(cache) != before

    for stage in (documents_stage, teacher_stage, align_stage):
        stage(source_run(cache), IN_PROCESS)

    assert files_of(cache) == before


def test_a_cache_that_is_whole_is_not_written_to(tmp_path: Path) -> None:
    cache = small_cache.copied(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in cache.rglob("*") if path.name != "LOCK"}

    made = [
        stage(source_run(cache), IN_PROCESS).values["made"] for stage in (documents_stage, teacher_stage, align_stage)
    ]

    assert made == [0, 0, 0]
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*") if path.name != "LOCK"} == before


@pytest.mark.parametrize("part", ["manifest.json", "commits/00001.json"])
def test_a_damaged_record_of_one_table_does_not_stop_the_command_that_makes_another(tmp_path: Path, part: str) -> None:
    cache = small_cache.copied(tmp_path)
    before = files_of(cache)
    (cache / "teachers" / "T" / part).write_bytes(b"{")

    again = [stage(source_run(cache), IN_PROCESS).values["made"] for stage in (documents_stage, teacher_stage)]

    assert again == [0, 0 if part == "manifest.json" else 1]
    assert files_of(cache) == before

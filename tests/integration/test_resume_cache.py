"""The commands of a finished cache again: what is whole is left alone. test_store and test_repair have damages."""

from pathlib import Path

import pytest

import small_cache
from small_cache import IN_PROCESS, files_of, whole_run
from xkd_pipeline.stages import align_stage, documents_stage, teacher_stage


def test_a_cache_that_is_whole_is_not_written_to(tmp_path: Path) -> None:
    cache = small_cache.copied(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in cache.rglob("*") if path.name != "LOCK"}

    made = [
        stage(whole_run(cache), IN_PROCESS).values["made"] for stage in (documents_stage, teacher_stage, align_stage)
    ]

    assert made == [0, 0, 0]
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*") if path.name != "LOCK"} == before


@pytest.mark.parametrize("part", ["manifest.json", "commits/00001.json"])
def test_a_damaged_record_of_one_table_does_not_stop_the_command_that_makes_another(tmp_path: Path, part: str) -> None:
    cache = small_cache.copied(tmp_path)
    before = files_of(cache)
    (cache / "teachers" / "T" / part).write_bytes(b"{")

    again = [stage(whole_run(cache), IN_PROCESS).values["made"] for stage in (documents_stage, teacher_stage)]

    assert again == [0, 0 if part == "manifest.json" else 1]
    assert files_of(cache) == before

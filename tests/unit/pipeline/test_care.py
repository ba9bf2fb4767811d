"""Units that cannot be made as planned: rows left out, smaller batches, and what record, line and table say of it."""

import shutil
from pathlib import Path

import pytest
import torch

import small_cache
from fake_stage import FakeStage
from small_cache import IN_PROCESS, files_of, whole_run
from xkd_pipeline.capture import stage as capturing
from xkd_pipeline.capture.capture import capture
from xkd_pipeline.capture.stage import add_signals
from xkd_pipeline.maintain.verify import verify
from xkd_pipeline.stages import align_stage, documents_stage, teacher_stage
from xkd_pipeline.tables.writer import Store
from xkd_pipeline.workers.contract import Make
from xkd_pipeline.workers.scheduler import make_shards
from xkd_schemas.cache.manifest import Commit, MadeDifferently, read_record
from xkd_schemas.cache.table import Table
from xkd_schemas.config import RunConfig
from xkd_schemas.errors import BadData, OutOfMemory
from xkd_schemas.signals import Signal

CARE = {1: MadeDifferently(lost=(2,), batch=1)}


def begun(tmp_path: Path, *parts: str, **documents: object) -> tuple[Path, RunConfig]:
    """A finished cache without these tables."""
    cache = small_cache.copied(tmp_path)
    for part in parts:
        shutil.rmtree(cache / part)
    return cache, whole_run(cache, documents=documents)


def needing(monkeypatch: pytest.MonkeyPatch, cares: dict[int, MadeDifferently]) -> None:
    small_cache.made()  # before anything is patched
    monkeypatch.setattr(Store, "cares", lambda _store, _units: cares)


def records(folder: Path) -> list[Commit]:
    return [read_record(path, Commit) for path in sorted((folder / "commits").glob("*.json"))]


def test_a_row_that_kills_the_parser_is_a_reject_and_counts_as_one(tmp_path: Path, monkeypatch) -> None:
    needing(monkeypatch, CARE)
    cache, run = begun(tmp_path, "documents", "teachers", "students", max_reject=0.1)

    said = documents_stage(run, IN_PROCESS, lambda _line: None)

    (file,) = (cache / "documents/rejects").glob("*.jsonl")
    assert '"line": 7, "reason": "worker_killed"' in file.read_text()
    assert "ends the process that reads or parses it, every time" in file.read_text()
    assert "11 documents" in said.line
    assert "1 rows rejected" in said.line
    assert "1 for want of memory in batches down to 1" in said.line
    assert [record.care for record in records(cache / "documents")] == [None, CARE[1], None]
    assert verify(cache, "deep") == []

    _, run = begun(tmp_path / "strict", "documents", "teachers", "students")
    with pytest.raises(BadData, match=r"1 of 8 rows cannot be used \(worker_killed 1\), more than --max-reject 0.01"):
        documents_stage(run, IN_PROCESS, lambda _line: None)


def test_a_document_that_kills_the_teacher_has_no_tokens_and_the_student_knows(tmp_path: Path, monkeypatch) -> None:
    needing(monkeypatch, CARE)
    cache, run = begun(tmp_path, "teachers", "students")

    said = teacher_stage(run, IN_PROCESS)
    monkeypatch.undo()
    align_stage(run, IN_PROCESS)

    teacher, student = Table(cache, "teachers/T"), Table(cache, "students/S")
    assert [row["status"] for row in (teacher[6], teacher[5], student[6])] == [
        "worker_killed", "ok", "teacher:worker_killed"
    ]  # fmt: skip
    assert (len(teacher[6]["token_ids"]), len(teacher[5]["token_ids"]) > 0) == (0, True)
    assert "documents not used or cut: 1 worker_killed" in said.line
    assert records(cache / "teachers/T")[1].unusable == (2,)
    more = "T", str(small_cache.made() / "teacher"), lambda _: [Signal("logsumexp")], {}, IN_PROCESS
    add_signals(cache, *more)
    (cache / "signals/T.1/manifest.json").unlink()  # begun, not finished: it goes on
    assert (add_signals(cache, *more).manifest.table, add_signals(cache, *more)) == ("signals/T.1", None)
    assert [len(Table(cache, "signals/T.1")[at]["logsumexp"]) > 0 for at in (5, 6, 7)] == [True, False, True]
    assert verify(cache, "deep") == []


def test_a_document_that_kills_the_aligner_is_a_row_without_tokens(tmp_path: Path, monkeypatch) -> None:
    needing(monkeypatch, CARE)
    cache, run = begun(tmp_path, "students")

    align_stage(run, IN_PROCESS)

    ours, theirs = Table(cache, "students/S"), Table(small_cache.made() / "cache", "students/S")
    assert ours[6]["status"] == "worker_killed"
    for at in (4, 5, 7, 11):
        assert all((ours[at][name] == theirs[at][name]) is True or (ours[at][name] == theirs[at][name]).all()
                   for name in ours.shard(0).schema.names)  # fmt: skip
    assert verify(cache, "deep") == []


def test_documents_and_students_are_the_same_in_any_batches(tmp_path: Path, monkeypatch) -> None:
    needing(monkeypatch, {unit: MadeDifferently(batch=batch) for unit, batch in enumerate((1, 2, 3))})
    cache, run = begun(tmp_path, "documents", "students")

    documents_stage(run, IN_PROCESS, lambda _line: None)
    align_stage(run, IN_PROCESS)

    whole = files_of(small_cache.made() / "cache")
    assert {n for n, content in files_of(cache).items() if n.endswith(".arrow") and whole.get(n) != content} == set()


def test_a_shard_that_needed_care_is_made_so_again_after_damage(tmp_path: Path, monkeypatch) -> None:
    needing(monkeypatch, CARE)
    cache, run = begun(tmp_path, "teachers", "students")
    teacher_stage(run, IN_PROCESS)
    monkeypatch.undo()
    before = files_of(cache)
    (shard,) = (cache / "teachers/T").glob("00001-*.arrow")
    shard.write_bytes(shard.read_bytes()[:-1])

    assert teacher_stage(run, IN_PROCESS).values["made"] == 1

    assert files_of(cache) == before


def test_memory_that_runs_out_here_is_answered_by_smaller_batches(tmp_path: Path, monkeypatch, capsys) -> None:
    cache, run = begun(tmp_path, "teachers", "students")

    def hungry(model, readings, wanted, settings, *more):
        if settings.batch_tokens > 100:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB")
        return capture(model, readings, wanted, settings, *more)

    monkeypatch.setattr(capturing, "capture", hungry)
    said = teacher_stage(run, IN_PROCESS)

    assert [record.care for record in records(cache / "teachers/T")] == 3 * [MadeDifferently(batch=64)]
    assert said.values["smaller_batches"] == 3
    assert "3 for want of memory in batches down to 64" in said.line
    warned = "shard 0: CUDA out of memory. Tried to allocate 9.00 GiB; trying again in batches of 64"
    assert warned in capsys.readouterr().err
    assert verify(cache, "deep") == []


def test_a_model_that_does_not_fit_is_out_of_memory_and_no_traceback(tmp_path: Path) -> None:
    class Huge(FakeStage):
        def load(self) -> Make:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory")

    with pytest.raises(OutOfMemory, match=r"loading: .*DefaultCPUAllocator.*Next: use a smaller model"):
        make_shards(Huge(folder=tmp_path), [0], IN_PROCESS, lambda _commit: None)

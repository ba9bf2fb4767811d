"""Signals beside a teacher's table: read as if they had been captured with it, and the old bytes as they were."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import small_cache
from small_cache import IN_PROCESS, files_of
from xkd_pipeline.capture.capture import capture
from xkd_pipeline.capture.stage import add_signals
from xkd_pipeline.cli.app import app
from xkd_pipeline.maintain.recompute import Recomputed, recompute
from xkd_pipeline.maintain.verify import verify
from xkd_pipeline.reports.report import write_report
from xkd_pipeline.tables.writer import Store
from xkd_schemas.cache.table import Table
from xkd_schemas.errors import InputMissing, Mismatch, UsageError
from xkd_schemas.signals import Signal, signal_named
from xkd_trainer.data.cache import Cache
from xkd_trainer.data.collate import batch_of


def teacher() -> Path:
    return small_cache.made() / "teacher"


def test_a_command_line_that_asks_for_nothing_or_for_documents_is_a_usage_error(tmp_path: Path) -> None:
    cache = small_cache.copied(tmp_path)
    before = files_of(cache)
    for words, message in (
        (["--documents", "more.jsonl"], r"does not grow.*second cache.*xkd-train --shards a/ --shards b/"),
        (["--signals", "entropy"], "read from a teacher"),
        (["--model", str(teacher())], "no signal is named"),
        (["--signals", "entropies", "--model", str(teacher())], "signal 'entropies' is not known"),
        (["--for", "dwa", "--model", str(teacher()), "--set", "teacher.topk=0"], "topk"),
    ):
        with pytest.raises(UsageError, match=message):
            app(["add", str(cache), *words], standalone_mode=False)
    with pytest.raises(InputMissing, match=r"is not a folder"):
        app(["add", str(tmp_path / "nothing")], standalone_mode=False)
    assert files_of(cache) == before


def ends_the_run() -> None:
    raise KeyboardInterrupt


def entropy_doubled(*given: Any) -> list[dict[str, Any]]:
    (row,) = capture(*given)
    return [row | {"entropy": 2 * row["entropy"]}]


def test_signals_beside_a_teacher_are_read_as_if_they_had_been_captured_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_cache.without_entropy(tmp_path, teacher={"codec": "int8"})
    cache = tmp_path / "cache"
    before = files_of(cache)
    wanted = [signal_named(c) for c in ("entropy", "hidden_last", "span_vectors@2:word", "span_mass@2:word")]

    with monkeypatch.context() as patch:
        patch.setattr(Store, "commit", lambda store, one, real=Store.commit: real(store, one) or ends_the_run())
        with pytest.raises(KeyboardInterrupt):
            add_signals(cache, "T", str(teacher()), lambda _layers: wanted, {"codec": "bf16"}, IN_PROCESS)
    built = add_signals(cache, "T", str(teacher()), lambda _layers: wanted, {"codec": "bf16"}, IN_PROCESS)

    assert (built.manifest.table, built.made, built.kept) == ("signals/T.1", 2, 1)
    assert built.manifest.spec["signals"] == ["entropy", "span_mass@2:word", "span_vectors@2:word"]
    assert add_signals(cache, "T", str(teacher()), lambda _layers: wanted, {}, IN_PROCESS) is None
    after = files_of(cache)
    assert {name for name in before if before[name] != after[name]} == {"README.md", "SHA256SUMS"}
    assert "token_ids" not in Table(cache, "signals/T.1").shard(0).schema.names
    assert recompute(cache, "teachers/T", str(teacher()), 4) == Recomputed(
        bad=[], rows=4, skipped=["hidden_last"], dtype="float32"
    )
    with monkeypatch.context() as patch:
        patch.setattr("xkd_pipeline.maintain.recompute.capture", entropy_doubled)
        bad = recompute(cache, "teachers/T", str(teacher()), 1).bad
    assert [(one.table, one.unit) for one in bad] == [("signals/T.1", 0)]
    assert "entropy differs by 1.000" in bad[0].reason
    whole = Table(small_cache.made() / "cache", "teachers/T")
    joined = Cache(cache, student="S")
    for row in range(12):
        for column in ("entropy", "span_vectors@2:word", "span_mass@2:word", "token_ids"):
            assert np.array_equal(joined.teachers[row][column], whole[row][column]), (row, column)
    assert verify(cache, "deep") == []
    assert write_report(cache, tmp_path / "report.html")["tables"] == 4

    signals = frozenset({Signal("entropy"), Signal("hidden_last")})
    batch, fresh = (
        batch_of(Cache(root, student="S"), [3, 11], signals) for root in (cache, small_cache.made() / "cache")
    )
    assert torch.equal(batch.teacher_entropy_BM, fresh.teacher_entropy_BM)


def test_signals_of_another_teacher_are_refused(tmp_path: Path) -> None:
    cache = small_cache.copied(tmp_path)
    before = files_of(cache)
    other = small_cache.llama(tmp_path / "other", seed=5)

    with pytest.raises(Mismatch, match=r"weights.model.safetensors: cache has"):
        add_signals(cache, "T", str(other), lambda _layers: [Signal("hidden", 2)], {}, IN_PROCESS)
    assert files_of(cache) == before

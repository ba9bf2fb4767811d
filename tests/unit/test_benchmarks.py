"""The arithmetic of the benchmarks on tiny sizes: what is compared is the same work, and bars are read the right way.

Nothing here asserts a time.
"""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import (
    bench_alignment,
    bench_capture,
    bench_kl,
    bench_memory,
    bench_signals,
    bench_size,
    bench_softdtw,
    bench_step,
    measure,
)
from benchmarks.__main__ import main
from benchmarks.measure import forget_peak, in_subprocess, interleaved, peak_bytes
from benchmarks.pair import Pair, Shape, made, wanted_signals
from benchmarks.rows import Row, Skipped, as_json, cost, memory, table
from xkd_pipeline.capture.capture import TeacherSettings
from xkd_pipeline.capture.stage import encoder_of, teacher_of
from xkd_pipeline.tables.read_units import document_at
from xkd_schemas.cache.table import Table
from xkd_schemas.config import StudentSection
from xkd_schemas.tokens import OK, predictors
from xkd_trainer.data.cache import Cache
from xkd_trainer.data.collate import batch_of
from xkd_trainer.models.head import Head

LINUX = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are read from /proc")


def multiplications(work: Any) -> int:
    """Floating point operations of the matrix products of a call."""
    with FlopCounterMode(display=False) as counter:
        work()
    return int(counter.get_total_flops())


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return made(tmp_path_factory.mktemp("pair"), Shape().small())


# rows


@pytest.mark.parametrize(
    ("ratio", "bar", "at_least", "met"),
    [
        (1.2, 1.25, False, True), (1.25, 1.25, False, True), (1.3, 1.25, False, False),
        (6.0, 6.0, True, True), (5.9, 6.0, True, False), (9.0, None, False, None),
        (float("nan"), 1.0, False, False), (float("nan"), 1.0, True, False),
    ],
)  # fmt: skip
def test_a_bar_is_met_from_its_own_side_only(
    ratio: float, bar: float | None, at_least: bool, met: bool | None
) -> None:
    row = Row(what="a / b", ratio=ratio, bar=bar, at_least=at_least, ours=1.0, theirs=1.0, unit="s")

    assert row.met is met
    assert as_json("name", row)["met"] is met


def test_ratios_are_ours_over_theirs_and_raw_figures_have_their_unit() -> None:
    time, size = cost("t", 0.5, 0.25, bar=1.5), memory("m", 2 * 2**20, 8 * 2**20, bar=0.25)

    assert (time.ratio, time.ours, time.theirs, time.unit, time.met) == (2.0, 500.0, 250.0, "ms", False)
    assert (size.ratio, size.ours, size.theirs, size.unit, size.met) == (0.25, 2.0, 8.0, "MiB", True)


def test_the_table_says_met_not_met_no_bar_and_why_a_row_is_missing() -> None:
    rows = [cost("a", 1.0, 1.0, bar=1.5), cost("b", 2.0, 1.0, bar=1.5), cost("c", 2.0, 1.0)]

    lines = table([*rows, Skipped(what="d", why="no such package")]).splitlines()

    assert [line.split()[0] for line in lines] == ["a", "b", "c", "d"]
    assert "met      1e+03 / 1e+03 ms" in lines[0]
    assert "NOT MET" in lines[1]
    assert "printed, no bar" in lines[2]
    assert lines[3].endswith("skipped: no such package")


# measuring


def test_the_least_of_the_rounds_counts_without_the_first_and_rounds_are_interleaved(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock, order = [0.0], []
    costs = {"a": iter([0.1, 5.0, 3.0, 4.0]), "b": iter([9.0, 2.0, 8.0, 1.5])}
    monkeypatch.setattr(measure, "time", SimpleNamespace(process_time=lambda: clock[0]))

    def call(name: str) -> None:
        order.append(name)
        clock[0] += next(costs[name])

    best = interleaved({"a": lambda: call("a"), "b": lambda: call("b")}, 3)

    assert best == {"a": pytest.approx(3.0), "b": pytest.approx(1.5)}
    assert order == ["a", "b"] * 4


@LINUX
def test_a_peak_is_remembered_until_it_is_forgotten() -> None:
    before = forget_peak()
    block = np.ones(64 * 2**20, np.uint8)
    peak = peak_bytes()
    del block

    assert peak - before > 60 * 2**20
    assert peak_bytes() > peak - 2**20  # the kernel counts pages in batches
    assert forget_peak() < peak - 30 * 2**20


def test_a_failing_subprocess_is_an_error_that_shows_what_it_said() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)-m json.tool nowhere.json ended with [12].*nowhere.json"):
        in_subprocess("json.tool", "nowhere.json")


# soft-DTW


def test_costs_of_every_kind_have_the_shape_and_squared_distances_grow_off_the_path() -> None:
    costs = bench_softdtw.costs_of(2, 24)

    assert {tuple(c.shape) for c in costs.values()} == {(2, 24, 24)}
    near = costs["squared distance"].diagonal(dim1=1, dim2=2).mean()
    far = costs["squared distance"][:, 0, -1].mean()
    assert far > near
    torch.testing.assert_close(costs["squared distance / width"] * bench_softdtw.WIDTH, costs["squared distance"])


def test_the_error_is_that_of_float32_against_float64() -> None:
    error, largest = bench_softdtw.gradient_error(torch.rand(2, 24, 24, generator=torch.Generator().manual_seed(0)))

    assert 0.0 < error < 1e-5
    assert largest == pytest.approx(1.0, abs=1e-2)  # the corner is on every path


def test_peers_that_are_not_installed_are_skipped_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_softdtw, "peers_here", dict)

    results = bench_softdtw.against_peers(torch.rand(1, 6, 6), 1)

    assert [type(r) for r in results] == [Skipped, Skipped]
    assert "pip install -e '.[bench]'" in table(results)


def test_a_peer_counts_how_many_times_slower_it_is_and_only_if_it_computes_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ours = bench_softdtw.ours
    seconds = {"ours": 0.002, "pysdtw": 0.014}
    monkeypatch.setattr(bench_softdtw, "interleaved", lambda _calls, _repeats: seconds)

    monkeypatch.setattr(bench_softdtw, "peers_here", lambda: {"pysdtw": ours})
    row = bench_softdtw.against_peers(torch.rand(1, 6, 6), 1)[0]

    assert isinstance(row, Row)
    assert (round(row.ratio, 6), row.met, row.at_least, row.ours, row.theirs) == (7.0, True, True, 14.0, 2.0)

    monkeypatch.setattr(bench_softdtw, "peers_here", lambda: {"pysdtw": lambda cost: 2.0 * ours(cost)})
    with pytest.raises(AssertionError, match="pysdtw computes something else"):
        bench_softdtw.against_peers(torch.rand(1, 6, 6), 1)


@pytest.mark.parametrize("name", ["pysdtw", "tslearn"])
def test_a_peer_that_is_installed_computes_what_ours_does(name: str) -> None:
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")

    (value,) = bench_softdtw.peers_here()[name](cost := torch.rand(1, 6, 6))

    assert float(value) == pytest.approx(float(bench_softdtw.ours(cost)), abs=1e-4)


# KL


@pytest.mark.parametrize("space", bench_kl.SPACES)
def test_plain_and_our_kl_are_the_same_loss_with_the_same_gradients(space: str) -> None:
    found = {}
    for form in bench_kl.FORMS:
        student, teacher = bench_kl.inputs(space, (5, 40, 8))
        loss = bench_kl.loss_of(form, student, teacher)
        loss.backward()
        found[form] = (loss.detach(), student.hidden.grad, student.weight.grad)

    torch.testing.assert_close(found["ours"][:2], found["plain"][:2])
    assert (found["ours"][2] is None) == (space == "teacher")
    if space == "student":
        torch.testing.assert_close(found["ours"][2], found["plain"][2])
    assert found["plain"][0] > 0


def test_compiled_rows_and_torch_rows_do_the_same() -> None:
    calls = bench_kl.row_calls(3, 70)

    for name in ("forward KL", "cross-entropy", "entropy and peak"):
        torch.testing.assert_close(calls[name](), calls[f"{name} torch"]())
        assert calls[name]().shape == (3,)


@LINUX
def test_the_memory_of_the_plain_form_is_counted_beyond_the_inputs() -> None:
    tokens, classes, width = 64, 16_384, 16

    found = in_subprocess("benchmarks.bench_kl", "teacher", "plain", tokens, classes, width)

    logits = tokens * classes * 4
    assert 3 * logits < found["peak"] < 12 * logits
    assert found["cpu"] > 0


# signals


def test_the_products_are_those_that_the_signals_cannot_avoid() -> None:
    batch, length, width = 2, 24, 16
    inputs = bench_signals.inputs(batch, length, width)

    whole = multiplications(lambda: bench_signals.signals(*inputs))
    products = multiplications(lambda: bench_signals.products(inputs[0], inputs[2].shape[1]))

    assert whole - products == 2 * batch * length * length  # the mean over rows, one product with a vector
    assert bench_signals.products(inputs[0], inputs[2].shape[1]).shape == bench_signals.signals(*inputs).shape


# step


def test_the_unavoidable_products_are_three_heads_two_of_them_there_and_back(pair: Pair) -> None:
    step = bench_step.Step(pair, bench_step.ALL, 3)
    head, theirs = step.ready.distiller.student.get_output_embeddings().weight, step.ready.cache.head().weight_VD
    students, teachers = int(step.batch.predict_valid_BN.sum()), int(step.batch.teacher_predict_valid_BM.sum())

    found = [multiplications(bench_step.unavoidable(step, size)) for size in (1, *bench_step.CHUNKS)]

    assert students > 0
    assert found == [2 * (2 * students * head.numel() + 3 * teachers * theirs.numel())] * 3


def test_both_steps_train_on_the_same_documents_with_all_terms_on(pair: Pair) -> None:
    full, plain = (bench_step.Step(pair, loss, 3) for loss in (bench_step.ALL, "ce=1"))

    first, second = full(), full()

    assert full.rows == plain.rows == [0, 1, 2]
    assert np.isfinite([first, second, plain()]).all()
    assert first != second  # the step updates the student
    factors = [full.ready.distiller.loss(name).weights(bench_step.LATE) for name in ("mta", "sra", "dwa")]
    assert all((factor > 0) != name.startswith("spans") for loss in factors for name, factor in loss.items()), factors
    assert (plain.batch.teacher_hidden_BRD is None, full.batch.teacher_hidden_BRD is None) == (True, False)


# capture


class Listener:
    """A model that remembers which ids it was given."""

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def __call__(self, *, input_ids: torch.Tensor, use_cache: bool) -> None:
        assert not use_cache
        self.seen.append(input_ids)


def test_the_bare_loop_reads_every_token_of_every_document_once(pair: Pair) -> None:
    settings = TeacherSettings(model=pair.teacher, dtype="float32", template=pair.template, batch_tokens=256)
    documents = Table(pair.cache, "documents")
    readings = bench_capture.readings_of([documents[i] for i in range(6)], encoder_of(settings))
    model: Any = Listener()

    bench_capture.forward_loop(model, readings, settings)

    assert len(model.seen) > 1
    assert all(batch.numel() <= 256 and batch.shape[1] % settings.pad_multiple == 0 for batch in model.seen)
    seen = sorted(int(i) for batch in model.seen for i in batch.flatten() if i)
    assert seen == sorted(int(i) for r in readings for i in r.tokens.ids if i)
    assert all(len(r.ranges["word"]) > 5 and len(r.ranges["phrase"]) > 1 for r in readings)


def test_the_logits_of_a_capture_are_those_of_its_predictions(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = TeacherSettings(model=pair.teacher, dtype="float32", template=pair.template, batch_tokens=256)
    documents = Table(pair.cache, "documents")
    readings = bench_capture.readings_of([documents[i] for i in range(6)], encoder_of(settings))
    model, asked = teacher_of(settings), list[int]()
    plain = bench_capture.head_of(model)
    monkeypatch.setattr(Head, "__call__", lambda _self, states_ND: asked.append(len(states_ND)))

    monkeypatch.setattr(bench_capture, "LOGIT_BYTES", 4 * len(plain.weight_VD) * 7)
    bench_capture.logits_loop(model, readings, settings)()

    assert sum(asked) == sum(len(predictors(r.tokens.targets)) for r in readings)
    assert max(asked) == 7


def test_captured_are_the_signals_of_all_three_methods(pair: Pair) -> None:
    names = {s.name for s in wanted_signals(4)}

    assert names == {
        "argmax", "attention_text", "entropy", "hidden_last", "span_geometry", "span_mass", "span_vectors"
    }  # fmt: skip
    stored = Table(pair.cache, "teachers/teacher").manifest.spec["signals"]
    assert stored == [s.column for s in wanted_signals(4)]


# alignment


def test_glued_documents_hold_the_same_text_words_and_phrases_in_two_segments(pair: Pair) -> None:
    documents = Table(pair.cache, "documents")
    rows = [documents[i] for i in range(5)]

    (long,) = bench_alignment.glued(rows, 10_000)

    parts = [[r["text"][slice(*r["segments"][n])] + " " for r in rows] for n in (0, 1)]
    assert long["text"] == "".join(parts[0] + parts[1])
    assert bench_alignment.texts_of([long]) == ["".join(parts[0]), "".join(parts[1])]
    for name in ("words", "phrases"):
        cut = sorted(r["text"][a:b] for r in rows for a, b in r[name])
        assert sorted(long["text"][a:b] for a, b in long[name]) == cut
    settings = StudentSection(tokenizer=pair.tokenizer, template=pair.template)
    assert settings.encoder().encode(document_at(long)).status == OK


def test_gluing_stops_at_the_wanted_length_and_loses_no_document(pair: Pair) -> None:
    documents = Table(pair.cache, "documents")
    rows = [documents[i] for i in range(12)]

    long = bench_alignment.glued(rows, 400)

    assert len(long) > 2
    assert all(400 <= len(row["text"]) < 400 + 200 + 6 for row in long[:-1])
    assert sum(len(row["words"]) for row in long) == sum(len(row["words"]) for row in rows)


# size


def test_bytes_a_token_are_those_of_the_written_shards_and_of_the_naive_cache(pair: Pair) -> None:
    row = bench_size.by_a_run(pair, Shape().small())

    shards = list((pair.cache / "teachers" / "four").glob("*.arrow"))
    teacher = Table(pair.cache, "teachers/four")
    tokens = sum(len(r["token_ids"]) for r in teacher)
    assert row.ours == sum(path.stat().st_size for path in shards) / tokens
    assert row.theirs == 2 * (4 * 64 + 2_000)
    assert len({s.layer for s in bench_size.signals(4) if s.layer}) == 4


def test_the_arithmetic_at_the_shape_of_the_run_is_what_the_run_wrote(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = bench_size.by_a_run(pair, Shape().small())
    monkeypatch.setattr(bench_size, "WIDTH", 64)

    assert bench_size.by_arithmetic(pair).ours == pytest.approx(real.ours, rel=0.06)  # without headers and footers


# memory


def test_a_repeated_cache_holds_the_same_documents_again_and_trains(pair: Pair, tmp_path: Path) -> None:
    target = bench_memory.repeated(pair.cache, tmp_path / "large", 3)

    small, large = (Cache(root, student="student") for root in (pair.cache, target))
    size = len(small.documents)
    assert len(large.documents) == len(large.teachers) == len(large.students) == 3 * size
    wanted = frozenset(small.signals)
    first, again = (batch_of(large, [row], wanted) for row in (1, 2 * size + 1))
    assert torch.equal(first.student_ids_BS, again.student_ids_BS)
    assert first.teacher_hidden_BRD is not None
    assert torch.equal(first.teacher_hidden_BRD, batch_of(small, [1], wanted).teacher_hidden_BRD)
    assert torch.equal(large.head().weight_VD, small.head().weight_VD)


# command line


def test_an_unknown_name_and_an_incomplete_demo_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["sgnals"])
    assert "'sgnals' is no benchmark; there are capture, alignment" in capsys.readouterr().err

    with pytest.raises(SystemExit, match="2"):
        main(["signals", "--demo", str(tmp_path)])
    assert f"{tmp_path} does not hold teacher, tokenizer, cache" in capsys.readouterr().err


def test_json_is_one_object_a_row(capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["signals", "--quick", "--json"])

    (row,) = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert code == 0
    assert row["benchmark"] == "signals"
    assert row["bar"] == 1.5
    assert row["ratio"] == pytest.approx(row["ours"] / row["theirs"])


def test_a_missed_bar_is_code_0_and_a_crash_is_code_1_after_the_others_have_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    missed, broken = ModuleType("benchmarks.bench_signals"), ModuleType("benchmarks.bench_kl")
    missed.run = lambda _options: [cost("slow", 9.0, 1.0, bar=1.5)]  # type: ignore[attr-defined]
    broken.run = lambda _options: 1 / 0  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "benchmarks.bench_signals", missed)
    monkeypatch.setitem(sys.modules, "benchmarks.bench_kl", broken)

    assert main(["signals"]) == 0
    assert main(["kl", "signals"]) == 1

    shown = capsys.readouterr()
    assert shown.out.count("NOT MET") == 2
    assert "kl crashed:" in shown.err
    assert "ZeroDivisionError" in shown.err

"""ULD against loops over sorted floats, its gradients, its approximation by the k largest, and some steps of it."""

import functools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import slow_ot
import tiny_models as tiny
from one_step import gradients
from slow_losses import generator
from xkd_pipeline.stages import align_stage, teacher_stage
from xkd_pipeline.workers.contract import Workers
from xkd_schemas.cache.table import Table
from xkd_schemas.errors import UsageError
from xkd_trainer.data.batch import blank
from xkd_trainer.data.collate import batch_of
from xkd_trainer.losses.baselines.uld import head_sorted_l1, sorted_l1, sorted_teacher, topk_teacher
from xkd_trainer.losses.declaration import describe_loss
from xkd_trainer.losses.ops import lazy_logits
from xkd_trainer.losses.ops.lazy_logits import LazyLogits
from xkd_trainer.losses.pairing import find_pairs
from xkd_trainer.losses.registry import loss_named
from xkd_trainer.training.loop import train
from xkd_trainer.training.prepare import Ready, set_up

ROWS = (3, 19, 0, 11)


def lazy(seed: int, positions: int, classes: int) -> LazyLogits:
    g = generator(seed)
    hidden = torch.randn(positions, 3, generator=g, dtype=torch.float64)
    return LazyLogits(hidden=hidden, weight=2 * torch.randn(classes, 3, generator=g, dtype=torch.float64))


@given(
    st.integers(0, 2**31), st.integers(0, 9), st.integers(1, 12), st.integers(1, 12), st.sampled_from((0.5, 1.0, 2.0))
)
def test_the_sum_in_chunks_is_the_loop_over_sorted_classes(
    seed: int, positions: int, student_classes: int, teacher_classes: int, temperature: float
) -> None:
    student, teacher = lazy(seed, positions, student_classes), lazy(seed + 1, positions, teacher_classes)
    weights = torch.rand(positions, generator=generator(seed), dtype=torch.float64)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lazy_logits, "CHUNK_BYTES", 150)
        found = head_sorted_l1(student, sorted_teacher(teacher, temperature), weights, temperature)

    rows = zip(student.dense().tolist(), teacher.dense().tolist(), weights.tolist(), strict=True)
    expected = math.fsum(w * slow_ot.uld([([s], [t])], temperature, "tokens")[0] for s, t, w in rows)
    assert float(found) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("classes", [(6, 4), (4, 6), (5, 5)])
def test_gradients_by_states_and_head_are_numerically_right(classes: tuple[int, int]) -> None:
    student, teacher = lazy(3, 4, classes[0]), sorted_teacher(lazy(4, 4, classes[1]), 1.5)
    weights = torch.tensor([1.0, 0.0, 2.0, 0.5], dtype=torch.float64)

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return head_sorted_l1(LazyLogits(hidden=hidden, weight=weight), teacher, weights, 1.5)

    inputs = (student.hidden.clone().requires_grad_(), student.weight.clone().requires_grad_())
    assert torch.autograd.gradcheck(loss, inputs)


def test_only_the_student_gets_a_gradient() -> None:
    teacher_logits = torch.randn(2, 5, requires_grad=True)
    student_logits = torch.randn(2, 4, requires_grad=True)

    sorted_l1(student_logits, teacher_logits.softmax(-1)).sum().backward()

    assert teacher_logits.grad is None
    assert float(student_logits.grad.abs().sum()) > 0


@given(st.integers(0, 2**31), st.integers(2, 12))
def test_classes_in_another_order_are_no_difference(seed: int, classes: int) -> None:
    logits = torch.randn(3, classes, generator=generator(seed), dtype=torch.float64)
    shuffled = logits[:, torch.randperm(classes, generator=generator(seed))]

    found = sorted_l1(logits, shuffled.softmax(-1).sort(-1, descending=True).values)

    assert float(found.abs().max()) < 1e-12


@pytest.mark.parametrize("value", [0.0, 1e4, -1e4])
def test_equal_and_huge_logits_are_finite(value: float) -> None:
    logits = torch.full((2, 5), value)
    logits[1, 0] = 3e4
    logits.requires_grad_()

    loss = sorted_l1(logits, torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0]])).sum()
    loss.backward()

    assert bool(torch.isfinite(loss))
    assert bool(torch.isfinite(logits.grad).all())


@given(st.integers(0, 2**31), st.integers(1, 20), st.integers(1, 20))
def test_what_the_k_largest_leave_out_bounds_their_error(seed: int, kept: int, student_classes: int) -> None:
    teacher, student = lazy(seed, 5, 20), lazy(seed + 1, 5, student_classes).dense()
    logits = teacher.dense()
    largest = logits.topk(kept, dim=-1).values

    exact = sorted_l1(student, sorted_teacher(teacher, 1.0)(slice(0, 5)))
    known = topk_teacher(largest, logits.logsumexp(-1))(slice(0, 5))
    approximate = sorted_l1(student, known)

    tail = 1.0 - known.sum(-1)
    assert bool(((exact - approximate).abs() <= tail + 1e-12).all())
    if kept == 20:
        torch.testing.assert_close(approximate, exact, rtol=0, atol=1e-12)


# Wired to the cache


@functools.cache
def topk_cache() -> tiny.Tiny:
    """The tiny cache captured again for uld with teacher = topk, k 7."""
    t = tiny.Tiny(tiny.tiny_cache().root.parent / "topk")
    t.root.mkdir(exist_ok=True)
    source = tiny.tiny_cache()
    t.teacher, t.student, t.corpus = source.teacher, source.student, source.corpus
    run = t.run(losses={"uld": {"teacher": "topk"}}, teacher__losses=["uld"], teacher__topk=7)
    tiny.documents_stage(run, Workers(count=0))
    teacher_stage(run, Workers(count=0))
    align_stage(run, Workers(count=0))
    return t


def ready(cache: tiny.Tiny, **settings: Any) -> Ready:
    return set_up(cache.run(loss="ce=0+uld=2", losses={"uld": settings}), "")


def predictions(made: Ready, row: int) -> tuple[list[list[float]], list[list[float]]]:
    """Logits of both models at their predictions, from the tables' own rows."""
    student, teacher = made.cache.students[row], made.cache.teachers[row]
    model = tiny.llama("sentencepiece", seed=2)
    with torch.no_grad():
        own = model(input_ids=torch.tensor([student["token_ids"].tolist()])).logits[0]
    bits = torch.from_numpy(teacher["hidden_last"].astype("int32")) << 16
    targets = teacher["targets"]
    kept = [p for p in range(len(targets)) if targets[p] or (p + 1 < len(targets) and targets[p + 1])]
    states = bits.view(torch.float32)[[i for i, p in enumerate(kept) if p + 1 < len(targets) and targets[p + 1]]]
    positions = [p for p in range(len(student["targets"]) - 1) if student["targets"][p + 1]]
    return own[positions].tolist(), (states @ made.cache.head().weight_VD.float().T).tolist()


@pytest.mark.parametrize("mean", ["tokens", "documents"])
def test_the_term_is_the_loop_over_predictions_of_single_documents(mean: str) -> None:
    made = ready(tiny.tiny_cache(), mean=mean)
    batch = batch_of(made.cache, ROWS, made.wanted)

    loss = value(made, batch, {"uld.l1": torch.ones(())})

    total, count = slow_ot.uld([predictions(made, row) for row in ROWS], 1.0, mean)
    assert loss == pytest.approx(total, rel=2e-4)
    assert float(made.distiller.counts(batch)["uld.l1"]) == count


@torch.no_grad()
def value(made: Ready, batch: Any, counts: Any) -> float:
    return float(made.distiller(batch, counts, 0)[0])


@pytest.mark.parametrize("settings", [{}, {"mean": "documents"}, {"teacher": "topk"}])
def test_micro_batches_add_up_and_blank_ones_add_nothing(settings: dict[str, str]) -> None:
    made = ready(topk_cache() if "teacher" in settings else tiny.tiny_cache(), **settings)
    whole = batch_of(made.cache, ROWS, made.wanted)
    counts = made.distiller.counts(whole)
    cut = [batch_of(made.cache, [row], made.wanted) for row in ROWS]

    expected, one = gradients(made.distiller, [whole], counts)
    found, many = gradients(made.distiller, [*cut, blank(whole)], counts)

    assert expected > 0
    assert found == pytest.approx(expected, rel=1e-5)
    for name in one:
        scale = max(1.0, float(one[name].abs().max()))
        torch.testing.assert_close(many[name] / scale, one[name] / scale, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("short", ["predict_valid_BN", "teacher_predict_valid_BM"])
def test_a_pair_needs_a_prediction_of_both_models(short: str) -> None:
    made = ready(tiny.tiny_cache())
    batch = batch_of(made.cache, ROWS, made.wanted)
    cut = getattr(batch, short).clone()
    cut[:, 2:] = False

    found = find_pairs(replace(batch, **{short: cut}))

    assert found.sum(-1).tolist() == [2] * len(ROWS)


def test_padding_changes_no_bit() -> None:
    made = ready(tiny.tiny_cache())
    batch = batch_of(made.cache, ROWS, made.wanted)
    counts = made.distiller.counts(batch)
    n, m, r = batch.predict_valid_BN, batch.teacher_predict_valid_BM, batch.teacher_valid_BR
    dirty = replace(
        batch,
        student_ids_BS=batch.student_ids_BS.masked_fill(~batch.student_valid_BS, 77),
        predict_BN=batch.predict_BN.masked_fill(~n, 2),
        teacher_predict_BM=batch.teacher_predict_BM.masked_fill(~m, 1),
        teacher_hidden_BRD=batch.teacher_hidden_BRD.masked_fill(~r[..., None], math.nan),
    )
    assert not n.all()
    assert not m.all()

    clean, slopes = gradients(made.distiller, [batch], counts)
    found, others = gradients(made.distiller, [dirty], counts)

    assert found == clean
    assert all(torch.equal(slopes[name], others[name]) for name in slopes)


def test_the_cache_of_the_k_largest_says_its_k_and_stays_within_the_bound() -> None:
    made, exact = ready(topk_cache(), teacher="topk"), ready(tiny.tiny_cache())
    table = Table(topk_cache().cache, "teachers/teacher")
    assert table.manifest.spec["signals"] == ["argmax", "logsumexp", "topk_logits#7"]

    batch, full = (batch_of(m.cache, ROWS, m.wanted) for m in (made, exact))
    found = value(made, batch, {"uld.approximate_l1": torch.ones(())})
    expected = value(exact, full, {"uld.l1": torch.ones(())})

    known = (batch.teacher_topk_logits_BMK - batch.teacher_logsumexp_BM[..., None]).exp().sum(-1)
    tail = float((1.0 - known)[batch.teacher_predict_valid_BM].sum())
    assert 0 < abs(found - expected) <= tail
    assert tail > 0.1


def test_the_approximation_is_called_one_wherever_terms_and_losses_are_listed() -> None:
    made = ready(topk_cache(), teacher="topk")

    assert list(made.distiller.counts(batch_of(made.cache, ROWS, made.wanted))) == ["uld.approximate_l1"]
    assert "teacher = topk is an approximation" in describe_loss(loss_named("uld"))["source"]


def test_more_classes_than_the_teacher_has_are_refused_before_anything_is_made() -> None:
    t = topk_cache()
    run = t.run(losses={"uld": {"teacher": "topk"}}, teacher__losses=["uld"], teacher__topk=10**6, teacher__name="big")

    with pytest.raises(UsageError, match=r"topk is 1000000, .* has \d+ classes. Next: --topk \d+ at most"):
        teacher_stage(run, Workers(count=0))
    assert not (t.cache / "teachers" / "big").exists()


def test_a_cache_without_the_k_largest_is_refused_by_name() -> None:
    with pytest.raises(UsageError, match=r"loss uld needs logsumexp, topk_logits, which .* does not hold"):
        ready(tiny.tiny_cache(), teacher="topk")


def test_topk_has_no_other_temperature_than_its_own() -> None:
    with pytest.raises(UsageError, match="teacher = topk is stored for temperature 1 only"):
        ready(topk_cache(), teacher="topk", temperature=2.0)


@pytest.mark.parametrize("teacher", ["exact", "topk"])
def test_a_student_learns_from_it(tmp_path: Path, teacher: str) -> None:
    cache = tiny.tiny_cache() if teacher == "exact" else topk_cache()
    run = cache.run(
        loss="ce=0+uld=2", losses={"uld": {"teacher": teacher}}, out=str(tmp_path / "out"), steps=6, lr=1e-2
    )
    made = ready(cache, teacher=teacher)
    batch = batch_of(made.cache, tuple(range(12)), made.wanted)
    counts = made.distiller.counts(batch)
    before = value(made, batch, counts)

    trained = train(run, student_table="", quiet=True)

    assert trained.steps == 6
    after = set_up(
        cache.run(loss="ce=0+uld=2", losses={"uld": {"teacher": teacher}}, student__model=str(trained.out)), ""
    )
    assert value(after, batch, counts) < before

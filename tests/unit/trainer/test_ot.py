"""ULD and MultiLevelOT against loops, their gradients, and ULD's approximation by the k largest."""

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import one_tokenizer as one
import slow_ot
import tiny_models as tiny
from slow_losses import generator, mask
from xkd_pipeline.stages import teacher_stage
from xkd_pipeline.workers.contract import Workers
from xkd_schemas.errors import UsageError
from xkd_trainer.data.collate import batch_of
from xkd_trainer.losses.baselines.multilevelot import (
    MultiLevelOt,
    MultiLevelOtSettings,
    chosen_probabilities,
    scale_logits,
)
from xkd_trainer.losses.baselines.uld import SortedTeacher, sorted_l1, sorted_teacher
from xkd_trainer.losses.declaration import describe_loss
from xkd_trainer.losses.ops import lazy_logits
from xkd_trainer.losses.ops.lazy_logits import LazyLogits, chunked_sum
from xkd_trainer.losses.ops.term import LossTerm
from xkd_trainer.losses.pairing import find_pairs
from xkd_trainer.losses.registry import loss_named


def lazy(seed: int, positions: int, classes: int) -> LazyLogits:
    g = generator(seed)
    hidden = torch.randn(positions, 3, generator=g, dtype=torch.float64)
    return LazyLogits(hidden=hidden, weight=2 * torch.randn(classes, 3, generator=g, dtype=torch.float64))


def summed(student: LazyLogits, teacher: SortedTeacher, weights: Tensor, temperature: float) -> Tensor:
    return chunked_sum(lambda rows, logits: sorted_l1(logits, teacher(rows), temperature), student, weights)


@pytest.mark.parametrize("classes", [(6, 4), (4, 6), (5, 5)])
def test_uld_has_the_right_gradients_by_states_and_head(classes: tuple[int, int]) -> None:
    student, teacher = lazy(3, 4, classes[0]), sorted_teacher(lazy(4, 4, classes[1]), 1.5)
    weights = torch.tensor([1.0, 0.0, 2.0, 0.5], dtype=torch.float64)

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return summed(LazyLogits(hidden=hidden, weight=weight), teacher, weights, 1.5)

    inputs = (student.hidden.clone().requires_grad_(), student.weight.clone().requires_grad_())
    assert torch.autograd.gradcheck(loss, inputs)


@pytest.mark.parametrize("mean", ["tokens", "documents"])
def test_the_term_is_the_loop_over_predictions_of_single_documents(mean: str) -> None:
    made, _ = one.ready("uld", table=one.OTHER, mean=mean, temperature=2.0)
    rows = one.ROWS[:2]  # the loop sorts all classes in Python
    documents = [tuple(logits.tolist() for logits in one.logits_of(made, row)[:2]) for row in rows]

    found = one.terms_of(made.distiller, batch_of(made.cache, rows, made.wanted))["l1"]

    one.assert_term(found, *slow_ot.uld(documents, 2.0, mean))


@pytest.mark.parametrize("short", ["predict_valid_BN", "teacher_predict_valid_BM"])
def test_a_pair_needs_a_prediction_of_both_models(short: str) -> None:
    _, batch = one.ready("uld")
    cut = getattr(batch, short).clone()
    cut[:, 2:] = False

    found = find_pairs(replace(batch, **{short: cut}))

    assert found.sum(-1).tolist() == [2] * len(one.ROWS)


def test_the_k_largest_stay_within_the_bound_of_what_they_leave_out_and_are_called_an_approximation() -> None:
    (made, batch), (exact, full) = (one.ready("uld", table=one.OTHER, teacher=kind) for kind in ("topk", "exact"))

    found = float(one.terms_of(made.distiller, batch)["approximate_l1"].total.detach())
    expected = float(one.terms_of(exact.distiller, full)["l1"].total.detach())

    known = (batch.teacher_topk_logits_BMK - batch.teacher_logsumexp_BM[..., None]).exp().sum(-1)
    tail = float((1.0 - known)[batch.teacher_predict_valid_BM].sum())
    assert 0 < abs(found - expected) <= tail
    assert tail > 0.1
    assert "teacher = topk is an approximation" in describe_loss(loss_named("uld"))["source"]


def test_more_classes_than_the_teacher_has_are_refused_before_anything_is_made() -> None:
    t = tiny.tiny_cache()
    run = t.run(losses={"uld": {"teacher": "topk"}}, teacher__losses=["uld"], teacher__topk=10**6, teacher__name="big")

    with pytest.raises(UsageError, match=r"topk is 1000000, .* has \d+ classes. Next: --topk \d+ at most"):
        teacher_stage(run, Workers(count=0))
    assert not (t.cache / "teachers" / "big").exists()


def test_topk_has_no_other_temperature_than_its_own() -> None:
    with pytest.raises(UsageError, match="teacher = topk is stored for temperature 1 only"):
        one.ready("uld", table=one.OTHER, teacher="topk", temperature=2.0)


# MultiLevelOT

Sides = list[list[Tensor]]
"""States of each document, of the student and of the teacher."""


def draw(seed: int, sizes: Sequence[tuple[int, int]], vocabularies: tuple[int, int]) -> tuple[Sides, list[Tensor]]:
    """Ragged documents of random states, and two float64 heads."""
    g = generator(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    states = [[random(n, 3) for n in side] for side in zip(*sizes, strict=True)]
    return states, [2 * random(v, 3) for v in vocabularies]


def terms(states: Sides, heads: Sequence[Tensor], how: MultiLevelOtSettings) -> dict[str, LossTerm]:
    """The terms of the n-th states of both models, in every document as many as both have."""
    counts = [min(map(len, pair)) for pair in zip(*states, strict=True)]
    logits = [
        LazyLogits(hidden=torch.cat([d[:n] for d, n in zip(side, counts, strict=True)]), weight=head)
        for side, head in zip(states, heads, strict=True)
    ]
    loss: Any = SimpleNamespace(settings=how)
    return MultiLevelOt.levels(loss, *logits, mask(counts))


documents = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=4)
choices = st.builds(
    MultiLevelOtSettings, temperature=st.sampled_from((1.0, 2.0)), classes=st.integers(1, 12),
    order=st.sampled_from(("document", "batch")), match=st.sampled_from(("rank", "greedy")),
    word_target=st.sampled_from(("teacher", "student")), epsilon=st.sampled_from((0.1, 0.5)), rounds=st.integers(1, 4),
    max_positions=st.sampled_from((2, 1024)),
)  # fmt: skip


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**31), documents, st.integers(2, 9), st.integers(2, 9), choices)
def test_ragged_batches_are_the_equations_of_single_documents(
    seed: int, sizes: list[tuple[int, int]], student_classes: int, teacher_classes: int, how: MultiLevelOtSettings
) -> None:
    states, heads = draw(seed, sizes, (student_classes, teacher_classes))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lazy_logits, "CHUNK_BYTES", 150)
        found = terms(states, heads, how)

    sides = [[s @ head.T for s in side] for side, head in zip(states, heads, strict=True)]
    expected = slow_ot.multilevelot(list(zip(*sides, strict=True)), how)
    for name, (total, count) in expected.items():
        assert float(found[name].total) == pytest.approx(total, abs=1e-6), name
        assert float(found[name].count) == count, name


@pytest.mark.parametrize("match", ["rank", "greedy"])
def test_multilevelot_has_the_right_gradients_by_states_and_head(match: Any) -> None:
    (student, teacher), (weight, other) = draw(5, [(3, 2), (2, 4)], (6, 5))
    how = MultiLevelOtSettings(match=match, classes=4)

    def total(weight: Tensor, *student: Tensor) -> Tensor:
        found = terms([[*student], teacher], (weight, other), how)
        return torch.stack([found[name].total for name in ("l1", "word", "sequence")]).sum()

    assert torch.autograd.gradcheck(total, [x.requires_grad_() for x in (weight, *student)])


def test_equal_logits_are_finite() -> None:
    hidden = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.ones(5, 3, dtype=torch.float64, requires_grad=True)
    logits = LazyLogits(hidden=hidden, weight=weight)

    chosen = chosen_probabilities(logits, torch.tensor([[0, 1], [2, 3]]), 1.0)
    chosen.sum().backward()

    torch.testing.assert_close(chosen, torch.full((2, 2), 0.2, dtype=torch.float64))
    assert bool(torch.isfinite(hidden.grad).all() and torch.isfinite(weight.grad).all())
    assert bool(torch.isfinite(scale_logits(torch.tensor([[1e4, -1e4, 0.0]]), 1.0)).all())


def test_the_wired_terms_are_the_equations_of_single_documents() -> None:
    made, _ = one.ready("multilevelot", table=one.OTHER, classes=20)
    rows = one.ROWS[:2]
    pairs = [one.logits_of(made, row)[:2] for row in rows]

    found = one.terms_of(made.distiller, batch_of(made.cache, rows, made.wanted))

    for name, (total, count) in slow_ot.multilevelot(pairs, MultiLevelOtSettings(classes=20)).items():
        one.assert_term(found[name], total, count, rel=1e-3)

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

import slow_dwa as slow
from xkd_trainer.losses.dual_space import align_scores, attend, projected_cross_entropy, student_space, teacher_space
from xkd_trainer.losses.dwa import (
    DwaSettings,
    alignment,
    anneal,
    band,
    sequence_term,
    student_weights,
    teacher_weights,
)
from xkd_trainer.losses.ops.lazy_logits import LazyLogits
from xkd_trainer.losses.ops.term import LossTerm

Order = Literal["gate_before", "gate_after"]
ORDERS: tuple[Order, Order] = ("gate_before", "gate_after")
F64 = torch.float64
SEEDS = st.integers(0, 2**31)
SIZES = st.lists(st.integers(0, 5), min_size=1, max_size=4)
PAIRS = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=4)
"""Lengths of both sides of each document."""


def draw(seed: int, *shape: int, grad: bool = False) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64).requires_grad_(grad)


def lazy(seed: int, *shape: int, classes: int = 7, grad: bool = False) -> LazyLogits:
    """Student-width states and head; both learn if `grad`."""
    return LazyLogits(hidden=draw(seed, *shape, grad=grad), weight=draw(seed + 100, classes, shape[-1], grad=grad))


def valid_of(*lengths: int) -> Tensor:
    return torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


def rows(x: Tensor, valid: Tensor) -> list[list[Any]]:
    return [a[v].tolist() for a, v in zip(x, valid, strict=True)]


# weights


@pytest.mark.parametrize("order", ORDERS)
@hypothesis_settings(max_examples=25, deadline=None)
@given(seed=SEEDS, sizes=SIZES)
def test_student_weights_agree_with_the_equations(order: Order, seed: int, sizes: list[int]) -> None:
    valid = valid_of(*sizes)
    entropy, gate = draw(seed, *valid.shape).abs(), draw(seed + 1, *valid.shape).sigmoid()

    weights = student_weights(entropy, gate, valid, order)

    assert not weights[~valid].any()
    for got, h, g in zip(rows(weights, valid), rows(entropy, valid), rows(gate, valid), strict=True):
        assert got == pytest.approx(slow.student_weights(h, g, order))
    if order == "gate_before":
        torch.testing.assert_close(weights.sum(-1), valid.sum(-1).to(F64))


@hypothesis_settings(max_examples=25, deadline=None)
@given(seed=SEEDS, sizes=SIZES)
def test_teacher_weights_agree_with_the_equation_and_sum_to_the_number_of_tokens(seed: int, sizes: list[int]) -> None:
    valid = valid_of(*sizes)
    entropy = 2.1 * draw(seed, *valid.shape).sigmoid()  # below log 9

    weights = teacher_weights(entropy, 9, valid)

    assert not weights[~valid].any()
    torch.testing.assert_close(weights.sum(-1), valid.sum(-1).to(F64))
    for got, h in zip(rows(weights, valid), rows(entropy, valid), strict=True):
        assert got == pytest.approx(slow.teacher_weights(h, 9))


def test_weights_are_constants_and_padding_is_not_read() -> None:
    valid, entropy, gate = valid_of(3, 1), draw(0, 2, 3, grad=True), draw(1, 2, 3, grad=True)
    entropy_, gate_ = entropy.detach().abs(), gate.detach().abs()

    def all_weights() -> list[Tensor]:
        both = [student_weights(entropy_, gate_, valid, order) for order in ORDERS]
        return [*both, teacher_weights(entropy_, 5, valid)]

    before = all_weights()
    entropy_[~valid], gate_[~valid] = math.nan, 9.0
    after = all_weights()

    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    for weights in (student_weights(entropy, gate, valid, "gate_after"), teacher_weights(entropy, 5, valid)):
        assert not weights.requires_grad


def test_a_document_with_nothing_to_weigh_has_weights_of_zero() -> None:
    valid, zeros, full = valid_of(3, 0), torch.zeros(2, 3), torch.full((2, 3), math.log(5.0) + 1.0)

    assert not student_weights(zeros, torch.ones(2, 3), valid, "gate_before").any()
    assert not student_weights(torch.ones(2, 3), zeros, valid, "gate_before").any()
    assert not student_weights(zeros, torch.ones(2, 3), valid, "gate_after").any()
    assert not teacher_weights(full, 5, valid).any()


# token level


def token_terms(
    seed: int = 0, sizes: Sequence[tuple[int, int]] = ((4, 5), (2, 1), (1, 3))
) -> tuple[LazyLogits, LazyLogits, LazyLogits, LazyLogits, Tensor, Tensor]:
    """Student, projected teacher [B, N, .]; projected student, teacher [B, M, .]; masks of both sides."""
    valid, teacher_valid = (valid_of(*side) for side in zip(*sizes, strict=True))
    student, to_student = (lazy(seed + n, *valid.shape, 6, grad=True) for n in (0, 1))
    to_student = replace(to_student, weight=student.weight)
    teacher = lazy(seed + 2, *teacher_valid.shape, 8, classes=9)
    to_teacher = lazy(seed + 3, *teacher_valid.shape, 8, classes=9, grad=True)
    return student, to_student, replace(to_teacher, weight=teacher.weight), teacher, valid, teacher_valid


@hypothesis_settings(max_examples=25, deadline=None)
@given(seed=SEEDS, sizes=PAIRS)
def test_the_three_token_terms_agree_with_loops(seed: int, sizes: list[tuple[int, int]]) -> None:
    student, to_student, to_teacher, teacher, valid, teacher_valid = token_terms(seed, sizes)
    weights, teacher_weight = draw(seed + 5, *valid.shape).abs(), draw(seed + 6, *teacher_valid.shape).abs()
    target = torch.randint(0, 7, valid.shape, generator=torch.Generator().manual_seed(1))
    settings, count = DwaSettings(temperature=1.5), valid.sum()

    got = (
        projected_cross_entropy(to_student, target, valid),
        student_space(student, to_student, weights, valid, settings),
        teacher_space(to_teacher, teacher, teacher_weight, teacher_valid, settings, count=count),
    )

    expected = [0.0, 0.0, 0.0]
    for b, n in torch.nonzero(valid).tolist():
        logits, projected = student.dense()[b, n].tolist(), to_student.dense()[b, n].tolist()
        expected[0] += slow.cross_entropy(projected, int(target[b, n]))
        expected[1] += float(weights[b, n]) * slow.forward_kl(projected, logits, 1.5)
    for b, m in torch.nonzero(teacher_valid).tolist():
        pair = teacher.dense()[b, m].tolist(), to_teacher.dense()[b, m].tolist()
        expected[2] += float(teacher_weight[b, m]) * slow.forward_kl(*pair, 1.5)
    assert [term.total.item() for term in got] == pytest.approx(expected, rel=1e-10, abs=1e-10)
    assert [term.count.item() for term in got] == [float(valid.sum())] * 3


def test_each_space_takes_its_own_divergence() -> None:
    student, to_student, to_teacher, teacher, valid, teacher_valid = token_terms()
    ones, teacher_ones = torch.ones(3, 4), torch.ones(3, 5)

    def totals(settings: DwaSettings) -> tuple[float, float]:
        first = student_space(student, to_student, ones, valid, settings)
        second = teacher_space(to_teacher, teacher, teacher_ones, teacher_valid, settings, count=valid.sum())
        return first.total.item(), second.total.item()

    plain, changed = totals(DwaSettings()), totals(DwaSettings(student_divergence="skewed_reverse_kl"))

    assert plain[0] != changed[0]
    assert plain[1] == changed[1]


def grads(term: LossTerm, *tensors: Tensor) -> list[bool]:
    """Which tensors a term sends a gradient to that is not zero."""
    found = torch.autograd.grad(term.total, tensors, allow_unused=True)
    return [g is not None and bool(g.any()) for g in found]


def test_student_space_teaches_the_student_and_not_the_projectors() -> None:
    student, to_student, _, _, valid, _ = token_terms()
    weights = torch.ones(3, 4, requires_grad=True)

    term = student_space(student, to_student, weights, valid, DwaSettings())

    assert grads(term, student.hidden, student.weight, to_student.hidden, weights) == [True, True, False, False]


def test_projected_cross_entropy_teaches_the_projectors_and_not_a_detached_head() -> None:
    student, to_student, _, _, valid, _ = token_terms()
    fixed = replace(to_student, weight=student.weight.detach())

    term = projected_cross_entropy(fixed, torch.zeros(3, 4, dtype=torch.int64), valid)

    assert grads(term, to_student.hidden, student.weight) == [True, False]


def test_teacher_space_teaches_student_and_projector_and_needs_no_gradient_of_the_teacher() -> None:
    _, _, to_teacher, _, valid, teacher_valid = token_terms()
    teacher = lazy(7, 3, 5, 8, classes=9, grad=True)
    to_teacher = replace(to_teacher, weight=teacher.weight.detach())

    term = teacher_space(to_teacher, teacher, torch.ones(3, 5), teacher_valid, DwaSettings(), count=valid.sum())

    assert grads(term, to_teacher.hidden, teacher.hidden, teacher.weight) == [True, False, False]


def test_token_terms_pass_gradcheck() -> None:
    student, to_student, to_teacher, teacher, valid, teacher_valid = token_terms()
    settings, target = DwaSettings(), torch.zeros(3, 4, dtype=torch.int64)
    constant = replace(to_student, hidden=to_student.hidden.detach().clone())  # gradcheck moves its inputs

    def loss(own: Tensor, projected: Tensor, back: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return (
            student_space(replace(student, hidden=own), constant, torch.ones(3, 4), valid, settings).total,
            projected_cross_entropy(replace(to_student, hidden=projected), target, valid).total,
            teacher_space(
                replace(to_teacher, hidden=back), teacher, torch.ones(3, 5), teacher_valid, settings, count=valid.sum()
            ).total,
        )

    assert torch.autograd.gradcheck(loss, (student.hidden, to_student.hidden, to_teacher.hidden))


def test_padding_of_the_token_terms_changes_no_bit_of_value_or_gradient() -> None:
    student, to_student, to_teacher, teacher, valid, teacher_valid = token_terms()
    target = torch.ones(3, 4, dtype=torch.int64)

    def results() -> list[Tensor]:
        settings, ones = DwaSettings(), torch.ones(3, 5, dtype=F64)
        terms = (
            projected_cross_entropy(to_student, target, valid),
            student_space(student, to_student, ones[:, :4], valid, settings),
            teacher_space(to_teacher, teacher, ones, teacher_valid, settings, count=valid.sum()),
        )
        tensors = (student.hidden, student.weight, to_student.hidden, to_teacher.hidden)
        total = torch.stack([term.total for term in terms]).sum()
        return [*(term.total for term in terms), *torch.autograd.grad(total, tensors)]

    before = results()
    with torch.no_grad():
        for logits in (student, to_student):
            logits.hidden[~valid] = math.nan
        for logits in (to_teacher, teacher):
            logits.hidden[~teacher_valid] = math.inf
        target[~valid] = -100
    after = results()

    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_sums_and_counts_do_not_depend_on_how_the_batch_is_cut() -> None:
    student, to_student, to_teacher, teacher, valid, teacher_valid = token_terms()
    weights, x, y = draw(5, 3, 5).abs(), draw(8, 3, 4, 6), draw(9, 3, 5, 6)
    lengths, teacher_lengths = valid.sum(-1), teacher_valid.sum(-1)
    attention = attend(align_scores(x, y, valid, teacher_valid), "teacher")
    settings = DwaSettings(band_width=0.5)

    def terms(r: slice) -> list[LossTerm]:
        wall = band(attention[r], lengths[r], teacher_lengths[r], settings)
        return [
            projected_cross_entropy(to_student.at(r), torch.ones(3, 4, dtype=torch.int64)[r], valid[r]),
            student_space(student.at(r), to_student.at(r), weights[r, :4], valid[r], settings),
            teacher_space(
                to_teacher.at(r), teacher.at(r), weights[r], teacher_valid[r], settings, count=valid[r].sum()
            ),
            sequence_term(x[r], y[r], wall, lengths[r], teacher_lengths[r], gamma=2.0, divergence=True),
        ]

    for whole, first, second in zip(terms(slice(0, 3)), terms(slice(0, 1)), terms(slice(1, 3)), strict=True):
        torch.testing.assert_close(whole.total, first.total + second.total)
        assert whole.count == first.count + second.count == 7.0


def test_a_batch_without_response_tokens_gives_zero_terms_with_finite_gradients() -> None:
    student, to_student, to_teacher, teacher, valid, teacher_valid = token_terms()
    valid, teacher_valid = valid & False, teacher_valid & False
    none = torch.zeros(3, dtype=torch.int64)

    terms = (
        projected_cross_entropy(to_student, torch.zeros(3, 4, dtype=torch.int64), valid),
        student_space(student, to_student, torch.ones(3, 4), valid, DwaSettings()),
        teacher_space(to_teacher, teacher, torch.ones(3, 5), teacher_valid, DwaSettings(), count=valid.sum()),
        sequence_term(student.hidden, draw(3, 3, 5, 6), None, none, none, gamma=1.0, divergence=True),
    )

    assert [(term.total.item(), term.count.item()) for term in terms] == [(0.0, 0.0)] * 4
    tensors = (student.hidden, to_student.hidden, to_teacher.hidden)
    total = torch.stack([term.total for term in terms]).sum()
    assert not any(g.any() for g in torch.autograd.grad(total, tensors))


# sequence level


@pytest.mark.parametrize("kind", ["soft", "hard", "none"])
@pytest.mark.parametrize("divergence", [True, False])
@hypothesis_settings(max_examples=15, deadline=None)
@given(seed=SEEDS, sizes=PAIRS)
def test_the_sequence_term_agrees_with_loops(
    kind: Literal["soft", "hard", "none"], divergence: bool, seed: int, sizes: list[tuple[int, int]]
) -> None:
    lengths, teacher_lengths = torch.tensor(sizes).unbind(-1)
    valid, teacher_valid = (valid_of(*side.tolist()) for side in (lengths, teacher_lengths))
    x, y = draw(seed, *valid.shape, 4), draw(seed + 1, *teacher_valid.shape, 4)
    attention = attend(align_scores(x, y, valid, teacher_valid), "teacher")
    settings = DwaSettings(band=kind, band_width=1.0, band_beta=0.1)
    wall = band(attention, lengths, teacher_lengths, settings)

    term = sequence_term(x, y, wall, lengths, teacher_lengths, gamma=2.0, divergence=divergence)

    expected = 0.0
    for b, (s, t) in enumerate(sizes):
        if not s * t:
            continue
        own, other = x[b, :s].tolist(), y[b, :t].tolist()
        cost = torch.tensor(slow.cosine_cost(own, other), dtype=F64)
        if kind == "soft":
            cost += torch.tensor(slow.band(attention[b, :s, :t].tolist(), 1.0, 0.1, 0.7, 1.0), dtype=F64)
        if kind == "hard":
            reach = max(1.0, t / s)
            cost += torch.tensor(
                [
                    [math.inf if abs(j - i * t / s) > reach + 1e-9 else 0.0 for j in range(1, t + 1)]
                    for i in range(1, s + 1)
                ]
            )
        expected += slow.soft_dtw(cost.tolist(), 2.0)[0]
        if divergence:
            expected -= sum(slow.soft_dtw(slow.cosine_cost(z, z), 2.0)[0] for z in (own, other)) / 2
    assert term.total.item() == pytest.approx(expected, rel=1e-9, abs=1e-9)
    assert term.count.item() == float(lengths.sum())


@hypothesis_settings(max_examples=15, deadline=None)
@given(seed=SEEDS, sizes=PAIRS, gamma=st.sampled_from((0.5, 2.0)))
def test_the_alignment_that_a_band_follows_is_the_share_of_all_paths(
    seed: int, sizes: list[tuple[int, int]], gamma: float
) -> None:
    lengths, teacher_lengths = torch.tensor(sizes).unbind(-1)
    valid, teacher_valid = (valid_of(*side.tolist()) for side in (lengths, teacher_lengths))
    x, y = draw(seed, *valid.shape, 4, grad=True), draw(seed + 1, *teacher_valid.shape, 4)
    with torch.no_grad():
        x[~valid] = math.nan

    found = alignment(x, y, lengths, teacher_lengths, gamma=gamma)

    assert not found.requires_grad
    for b, (s, t) in enumerate(sizes):
        assert not found[b, s:].any()
        assert not found[b, :, t:].any()
        if s * t:
            cost = slow.cosine_cost(x[b, :s].tolist(), y[b, :t].tolist())
            visits = slow.soft_dtw_by_paths(cost, gamma)[1]
            expected = [[v / sum(row) for v in row] for row in visits]
            torch.testing.assert_close(found[b, :s, :t], torch.tensor(expected, dtype=F64))


def test_the_sequence_term_teaches_student_and_projector_and_not_through_the_band() -> None:
    x, y, lengths = draw(0, 1, 6, 4, grad=True), draw(1, 1, 6, 4, grad=True), torch.tensor([6])
    attention = draw(2, 1, 6, 6, grad=True).softmax(-1)
    wall = band(attention, lengths, lengths, DwaSettings(band_width=0.1, band_beta=0.0))
    assert wall is not None
    leaf = (wall + 0.0).requires_grad_()

    term = sequence_term(x, y, leaf, lengths, lengths, gamma=2.0, divergence=True)

    assert grads(term, x, y, leaf) == [True, True, False]
    assert not wall.requires_grad


def test_the_sequence_term_passes_gradcheck() -> None:
    x, y = draw(0, 2, 4, 3, grad=True), draw(1, 2, 5, 3, grad=True)
    lengths, teacher_lengths = torch.tensor([4, 2]), torch.tensor([3, 5])

    def loss(a: Tensor, b: Tensor) -> Tensor:
        return sequence_term(a, b, None, lengths, teacher_lengths, gamma=0.5, divergence=True).total

    assert torch.autograd.gradcheck(loss, (x, y))


def test_padding_of_the_sequences_changes_no_bit_of_value_or_gradient() -> None:
    x, y = draw(0, 2, 6, 4, grad=True), draw(1, 2, 5, 4, grad=True)
    lengths, teacher_lengths = torch.tensor([6, 2]), torch.tensor([3, 5])

    def results() -> list[Tensor]:
        total = sequence_term(x, y, None, lengths, teacher_lengths, gamma=2.0, divergence=True).total
        return [total, *torch.autograd.grad(total, (x, y))]

    before = results()
    with torch.no_grad():
        x[1, 2:], y[0, 3:] = math.nan, -math.inf
    after = results()

    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert not after[1][1, 2:].any()


def test_a_sequence_against_itself_and_zero_vectors_are_fine() -> None:
    x, lengths = draw(0, 2, 6, 4), torch.tensor([6, 1])
    zeros = torch.zeros(2, 6, 4, dtype=F64, requires_grad=True)

    same = sequence_term(x, x, None, lengths, lengths, gamma=2.0, divergence=True)
    empty = sequence_term(zeros, x, None, lengths, lengths, gamma=2.0, divergence=True)

    assert same.total.item() == 0.0
    (gradient,) = torch.autograd.grad(empty.total, zeros)
    assert empty.total.isfinite()
    assert gradient.isfinite().all()


# settings


def test_defaults_are_those_of_the_paper_and_the_scripts() -> None:
    s = DwaSettings()

    assert (s.kd, s.dtw, s.temperature, s.gamma, s.gamma_steps) == (0.5, 0.2, 2.0, 2.0, 0)
    assert s.band_source == "cma"
    assert (s.band, s.band_width, s.band_beta, s.band_centre_mix, s.band_penalty) == ("soft", 5.0, 2.0, 0.7, 1.0)
    assert (s.student_space.kind, s.teacher_space.kind, s.student_weight) == (
        "forward_kl",
        "forward_kl",
        "gate_before",
    )
    assert (s.student_space.temperature, s.skew, s.adaptive_alpha) == (2.0, 0.1, 0.5)
    assert (s.gate_warmup_steps, s.dtw_warmup_steps, s.band_warmup_steps) == (0, 0, 0)
    assert (s.dtw_divergence, s.entropy_weights, s.gate) == (True, True, True)


@pytest.mark.parametrize(
    "wrong",
    [{"gama": 1.0}, {"gamma": 0.0}, {"temperature": -1.0}, {"skew": 1.0}, {"band": "wide"}, {"band_width": math.inf},
     {"student_divergence": "kl"}, {"gamma_steps": -1}, {"band_centre_mix": 1.5}, {"dtw": math.nan}],
)  # fmt: skip
def test_settings_refuse_unknown_names_and_numbers_out_of_range(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        DwaSettings.model_validate(wrong)


def test_gamma_goes_linearly_from_start_to_end_and_stays() -> None:
    settings = DwaSettings(gamma_steps=100)

    assert [settings.gamma_at(step) for step in (0, 50, 100, 10**6)] == pytest.approx([2.0, 1.4, 0.8, 0.8])
    assert [DwaSettings().gamma_at(step) for step in (0, 10**6)] == [2.0, 2.0]
    assert anneal(3, 1.0, 5.0, 4) == 4.0

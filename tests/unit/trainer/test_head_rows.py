"""Rows of float32 logits against the equations in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from xkd_trainer.losses.divergence import divergence
from xkd_trainer.losses.head_rows import (
    Comparison,
    Scratch,
    cross_entropy_rows,
    divergence_rows,
    parts,
    statistics_rows,
)

ROUNDING = 2.0**-23
shapes = st.tuples(st.integers(1, 5), st.sampled_from([1, 2, 3, 17, 64, 1025]), st.sampled_from([0.0, 1.0, 30.0, 1e4]))


def drawn(shape: tuple[int, int, float], seed: int) -> Tensor:
    """Float32 logits [P, V] of that spread about a mean that is far from 0."""
    rows, classes, spread = shape
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, classes, generator=generator) * spread + 50.0 * torch.randn(rows, 1, generator=generator)


@settings(max_examples=60, deadline=None)
@given(shape=shapes, seed=st.integers(0, 99), temperature=st.sampled_from([0.7, 1.0, 2.0, 3.0]))
def test_forward_kl_and_its_gradient_are_those_of_double_precision(
    shape: tuple[int, int, float], seed: int, temperature: float
) -> None:
    student_PV, teacher_PV = drawn(shape, seed), drawn(shape, seed + 100)
    factor_P1 = torch.linspace(0.0, 2.0, shape[0])[:, None]
    leaf_PV = student_PV.double().requires_grad_()
    wide_P = divergence(leaf_PV, teacher_PV.double(), "forward_kl", temperature=temperature)
    (wide_PV,) = torch.autograd.grad(wide_P, leaf_PV, grad_outputs=factor_P1[:, 0].double())
    # below the largest logit by this much at most: what a difference of logits is rounded at
    reach = float(max((x.amax(-1) - x.amin(-1)).max() for x in (student_PV, teacher_PV)) / temperature) + 8.0
    kept_PV, into_PV = teacher_PV.clone(), student_PV.clone()

    loss_P = divergence_rows(
        into_PV, teacher_PV, factor_P1, Comparison(kind="forward_kl", temperature=temperature), Scratch(), into_PV
    )

    assert torch.equal(teacher_PV, kept_PV)
    torch.testing.assert_close(loss_P.double(), wide_P.detach(), rtol=0, atol=8 * ROUNDING * reach)
    torch.testing.assert_close(into_PV.double(), wide_PV, rtol=0, atol=8 * ROUNDING * reach / temperature)


@settings(max_examples=60, deadline=None)
@given(shape=shapes, seed=st.integers(0, 99))
def test_entropy_peak_and_cross_entropy_are_those_of_double_precision(
    shape: tuple[int, int, float], seed: int
) -> None:
    logits_PV = drawn(shape, seed)
    target_P = torch.arange(shape[0]) * 7 % shape[1]
    leaf_PV = logits_PV.double().requires_grad_()
    log_p_PV = leaf_PV.log_softmax(-1)
    p_PV = log_p_PV.detach().exp()
    wide_P = -log_p_PV.gather(-1, target_P[:, None])[:, 0]
    (wide_PV,) = torch.autograd.grad(3.0 * wide_P.sum(), leaf_PV)
    reach = float((logits_PV.amax(-1) - logits_PV.amin(-1)).max()) + 8.0

    found = statistics_rows(logits_PV, Scratch())
    slope_PV = logits_PV.clone()
    loss_P = cross_entropy_rows(slope_PV, target_P, torch.tensor(3.0))

    assert bool((found.entropy >= 0).all())
    entropy_P = -(p_PV * log_p_PV.detach()).sum(-1)
    torch.testing.assert_close(found.entropy.double(), entropy_P, rtol=0, atol=8 * ROUNDING * 8.0)
    torch.testing.assert_close(found.peak.double(), p_PV.amax(-1), rtol=8 * ROUNDING, atol=0)
    torch.testing.assert_close(loss_P.double(), wide_P.detach(), rtol=0, atol=8 * ROUNDING * reach)
    torch.testing.assert_close(slope_PV.double(), wide_PV, rtol=0, atol=24 * ROUNDING * 8.0)


def test_a_class_that_the_student_rules_out_costs_what_it_is_worth() -> None:
    student_PV, teacher_PV = torch.tensor([[0.0, -3e4]]), torch.tensor([[-3e4, 0.0]])
    how = Comparison(kind="forward_kl", temperature=2.0)

    loss_P = divergence_rows(student_PV, teacher_PV, torch.ones(1, 1), how, Scratch(), student_PV)

    assert loss_P.tolist() == pytest.approx([1.5e4])
    assert student_PV.tolist() == [[0.5, -0.5]]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape", [(0, 7), (1, 7), (40, 30_000), (3, 2_000_000)])
def test_parts_cover_every_row_once_and_threads_share_larger_ones(threads: int, shape: tuple[int, int]) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        ranges = list(parts(torch.empty(shape)))
    finally:
        torch.set_num_threads(before)

    assert [row for r in ranges for row in range(r.start, r.stop)] == list(range(shape[0]))
    if shape == (40, 30_000):
        assert max(r.stop - r.start for r in ranges) == (2 if threads == 1 else 34)

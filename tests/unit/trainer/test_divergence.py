"""Divergences of distributions at each position, and the distances and weights of vectors."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

import slow_losses as slow
from xkd_trainer.losses.ops.divergence import DIVERGENCES, Knobs, cosine_distance, divergence, pair_weights
from xkd_trainer.models.measures import cosine_matrix

KINDS = list(DIVERGENCES)
SEEDS = st.integers(0, 2**31)


def logits(seed: int, n: int = 4, v: int = 7, scale: float = 3.0) -> tuple[torch.Tensor, torch.Tensor]:
    student, teacher = slow.ragged(seed, [n, n], v)
    return student * scale, teacher * scale


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=20, deadline=None)
@given(seed=SEEDS, tau=st.floats(0.5, 4.0), skew=st.floats(0.05, 0.95), alpha=st.floats(0.1, 0.9))
def test_equals_the_sum_over_classes(kind: str, seed: int, tau: float, skew: float, alpha: float) -> None:
    student, teacher = logits(seed)

    found = divergence(
        student, teacher, kind, temperature=tau, knobs=Knobs(skew=skew, adaptive_alpha=alpha, js_share=skew)
    )

    expected = [
        slow.divergence(s, t, kind, tau, skew, alpha, skew)
        for s, t in zip(student.tolist(), teacher.tolist(), strict=True)
    ]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", [k for k in KINDS if k not in ("adaptive_kl", "csd")])
def test_gradient_is_the_derivative_in_both_arguments(kind: str) -> None:
    student, teacher = (x.requires_grad_() for x in logits(1))

    assert torch.autograd.gradcheck(lambda s, t: divergence(s, t, kind, temperature=2.0), (student, teacher))


def test_the_gradient_of_csd_is_that_of_its_source() -> None:
    student, teacher = logits(3)
    slope = slow.with_gradient(lambda s: divergence(s, teacher, "csd", temperature=1.0).sum(), student)[1]

    gap, q, p = student - teacher, student.softmax(-1), teacher.softmax(-1)
    expected = q * (gap - (p * gap).sum(-1, keepdim=True)) + p * (gap - (q * gap).sum(-1, keepdim=True))
    torch.testing.assert_close(slope, expected / 2)


def test_adaptive_shares_have_no_gradient() -> None:
    student, teacher = logits(2, n=6, scale=1.0)
    rows = zip(student.softmax(-1).tolist(), teacher.softmax(-1).tolist(), strict=True)
    share = torch.tensor([[slow.tail_share(p, q, 0.5)] for q, p in rows], dtype=torch.float64)

    def gradient(kind: str) -> torch.Tensor:
        return slow.with_gradient(lambda s: divergence(s, teacher, kind, temperature=1.0).sum(), student)[1]

    torch.testing.assert_close(
        gradient("adaptive_kl"), (1 - share) * gradient("forward_kl") + share * gradient("reverse_kl")
    )


@pytest.mark.parametrize("kind", KINDS)
def test_equal_distributions_are_at_distance_zero_with_finite_gradient(kind: str) -> None:
    student, _ = logits(3)

    value, gradient = slow.with_gradient(
        lambda s: divergence(s, student + 5.0, kind, temperature=2.0).abs().sum(), student
    )

    assert float(value) < 1e-12
    assert gradient.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_certain_opposite_predictions_are_finite(kind: str) -> None:
    student = torch.tensor([[3e4, -3e4, 0.0]])

    value, gradient = slow.with_gradient(lambda s: divergence(s, -student, kind, temperature=1.0).sum(), student)

    assert value.isfinite()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_logits_are_compared_in_float32(kind: str) -> None:
    student, teacher = (x.bfloat16() for x in logits(4))

    found = divergence(student, teacher, kind, temperature=2.0)

    assert found.dtype == torch.float32
    torch.testing.assert_close(found, divergence(student.float(), teacher.float(), kind, temperature=2.0))


@pytest.mark.parametrize("bad", [{"skew": 1.0}, {"adaptive_alpha": 0.0}, {"js_share": 1.0}, {"ab_beta": 0.0}])
def test_a_number_out_of_range_is_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        Knobs(**bad)


# Vectors


def test_cosine_distance_has_the_right_gradient_and_none_at_a_zero_vector() -> None:
    first, second = slow.ragged(1, [4, 4], 3)

    assert torch.autograd.gradcheck(cosine_distance, (first[None].requires_grad_(), second[None].requires_grad_()))

    value, gradient = slow.with_gradient(lambda x: cosine_distance(x, second[None]).sum(), torch.zeros(1, 4, 3))
    assert value == 4
    assert (gradient == 0).all()


@pytest.mark.parametrize("length", [1e-10, 1e-20, 1e-44])
@pytest.mark.parametrize("loss", [cosine_distance, lambda a, b: cosine_matrix(torch.cat([a, b], dim=1))])
def test_vectors_of_next_to_no_length_have_a_finite_gradient(loss: Any, length: float) -> None:
    first, second = (d.float()[None] for d in slow.ragged(1, [4, 4], 3))

    value, gradient = slow.with_gradient(lambda x: loss(x, second).sum(), length * first)

    assert value.isfinite()
    assert gradient.isfinite().all()
    if length >= 1e-10:
        torch.testing.assert_close(value, loss(first, second).sum())


def test_two_spans_of_very_different_weight_keep_the_weight_of_their_pair() -> None:
    weights = pair_weights(torch.tensor([[1.0, 1e-12]]), torch.tensor([[True, True]]))

    torch.testing.assert_close(weights.sum(), torch.tensor(2e-12))

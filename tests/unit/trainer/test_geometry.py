from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import slow_losses as slow
from xkd_trainer.losses.ops.divergence import cosine_distance, pair_weights
from xkd_trainer.models.measures import cosine_matrix

SEEDS = st.integers(0, 2**31)


@settings(max_examples=20, deadline=None)
@given(seed=SEEDS)
def test_cosine_distance_equals_the_loops(seed: int) -> None:
    first, second = slow.ragged(seed, [5, 5], 3)

    found = cosine_distance(first[None], second[None])[0]

    expected = [1 - slow.cosine(a, b) for a, b in zip(first.tolist(), second.tolist(), strict=True)]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


def test_cosine_distance_has_the_right_gradient_and_none_at_a_zero_vector() -> None:
    first, second = slow.ragged(1, [4, 4], 3)

    assert torch.autograd.gradcheck(cosine_distance, (first[None].requires_grad_(), second[None].requires_grad_()))

    value, gradient = slow.with_gradient(lambda x: cosine_distance(x, second[None]).sum(), torch.zeros(1, 4, 3))
    assert value == 4
    assert (gradient == 0).all()


@pytest.mark.parametrize("length", [1e-10, 1e-13, 1e-20, 1e-30, 1e-44])
@pytest.mark.parametrize("loss", [cosine_distance, lambda a, b: cosine_matrix(torch.cat([a, b], dim=1))])
def test_vectors_of_next_to_no_length_have_a_finite_gradient(loss: Any, length: float) -> None:
    first, second = (d.float()[None] for d in slow.ragged(1, [4, 4], 3))

    value, gradient = slow.with_gradient(lambda x: loss(x, second).sum(), length * first)

    assert value.isfinite()
    assert gradient.isfinite().all()
    if length >= 1e-10:
        torch.testing.assert_close(value, loss(first, second).sum())


@settings(max_examples=20, deadline=None)
@given(seed=SEEDS)
def test_pairs_weigh_by_both_ends_never_with_themselves_or_with_padding(seed: int) -> None:
    sizes = slow.lengths(seed, low=0, high=4)
    omegas = slow.masses(seed, sizes)

    found = pair_weights(slow.padded(omegas, fill=torch.nan), slow.mask(sizes))

    for row, omega in enumerate(omegas):
        for i in range(found.shape[1]):
            for j in range(found.shape[1]):
                inside = i != j and i < len(omega) and j < len(omega)
                assert float(found[row, i, j]) == (float(omega[i] * omega[j]) if inside else 0.0)


def test_two_spans_of_very_different_weight_keep_the_weight_of_their_pair() -> None:
    weights = pair_weights(torch.tensor([[1.0, 1e-12]]), torch.tensor([[True, True]]))

    torch.testing.assert_close(weights.sum(), torch.tensor(2e-12))

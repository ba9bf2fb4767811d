import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import slow_losses as slow
from xkd_trainer.losses.ce import cross_entropy
from xkd_trainer.losses.term import term

SEEDS = st.integers(0, 2**31)


def batch(seed: int, n: int = 6, v: int = 5) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = slow.generator(seed)
    logits = torch.randn(n, v, generator=g, dtype=torch.float64) * 3
    return logits, torch.randint(0, v, (n,), generator=g), torch.rand(n, generator=g) < 0.6


@settings(max_examples=30, deadline=None)
@given(seed=SEEDS, n=st.integers(0, 7))
def test_equals_the_sum_over_valid_positions(seed: int, n: int) -> None:
    logits, target, valid = batch(seed, n)

    found = cross_entropy(logits, target, valid)

    total, count = slow.cross_entropy(logits.tolist(), target.tolist(), valid.tolist())
    assert abs(float(found.total) - total) < 1e-9
    assert float(found.count) == count
    assert not found.count.requires_grad


def test_gradient_is_the_derivative() -> None:
    logits, target, valid = batch(1)

    assert torch.autograd.gradcheck(lambda z: cross_entropy(z, target, valid).total, logits.requires_grad_())


def test_padding_changes_neither_value_nor_gradient() -> None:
    logits, target, valid = batch(2)
    dirty = torch.where(valid[:, None], logits, torch.nan)

    value, gradient = slow.with_gradient(lambda z: cross_entropy(z, target, valid).total, logits)

    other = slow.with_gradient(lambda z: cross_entropy(z, target.where(valid, -7), valid).total, dirty)
    slow.assert_same_bits(value, other[0])
    slow.assert_same_bits(gradient, other[1])
    assert (gradient[~valid] == 0).all()
    assert (gradient[valid] != 0).any()


def test_cutting_the_positions_changes_nothing() -> None:
    logits, target, valid = batch(3)

    whole = cross_entropy(logits, target, valid)
    parts = [cross_entropy(logits[r], target[r], valid[r]) for r in (slice(0, 2), slice(2, 6))]

    torch.testing.assert_close(whole.total, parts[0].total + parts[1].total)
    assert whole.count == parts[0].count + parts[1].count


def test_nothing_valid_is_zero_with_zero_gradient() -> None:
    logits, target, valid = batch(4)

    value, gradient = slow.with_gradient(lambda z: cross_entropy(z, target, valid & False).total, logits)

    assert value == 0
    assert (gradient == 0).all()


def test_half_precision_is_summed_in_float32() -> None:
    logits, target, valid = batch(5)

    assert cross_entropy(logits.bfloat16(), target, valid).total.dtype == torch.float32


def test_a_count_never_carries_gradient_and_has_the_dtype_of_the_total() -> None:
    weights = torch.ones(3, requires_grad=True)

    found = term(weights.double().sum(), weights.sum())

    assert not found.count.requires_grad
    assert found.count.dtype == torch.float64

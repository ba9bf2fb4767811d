import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import slow_dwa as slow
from xkd_trainer.losses import softdtw
from xkd_trainer.losses.softdtw import hard_band, soft_dtw, torch_soft_dtw

BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["kernel", "torch"])


def random_batch(seed: int, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Costs [B, S, T] in float64 and two ragged lengths, zeros among them."""
    generator = torch.Generator().manual_seed(seed)
    pairs, rows, columns = (int(torch.randint(1, high, (), generator=generator)) for high in (5, 12, 12))
    cost = scale * torch.randn(pairs, rows, columns, generator=generator, dtype=torch.float64)
    lengths = [torch.randint(0, size + 1, (pairs,), generator=generator) for size in (rows, columns)]
    return cost, lengths[0], lengths[1]


def value_and_gradient(cost: Tensor, rows: Tensor, columns: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    cost = cost.detach().clone().requires_grad_()
    value = soft_dtw(cost, rows, columns, gamma=gamma)
    value.sum().backward()
    return value.detach(), cost.grad


def lengths_of(cost: Tensor) -> tuple[Tensor, Tensor]:
    return torch.full(cost.shape[:1], cost.shape[1]), torch.full(cost.shape[:1], cost.shape[2])


@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])
@pytest.mark.parametrize("seed", range(3))
def test_ragged_batches_agree_with_the_recursion_in_loops(seed: int, scale: float) -> None:
    cost, rows, columns = random_batch(seed, scale)

    value, gradient = value_and_gradient(cost, rows, columns, 0.7)

    for b, (s, t) in enumerate(zip(rows.tolist(), columns.tolist(), strict=True)):
        expected_value, expected_gradient = slow.soft_dtw(cost[b, :s, :t].tolist(), 0.7)
        assert value[b].item() == pytest.approx(expected_value, abs=1e-10)
        if s and t:
            torch.testing.assert_close(
                gradient[b, :s, :t], torch.tensor(expected_gradient, dtype=torch.float64), atol=1e-9, rtol=0
            )
        assert not gradient[b, s:].any()
        assert not gradient[b, :, t:].any()


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6), gamma=st.sampled_from([0.01, 0.5, 2.0, 50.0]), scale=st.sampled_from([0.01, 1, 1e3])
)
def test_the_kernel_agrees_with_torch(seed: int, gamma: float, scale: float) -> None:
    cost, rows, columns = random_batch(seed, scale)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(softdtw, "torch_soft_dtw", lambda *_: pytest.fail("the slow way was taken"))
        value, gradient = value_and_gradient(cost.float(), rows, columns, gamma)

    expected_value, expected_gradient = torch_soft_dtw(cost.float(), rows, columns, gamma)
    torch.testing.assert_close(value, expected_value.float(), atol=1e-5 * gamma, rtol=1e-6)
    torch.testing.assert_close(gradient, expected_gradient, atol=1e-5, rtol=0)


@BOTH
def test_cells_outside_the_lengths_change_no_bit(dtype: torch.dtype) -> None:
    cost = torch.rand(2, 9, 8, generator=torch.Generator().manual_seed(1), dtype=dtype)
    rows, columns = torch.tensor([4, 9]), torch.tensor([8, 3])
    changed = cost.clone()
    for filling in (1e30, math.nan, -math.inf):
        changed[0, 4:], changed[1, :, 3:] = filling, filling

        before, after = (value_and_gradient(c, rows, columns, 0.3) for c in (cost, changed))

        assert torch.equal(before[0], after[0])
        assert torch.equal(before[1], after[1])
    alone = value_and_gradient(cost[:1, :4], rows[:1], columns[:1], 0.3)
    torch.testing.assert_close(alone[0], before[0][:1])
    torch.testing.assert_close(alone[1], before[1][:1, :4])


def test_value_has_the_dtype_of_the_cost_and_bfloat16_is_worked_in_float32() -> None:
    cost = torch.rand(2, 20, 20, generator=torch.Generator().manual_seed(1)).bfloat16()

    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        value, gradient = value_and_gradient(cost.to(dtype), *lengths_of(cost), 1.0)
        assert (value.dtype, gradient.dtype) == (dtype, dtype)
        expected = soft_dtw(cost.double(), *lengths_of(cost), gamma=1.0)
        torch.testing.assert_close(value.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-6)


@BOTH
def test_a_pair_without_tokens_is_zero_with_zero_gradient(dtype: torch.dtype) -> None:
    cost = torch.rand(3, 4, 5, dtype=dtype)

    value, gradient = value_and_gradient(cost, torch.tensor([0, 4, 0]), torch.tensor([5, 0, 0]), 1.0)

    assert not value.any()
    assert not gradient.any()
    for shape in ((0, 3, 3), (2, 0, 3), (2, 3, 0)):
        empty = torch.zeros(shape, dtype=dtype)
        assert soft_dtw(empty, *lengths_of(empty), gamma=1.0).tolist() == [0.0] * shape[0]


@BOTH
def test_a_cost_of_infinity_forbids_its_cell(dtype: torch.dtype) -> None:
    cost = torch.rand(1, 6, 6, generator=torch.Generator().manual_seed(1), dtype=dtype)
    walled = cost + hard_band(cost[:, :, 0], lengths_of(cost), width=1.0).dense(6)

    value, gradient = value_and_gradient(walled, *lengths_of(cost), 0.5)

    expected_value, expected_gradient = slow.soft_dtw(walled[0].tolist(), 0.5)
    assert value.item() == pytest.approx(expected_value)
    torch.testing.assert_close(gradient[0], torch.tensor(expected_gradient, dtype=dtype))
    assert not gradient[walled.isinf()].any()


@BOTH
def test_no_way_through_is_infinite_and_nothing_else_is_touched(dtype: torch.dtype) -> None:
    cost = torch.rand(2, 6, 6, dtype=dtype)
    cost[0, 3] = math.inf

    value, gradient = value_and_gradient(cost, *lengths_of(cost), 0.5)

    assert value[0] == math.inf
    assert value[1].isfinite()
    assert not gradient.isnan().any()


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
@BOTH
def test_a_cost_that_is_no_number_shows_in_value_and_gradient_of_its_pair_only(bad: float, dtype: torch.dtype) -> None:
    cost = torch.rand(2, 6, 6, dtype=dtype)
    cost[0, 2, 3] = bad
    rows, columns = torch.tensor([5, 6]), torch.tensor([6, 6])

    value, gradient = value_and_gradient(cost, rows, columns, 0.5)

    assert value.isnan().tolist() == [True, False]
    assert gradient[0, :5].isnan().all()
    assert not gradient[0, 5:].any()
    assert gradient[1].isfinite().all()


@pytest.mark.parametrize("scale", [1e6, 1e18])
def test_costs_beyond_the_kernels_exponents_are_still_exact(scale: float) -> None:
    cost = scale * torch.rand(3, 20, 30, generator=torch.Generator().manual_seed(5))

    value, gradient = value_and_gradient(cost, *lengths_of(cost), 0.01)

    expected_value, expected_gradient = torch_soft_dtw(cost.double(), *lengths_of(cost), 0.01)
    torch.testing.assert_close(value.double(), expected_value, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=0, atol=1e-5)


def test_no_gradient_is_a_denormal_number() -> None:
    """Far off the path it would be one, and processors are tens of times slower on them."""
    cost = torch.rand(1, 256, 256, generator=torch.Generator().manual_seed(0)) * 3.0

    _, gradient = value_and_gradient(cost, *lengths_of(cost), 0.2)

    assert (gradient[gradient != 0].min() >= torch.finfo(torch.float32).tiny).all()
    assert (gradient == 0).any()


def test_threads_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    cost = torch.rand(5, 300, 200, generator=torch.Generator().manual_seed(0))
    one = value_and_gradient(cost, *lengths_of(cost), 1.0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)

    several = value_and_gradient(cost, *lengths_of(cost), 1.0)

    assert torch.equal(one[0], several[0])
    assert torch.equal(one[1], several[1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c, n: soft_dtw(c, n, n, gamma=0.0), "gamma is 0.0"),
        (lambda c, n: soft_dtw(c, n, n, gamma=math.nan), "gamma is nan"),
        (lambda c, n: soft_dtw(c[0], n, n, gamma=1.0), r"has to be float \[B, S, T\]"),
        (lambda c, n: soft_dtw(c.long(), n, n, gamma=1.0), "torch.int64"),
        (lambda c, n: soft_dtw(c, n[:1], n, gamma=1.0), "student lengths are"),
        (lambda c, n: soft_dtw(c, n, n.float(), gamma=1.0), "teacher lengths are torch.float32"),
        (lambda c, n: soft_dtw(c, n + 9, n, gamma=1.0), r"a student length is not in 0\.\.3"),
        (lambda c, n: soft_dtw(c, n, n - 9, gamma=1.0), r"a teacher length is not in 0\.\.4"),
    ],
)
def test_arguments_that_do_not_fit_are_named(call: Callable[[Tensor, Tensor], Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(2, 3, 4), torch.tensor([1, 2]))


@settings(max_examples=80, deadline=None)
@given(rows=st.integers(1, 40), columns=st.integers(1, 40), width=st.sampled_from([0.0, 1.0, 3.5]))
def test_a_path_runs_inside_the_hard_band_whatever_the_lengths(rows: int, columns: int, width: float) -> None:
    cost = torch.zeros(1, 40, 40)
    lengths = torch.tensor([rows]), torch.tensor([columns])

    banded = hard_band(cost[:, :, 0], lengths, width=width).dense(40)

    assert soft_dtw(cost + banded, *lengths, gamma=1.0).isfinite().all()
    assert banded[0, 0, 0] == 0.0
    if rows == columns and width == 1.0:
        assert int((banded[0, :rows, :columns] == 0.0).sum()) == 3 * rows - 2

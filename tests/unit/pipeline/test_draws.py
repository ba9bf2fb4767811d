"""Classes drawn from a prediction: right on average, k of them, the same for the same document.

Shape legend for this file
    N predictions    V classes    k drawn classes    G values of a random number
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from xkd_pipeline.capture import measure as draws
from xkd_pipeline.capture.measure import draw_classes, uniforms
from xkd_schemas.codecs import TOTAL, find_class_fault, unpack_classes


def estimates(logits_NV: Tensor, uniforms_N2: Tensor, k: int) -> Tensor:
    """The distributions that the drawn classes stand for, [N, V]."""
    classes_Nk, weights_Nk = map(torch.from_numpy, unpack_classes(draw_classes(logits_NV, uniforms_N2, k).entries_Nk))
    return torch.zeros(logits_NV.shape, dtype=torch.float64).scatter_(-1, classes_Nk, weights_Nk.double())


def grid(count: int, second: float) -> Tensor:
    """The middles of `count` equal parts of [0, 1), with one second number for all."""
    u_G = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    return torch.stack([u_G, torch.full_like(u_G, second)], dim=-1)


@pytest.mark.parametrize(("k", "scale"), [(1, 1.0), (2, 4.0), (3, 0.1), (5, 4.0), (8, 1.0)])
def test_the_draw_is_right_on_average_over_both_random_numbers(k: int, scale: float) -> None:
    logits_V = scale * torch.randn(11, generator=torch.Generator().manual_seed(k), dtype=torch.float64)
    places = 2000
    first = grid(places, 0.0)[:, 0]
    second = (torch.arange(places) * 0.6180339887498949 % 1.0).double()  # even too, and unlike the first

    mean_V = estimates(logits_V.expand(places, -1), torch.stack([first, second], dim=-1), k).mean(0)

    torch.testing.assert_close(mean_V, logits_V.softmax(-1), rtol=0, atol=3e-3)


def test_as_many_draws_as_classes_give_the_distribution_to_the_rounding_of_shares() -> None:
    logits_NV = torch.randn(20, 7, generator=torch.Generator().manual_seed(1))
    u_N2 = torch.rand(20, 2, generator=torch.Generator().manual_seed(2))

    torch.testing.assert_close(estimates(logits_NV, u_N2, 7), logits_NV.double().softmax(-1), rtol=0, atol=1.0 / TOTAL)


@pytest.mark.parametrize("k", [4, 64])
def test_the_error_is_the_one_reported_and_below_that_of_the_papers_draw_with_replacement(k: int) -> None:
    logits_NV = 3 * torch.randn(300, 2000, generator=torch.Generator().manual_seed(3))
    p_NV = logits_NV.double().softmax(-1)
    u_N2 = torch.rand(300, 2, generator=torch.Generator().manual_seed(4), dtype=torch.float64)

    draw = draw_classes(logits_NV, u_N2, k)
    lost_N = (estimates(logits_NV, u_N2, k) - p_NV).square().sum(-1)

    np.testing.assert_allclose(draw.lost_N, lost_N, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(draw.kept_N, p_NV.square().sum(-1), rtol=1e-5)
    with_replacement = float(((p_NV - p_NV.square()) / k).sum())  # the variance of k draws, exactly
    assert float(lost_N.sum()) < 0.9 * with_replacement


@settings(deadline=None)
@given(
    st.integers(1, 30).flatmap(lambda v: st.tuples(st.just(v), st.integers(1, v))),
    st.sampled_from([0.0, 0.01, 1.0, 10.0, 80.0]),
    st.integers(0, 2**31),
)
def test_k_ascending_classes_share_all_of_any_distribution(sizes: tuple[int, int], scale: float, seed: int) -> None:
    classes, k = sizes
    generator = torch.Generator().manual_seed(seed)
    logits_NV = scale * torch.randn(5, classes, generator=generator)

    draw = draw_classes(logits_NV, torch.rand(5, 2, generator=generator), k)

    assert draw.entries_Nk.shape == (5, k)
    assert find_class_fault(draw.entries_Nk, classes) == ""
    assert np.isfinite(draw.lost_N).all()


@pytest.mark.parametrize("u", [0.0, 1 - 2**-53])
def test_a_class_that_cannot_be_is_drawn_with_share_0_only_also_at_the_ends_of_the_running_sum(u: float) -> None:
    few_NV = torch.tensor([[0.0, -torch.inf, -torch.inf, 0.0], [-torch.inf, -torch.inf, 5.0, -torch.inf]])
    many_NV = torch.zeros(2, 20)
    many_NV[:, :3] = many_NV[:, 17:] = -torch.inf

    few, many = (
        estimates(logits_NV, torch.full((2, 2), u, dtype=torch.float64), k)
        for logits_NV, k in ((few_NV, 3), (many_NV, 4))
    )

    torch.testing.assert_close(few, few_NV.double().softmax(-1), rtol=0, atol=1.0 / TOTAL)
    assert few[torch.isinf(few_NV)].abs().max() == many[torch.isinf(many_NV)].abs().max() == 0.0
    assert ((many > 0.2).sum(-1) == 4).all()


def test_shares_are_right_on_average_to_the_last_digit_and_always_add_up() -> None:
    weights_Nk = torch.tensor([[0.30002, 0.5, 0.19993, 0.00005]], dtype=torch.float64).expand(1000, -1)
    u_N1 = grid(1000, 0.0)[:, :1]

    shares_Nk = draws._whole_shares(weights_Nk, u_N1)

    assert shares_Nk.sum(-1).unique().tolist() == [TOTAL]
    torch.testing.assert_close(shares_Nk.double().mean(0), TOTAL * weights_Nk[0], rtol=0, atol=2e-3)


def test_a_row_is_drawn_alike_alone_and_among_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draws, "DRAW_ELEMENTS", 7 * 500)
    logits_NV = 3 * torch.randn(40, 500, generator=torch.Generator().manual_seed(5))
    u_N2 = torch.rand(40, 2, generator=torch.Generator().manual_seed(6))

    whole = draw_classes(logits_NV, u_N2, 12).entries_Nk

    alone = [draw_classes(logits_NV[i : i + 1], u_N2[i : i + 1], 12).entries_Nk for i in range(40)]
    np.testing.assert_array_equal(whole, np.concatenate(alone))


def test_no_prediction_gives_no_entry() -> None:
    assert draw_classes(torch.zeros(0, 9), torch.zeros(0, 2), 4).entries_Nk.shape == (0, 4)


def test_random_numbers_are_those_of_the_document_for_good() -> None:
    first, second = (uniforms(np.array([1, 2, 3], np.int32), 500), uniforms(np.array([1, 2, 4], np.int32), 500))

    assert first[:2].tolist() == [[0.9217346151762534, 0.653027093431018], [0.581312661183809, 0.5363832065411938]]
    assert not np.isclose(first, second).any(1).all()
    np.testing.assert_array_equal(first, uniforms(np.array([1, 2, 3], np.int64).astype(np.int32), 500))
    assert first.min() >= 0.0
    assert first.max() < 1.0
    assert abs(float(first.mean()) - 0.5) < 0.05
    assert abs(float(np.corrcoef(first.T)[0, 1])) < 0.15

"""The compiled statistics of predictions against the plain ones in double precision, for every way a row can end."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from xkd_trainer.cpu_kernels.prediction_stats import LANES, PIECE, stats_of_bits
from xkd_trainer.models import measures as signals
from xkd_trainer.models.measures import prediction_stats


def logits(rows: int, classes: int, dtype: torch.dtype, *, spread: float = 4.0, seed: int = 0) -> Tensor:
    made = torch.randn(rows, classes, generator=torch.Generator().manual_seed(seed)) * spread
    return made.to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("classes", [1, 2, LANES - 1, LANES, LANES + 1, PIECE - 1, PIECE, PIECE + 1, 3 * PIECE + 7])
@pytest.mark.parametrize("spread", [0.0, 4.0, 60.0])
def test_they_are_those_of_double_precision_wherever_a_row_ends(
    classes: int, dtype: torch.dtype, spread: float
) -> None:
    logits_NV = logits(5, classes, dtype, spread=spread, seed=classes)

    entropy, argmax, logsumexp = prediction_stats(logits_NV)

    exact = signals._prediction_stats(logits_NV.double())
    assert entropy.dtype == logsumexp.dtype == torch.float32
    torch.testing.assert_close(entropy.double(), exact[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(logsumexp.double(), exact[2], rtol=1e-6, atol=1e-6)
    assert argmax.tolist() == [row.index(max(row)) for row in logits_NV.float().tolist()]


def test_zero_of_either_sign_is_the_largest_where_it_stands_first() -> None:
    assert prediction_stats(torch.tensor([[-1.0, -0.0, 0.0], [-1.0, 0.0, -0.0]]))[1].tolist() == [1, 1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("broken", [torch.nan, -torch.nan, torch.inf])
@pytest.mark.parametrize("place", [0, 7, PIECE + 3])
def test_a_row_that_is_no_number_says_so_and_its_neighbours_do_not(
    broken: float, place: int, dtype: torch.dtype
) -> None:
    logits_NV = logits(3, PIECE + 9, dtype)
    whole = prediction_stats(logits_NV)
    logits_NV[1, place] = broken

    entropy, argmax, _ = prediction_stats(logits_NV)

    assert entropy.isnan().tolist() == [False, True, False]
    assert int(argmax[1]) == place
    for row in (0, 2):
        assert (float(entropy[row]), int(argmax[row])) == (float(whole[0][row]), int(whole[1][row]))


def test_a_class_that_cannot_be_changes_nothing_and_a_row_of_them_is_no_number() -> None:
    logits_NV = logits(2, 40, torch.float32)
    masked = torch.cat([torch.full((2, 100), -torch.inf), logits_NV], -1)

    torch.testing.assert_close(prediction_stats(masked)[0], prediction_stats(logits_NV)[0])
    assert prediction_stats(torch.full((1, 4), -torch.inf))[0].isnan().all()


@pytest.mark.parametrize("threads", [2, 3, 8])
def test_rows_divided_among_threads_keep_every_bit(threads: int) -> None:
    bits = logits(7, 300, torch.bfloat16).view(torch.int16).numpy()

    alone, divided = stats_of_bits(bits, 1), stats_of_bits(bits, threads)

    assert all(np.array_equal(a, b) for a, b in zip(alone, divided, strict=True))


def test_rows_with_a_gap_between_them_and_none_at_all() -> None:
    wide = logits(6, 90, torch.bfloat16)

    apart = prediction_stats(wide[::2, 10:80])

    assert all(torch.equal(a, b) for a, b in zip(apart, prediction_stats(wide[::2, 10:80].clone()), strict=True))
    assert [len(x) for x in prediction_stats(torch.zeros(0, 4))] == [0, 0, 0]


def test_other_dtypes_are_taken_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    plain = signals._prediction_stats

    def noted(logits_NV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        seen.append(logits_NV.dtype)
        return plain(logits_NV)

    monkeypatch.setattr(signals, "_prediction_stats", noted)

    for dtype in (torch.float16, torch.float64, torch.float32):
        prediction_stats(logits(2, 5, dtype))

    assert seen == [torch.float16, torch.float64]

"""Torch tensors into the compiled kernels and back: picks the float type, spreads pairs over threads.

`soft_dtw` imports this module only where the kernels are.

Shape legend for this file
    B pairs    S student tokens    T teacher tokens
"""

import itertools
import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from xkd_trainer.cpu_kernels.soft_dtw import DOUBLE_BATCH, NOT_A_NUMBER, SINGLE_BATCH, TOO_LARGE

Array = npt.NDArray[Any]

_CELLS_WORTH_A_THREAD = 1 << 17


def numba_soft_dtw(
    cost_BST: Tensor, student_lengths_B: Tensor, teacher_lengths_B: Tensor, gamma: float, *, gradient: bool
) -> tuple[Tensor, Tensor] | None:
    """Values [B] in float64 and their gradient by the costs [B, S, T] in the cost's dtype, both without graph.

    Pairs are spread over torch.get_num_threads() threads where there is work enough. float32 costs that do not fit
    the float32 kernel's exponent, which takes cost / gamma of about 2**26 / (S + T), are done by the float64 kernel.

    Args:
        cost_BST: float32 or float64 on the CPU.
        student_lengths_B: Integers, checked already.
        teacher_lengths_B: Integers, checked already.
        gamma: Greater than 0.
        gradient: False: the gradient comes back with size 0.

    Returns:
        None where even the float64 kernel's exponent, at cost / gamma of about 2**50 / (S + T), is too small.
    """
    cost = cost_BST.detach().contiguous().numpy()
    lengths = [x.detach().to(torch.int64).contiguous().numpy() for x in (student_lengths_B, teacher_lengths_B)]
    kernel = SINGLE_BATCH if cost.dtype == np.float32 else DOUBLE_BATCH
    out = _run(kernel, cost, lengths, gamma, gradient)
    if kernel is SINGLE_BATCH and (out[2] == TOO_LARGE).any():
        out = _run(DOUBLE_BATCH, cost.astype(np.float64), lengths, gamma, gradient)
    values, slopes, status = out
    if (status == TOO_LARGE).any():
        return None
    for b in np.flatnonzero(status == NOT_A_NUMBER):
        values[b] = math.nan
        slopes[b, : lengths[0][b], : lengths[1][b]] = math.nan
    return torch.from_numpy(values), torch.from_numpy(slopes).to(cost_BST.dtype)


def _run(kernel: Any, cost: Array, lengths: list[Array], gamma: float, gradient: bool) -> tuple[Array, Array, Array]:
    """(values, gradient, status) of a batch, its pairs cut into as many parts as there are threads for."""
    num_pairs = cost.shape[0]
    values, status = np.zeros(num_pairs), np.zeros(num_pairs, np.int64)
    slopes = np.zeros(cost.shape if gradient else (num_pairs, 0, 0), cost.dtype)
    num_parts = max(1, min(num_pairs, torch.get_num_threads(), cost.size // _CELLS_WORTH_A_THREAD))
    cuts = [num_pairs * part // num_parts for part in range(num_parts + 1)]
    parts = [slice(first, stop) for first, stop in itertools.pairwise(cuts)]

    def work(part: slice) -> None:
        outputs = (values[part], slopes[part], status[part])
        kernel(cost[part], lengths[0][part], lengths[1][part], float(gamma), outputs)

    if num_parts == 1:
        work(parts[0])
    else:
        with ThreadPoolExecutor(num_parts) as pool:
            list(pool.map(work, parts))
    return values, slopes, status

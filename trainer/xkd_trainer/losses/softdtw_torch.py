"""Soft-DTW on any device: the recursion in log space, one anti-diagonal of all pairs at a time.

For GPUs, for machines without numba, and for costs beyond the exponent of the compiled kernels. It is a loop over
S + T - 1 steps of a few torch calls on [B, S]; memory is six float64 a cell of the skewed square [S + T - 1, B, S].

Shape legend for this file
    B pairs    S student tokens    T teacher tokens    D anti-diagonals, S + T - 1
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def torch_soft_dtw(
    cost_BST: Tensor, student_lengths_B: Tensor, teacher_lengths_B: Tensor, gamma: float
) -> tuple[Tensor, Tensor]:
    """Values [B] and their gradient by the costs [B, S, T], both without graph.

    Worked in float64 whatever the cost's dtype (float32 on devices that have no float64): log space loses about
    four digits. The gradient has the cost's dtype, the values the working one. See `softdtw.soft_dtw` for the rest.
    """
    cost_BST = cost_BST.detach()
    if not cost_BST.numel():
        return cost_BST.new_zeros(cost_BST.shape[0]), torch.zeros_like(cost_BST)
    inside_BST = inside_lengths(cost_BST, student_lengths_B, teacher_lengths_B)
    working = torch.float32 if cost_BST.device.type == "mps" else torch.float64
    step_BST = cost_BST.to(working) / -gamma
    step_BST = torch.where(step_BST == math.inf, math.nan, step_BST)  # a cost of -inf has no meaning
    log_DBS, share_D3BS = _forward(_skewed(torch.where(inside_BST, step_BST, -math.inf)))
    last_B = (student_lengths_B + teacher_lengths_B - 2).clamp_min(0)
    row_B, pair_B = (student_lengths_B - 1).clamp_min(0), torch.arange(cost_BST.shape[0], device=cost_BST.device)
    empty_B = (student_lengths_B == 0) | (teacher_lengths_B == 0)
    value_B = torch.where(empty_B, 0.0, -gamma * log_DBS[last_B, pair_B, row_B])
    seed_DBS = torch.zeros_like(log_DBS)
    seed_DBS[last_B, pair_B, row_B] = torch.where(empty_B, 0.0, 1.0).to(working)
    gradient_BST = _unskewed(_backward(share_D3BS, seed_DBS), cost_BST.shape[2])
    gradient_BST = torch.where(value_B.isnan()[:, None, None], math.nan, gradient_BST)
    return value_B, torch.where(inside_BST, gradient_BST, 0.0).to(cost_BST.dtype)


def _forward(step_DBS: Tensor) -> tuple[Tensor, Tensor]:
    """Log of the path sum of every cell, [D, B, S], and the shares of left, upper and corner cell, [D, 3, B, S]."""
    num_diagonals, num_pairs, num_rows = step_DBS.shape
    log_DBS = torch.empty_like(step_DBS)
    share_D3BS = step_DBS.new_empty((num_diagonals, 3, num_pairs, num_rows))
    near_BS = step_DBS.new_full((num_pairs, num_rows + 1), -math.inf)  # column 0 stands above the first row
    far_BS = near_BS.clone()
    far_BS[:, 0] = 0.0  # the empty path, corner of the first cell
    for d in range(num_diagonals):
        from_3BS = torch.stack((near_BS[:, 1:], near_BS[:, :-1], far_BS[:, :-1]))
        top_BS = from_3BS.amax(0)
        top_BS = torch.where(top_BS == -math.inf, 0.0, top_BS)
        part_3BS = (from_3BS - top_BS).exp()
        total_BS = part_3BS.sum(0)
        share_D3BS[d] = part_3BS / total_BS.clamp_min(1.0)  # below 1 only where no path arrives
        log_DBS[d] = top_BS + total_BS.log() + step_DBS[d]
        near_BS, far_BS = F.pad(log_DBS[d], (1, 0), value=-math.inf), near_BS
    return log_DBS, share_D3BS


def _backward(share_D3BS: Tensor, seed_DBS: Tensor) -> Tensor:
    """Expected visits of every cell, [D, B, S]: each cell hands its own to its predecessors by their shares."""
    mass_DBS = seed_DBS.clone()
    for d in range(mass_DBS.shape[0] - 2, -1, -1):
        left_BS, up_BS = mass_DBS[d + 1] * share_D3BS[d + 1, 0], mass_DBS[d + 1] * share_D3BS[d + 1, 1]
        mass_DBS[d] += left_BS
        mass_DBS[d, :, :-1] += up_BS[:, 1:]
        if d + 2 < mass_DBS.shape[0]:
            mass_DBS[d, :, :-1] += (mass_DBS[d + 2] * share_D3BS[d + 2, 2])[:, 1:]
    return mass_DBS


def inside_lengths(like_BST: Tensor, student_lengths_B: Tensor, teacher_lengths_B: Tensor) -> Tensor:
    """True inside both lengths, [B, S, T]."""
    row_S = torch.arange(like_BST.shape[1], device=like_BST.device)
    column_T = torch.arange(like_BST.shape[2], device=like_BST.device)
    return (row_S < student_lengths_B[:, None])[:, :, None] & (column_T < teacher_lengths_B[:, None])[:, None, :]


def _skewed(x_BST: Tensor) -> Tensor:
    """[D, B, S] with out[i + j, b, i] = x[b, i, j] and -inf where there is no such cell."""
    num_pairs, num_rows, num_columns = x_BST.shape
    padded = F.pad(x_BST, (0, num_rows), value=-math.inf).flatten(1)[:, :-num_rows]
    return padded.view(num_pairs, num_rows, num_rows + num_columns - 1).permute(2, 0, 1).contiguous()


def _unskewed(x_DBS: Tensor, num_columns: int) -> Tensor:
    """[B, S, T] with out[b, i, j] = x[i + j, b, i]: the inverse of `_skewed`."""
    num_diagonals, num_pairs, num_rows = x_DBS.shape
    padded = F.pad(x_DBS.permute(1, 2, 0).reshape(num_pairs, -1), (0, num_rows))
    return padded.view(num_pairs, num_rows, num_diagonals + 1)[:, :, :num_columns]

"""Soft-DTW between two sequences of different length, and the costs and bands that DWA-KD feeds it.

Soft-DTW is Cuturi and Blondel's (arXiv 1703.01541): the soft minimum over all monotone alignments of the summed cost.
Its gradient by the costs is the expected alignment. Costs and band are those of DWA-KD (arXiv 2602.21669, eq.
9-10 and 17-25). Nothing here knows models or batches.

On a CPU the compiled kernels work float32. Elsewhere, in float64, and for costs that are no number or beyond the
kernels' exponent it is the same recursion in torch, in log space, one anti-diagonal of all pairs at a time: a loop
over S + T - 1 steps of a few torch calls on [B, S]; memory is six float64 a cell of the skewed square [D, B, S].

Of long sequences costs are made some rows at a time, and again for the gradient. What is kept between is one row of
path sums for each block, so that nothing has the size of both lengths. Compiled kernels run the recursion, on the CPU;
products are made where the vectors are.

Shape legend for this file
    B pairs    S student tokens    T teacher tokens    D anti-diagonals, S + T - 1    R rows of a block    E width
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from xkd_trainer.losses.ops.softmax_rows import slices
from xkd_trainer.models.measures import LONG_CELLS, at_least_float32, divide, has_cpu_kernels, unit_vectors

BLOCK_CELLS: Final = 1 << 20
"""Cells of a block: its costs have 4 MB, its shares 12."""


def soft_dtw(cost_BST: Tensor, student_lengths_B: Tensor, teacher_lengths_B: Tensor, *, gamma: float) -> Tensor:
    """Soft minimum, over all alignments of the first tokens of each pair, of the summed cost; [B].

    R_ij = C_ij + softmin(R_{i-1,j}, R_{i,j-1}, R_{i-1,j-1}) with softmin(a) = -gamma log sum exp(-a / gamma), R_00 = 0
    and R_0j = R_i0 = inf; the value is R at the two lengths (arXiv 1703.01541, algorithm 1; DWA-KD eq. 17-25).

    Two by two tokens and no cost: three alignments, the soft minimum of three zeros is -log 3.

    >>> soft_dtw(torch.zeros(1, 2, 2), torch.tensor([2]), torch.tensor([2]), gamma=1.0)
    tensor([-1.0986])

    float64 costs are computed in float64, the rest in float32 or better; +inf forbids a cell. Cells outside the
    lengths, which may be 0, are not read. Differentiable once. 0, with zero gradient, where a length is 0; +inf where
    no alignment is allowed; NaN, in value and gradient, where a cost inside is NaN or -inf.

    Raises:
        ValueError: gamma is not a positive number, shapes do not fit, or (on CPU) a length is out of range.
    """
    _check(cost_BST, student_lengths_B, teacher_lengths_B, gamma)
    value_B: Tensor = _SoftDtw.apply(  # type: ignore[no-untyped-call]
        at_least_float32(cost_BST), student_lengths_B, teacher_lengths_B, gamma
    )
    return value_B.to(cost_BST.dtype)


def expected_alignment(
    cost_BST: Tensor, student_lengths_B: Tensor, teacher_lengths_B: Tensor, *, gamma: float
) -> Tensor:
    """Share of each student token's expected cells that each teacher token gets, [B, S, T], no gradient.

    Rows sum to 1; 0 outside the lengths. Two by two tokens and no cost: three alignments alike, each cell is in two of
    them or, off the diagonal, in one.

    >>> expected_alignment(torch.zeros(1, 2, 2), torch.tensor([2]), torch.tensor([2]), gamma=1.0)
    tensor([[[0.7500, 0.2500],
             [0.2500, 0.7500]]])
    """
    _, visits_BST = _solve(at_least_float32(cost_BST.detach()), student_lengths_B, teacher_lengths_B, gamma)
    return divide(visits_BST, visits_BST.sum(-1, keepdim=True))


def look_along(x_BSE: Tensor, y_BTE: Tensor, lengths: tuple[Tensor, Tensor], *, gamma: float) -> tuple[Tensor, Tensor]:
    """`look_at` of the alignment that soft-DTW of the cosine costs expects without a band."""
    return look_at(expected_alignment(cosine_cost(x_BSE, y_BTE), *lengths, gamma=gamma))


def cosine_cost(x_BSE: Tensor, y_BTE: Tensor) -> Tensor:
    """C_ij = 1 - cos(x_i, y_j), DWA-KD eq. 9-10; [B, S, T] in float32, or float64 where the inputs are.

    A zero vector has cosine 0 with everything, and gradient 0.

    >>> cosine_cost(torch.tensor([[[1.0, 0.0], [0.0, 0.0]]]), torch.tensor([[[2.0, 0.0], [0.0, 3.0]]]))
    tensor([[[0., 1.],
             [1., 1.]]])
    """
    return 1.0 - unit_vectors(x_BSE) @ unit_vectors(y_BTE).mT


@dataclass(frozen=True, kw_only=True, slots=True)
class Band:
    """What is added to the cost of a cell (i, j), counted from 1: `penalty` where |j - centre_i| > half_i."""

    centre_BS: Tensor
    half_BS: Tensor
    penalty: float

    def at(self, rows: Any) -> "Band":
        """The band of some rows, as [B, S] is indexed."""
        return replace(self, centre_BS=self.centre_BS[rows], half_BS=self.half_BS[rows])

    def dense(self, columns: int) -> Tensor:
        """What is added to each cell, [B, S, T]; means nothing outside the lengths."""
        column_T = torch.arange(1, columns + 1, device=self.centre_BS.device)
        outside_BST = (column_T - self.centre_BS[..., None]).abs() > self.half_BS[..., None]
        return self.half_BS.new_zeros(outside_BST.shape).masked_fill(outside_BST, self.penalty)


def look_at(share_BST: Tensor) -> tuple[Tensor, Tensor]:
    """Mean column, counted from 1, and entropy in nats of each row of shares, [B, S] both, without gradient."""
    share_BST = at_least_float32(share_BST.detach())
    column_T = torch.arange(1, share_BST.shape[-1] + 1, device=share_BST.device, dtype=share_BST.dtype)
    return share_BST @ column_T, -torch.xlogy(share_BST, share_BST).sum(-1)


def soft_band(
    seen: tuple[Tensor, Tensor], lengths: tuple[Tensor, Tensor], *,
    width: float, beta: float, centre_mix: float, penalty: float,
) -> Band:  # fmt: skip
    """The adaptive soft band of DWA-KD (eq. 17-25, Table 5), round what each student token looks at.

    With i and j counted from 1 (the paper; the authors' code counts from 0, which moves the mixed centre by less than
    max(1, T / S) tokens): centre c_i = a sum_j j A_ij + (1 - a) i T / S, entropy H_i = -sum_j A_ij log A_ij, half
    width b + beta H_i, and `penalty` wherever |j - c_i| exceeds it. S and T are the two lengths of the pair; `width`
    is b and `centre_mix` is a. `seen` is `look_at` of the attention A, whose rows sum to 1 over the teacher's tokens.

    One student token that attends to the first of three: c = 0.5 * 1 + 0.5 * 1 * 3 / 1 = 2, half width 0.5.

    >>> seen, lengths = look_at(torch.tensor([[[1.0, 0.0, 0.0]]])), (torch.tensor([1]), torch.tensor([3]))
    >>> soft_band(seen, lengths, width=0.5, beta=2.0, centre_mix=0.5, penalty=1.0).dense(3)
    tensor([[[1., 0., 1.]]])
    """
    attended_BS, entropy_BS = seen
    centre_BS = centre_mix * attended_BS + (1.0 - centre_mix) * _diagonal(attended_BS, *lengths)
    return Band(centre_BS=centre_BS, half_BS=width + beta * entropy_BS, penalty=penalty)


def hard_band(like_BS: Tensor, lengths: tuple[Tensor, Tensor], *, width: float) -> Band:
    """Sakoe-Chiba band around the diagonal of each pair, +inf outside; an option the paper does not have.

    With i and j counted from 1 a cell is inside where |j - i T / S| <= max(width, T / S, 1): corrected for the slope,
    so that the two corners and a path between them are inside for any pair of lengths. `like` gives shape, dtype and
    device; `width` is in teacher tokens.

    >>> hard_band(torch.zeros(1, 3), (torch.tensor([3]), torch.tensor([3])), width=1.0).dense(3)
    tensor([[[0., 0., inf],
             [0., 0., 0.],
             [inf, 0., 0.]]])
    """
    diagonal_BS = _diagonal(like_BS, *lengths)
    reach_B1 = diagonal_BS[:, :1].clamp_min(max(width, 1.0))  # the first row's place is the slope
    half_BS = (reach_B1 * (1.0 + 1e-6)).expand_as(diagonal_BS)  # the corner itself is at `slope`
    return Band(centre_BS=diagonal_BS, half_BS=half_BS, penalty=math.inf)


def _diagonal(like_BS: Tensor, student_lengths_B: Tensor, teacher_lengths_B: Tensor) -> Tensor:
    """i T / S of the two lengths of each pair, i counted from 1, [B, S]."""
    row_S = torch.arange(1, like_BS.shape[1] + 1, device=like_BS.device, dtype=like_BS.dtype)
    slope_B = teacher_lengths_B.to(like_BS.dtype) / student_lengths_B.clamp_min(1)
    return row_S * slope_B[:, None]


def _check(cost_BST: Tensor, student_lengths_B: Tensor, teacher_lengths_B: Tensor, gamma: float) -> None:
    if not 0.0 < gamma < math.inf:
        raise ValueError(f"soft_dtw: gamma is {gamma}, it has to be a positive number")
    if cost_BST.dim() != 3 or not cost_BST.is_floating_point():
        raise ValueError(f"soft_dtw: cost is {cost_BST.dtype} {tuple(cost_BST.shape)}, it has to be float [B, S, T]")
    for side, lengths_B, size in (("student", student_lengths_B, 1), ("teacher", teacher_lengths_B, 2)):
        if lengths_B.shape != cost_BST.shape[:1] or lengths_B.is_floating_point():
            raise ValueError(f"soft_dtw: {side} lengths are {lengths_B.dtype} {tuple(lengths_B.shape)}, not int [B]")
        if lengths_B.device.type == "cpu" and ((lengths_B < 0) | (lengths_B > cost_BST.shape[size])).any():
            raise ValueError(f"soft_dtw: a {side} length is not in 0..{cost_BST.shape[size]}: {lengths_B.tolist()}")


class _SoftDtw(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, cost_BST: Tensor, student_B: Tensor, teacher_B: Tensor, gamma: float) -> Tensor:
        value_B, gradient_BST = _solve(cost_BST, student_B, teacher_B, gamma)
        ctx.save_for_backward(gradient_BST)
        return value_B.to(cost_BST.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream_B: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient_BST,) = ctx.saved_tensors
        return upstream_B[:, None, None] * gradient_BST, None, None, None


def _solve(cost_BST: Tensor, student_B: Tensor, teacher_B: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """Values and gradient, by the compiled kernels where they can do it."""
    if cost_BST.device.type == "cpu" and cost_BST.dtype == torch.float32 and has_cpu_kernels():
        from xkd_trainer.cpu_kernels import soft_dtw as kernels

        cost, *lengths = (x.detach().contiguous().numpy() for x in (cost_BST, student_B.long(), teacher_B.long()))
        if found := kernels.soft_dtw(cost, lengths[0], lengths[1], gamma, torch.get_num_threads()):
            return torch.from_numpy(found[0]), torch.from_numpy(found[1])
    return torch_soft_dtw(cost_BST, student_B, teacher_B, gamma)


def torch_soft_dtw(
    cost_BST: Tensor, student_lengths_B: Tensor, teacher_lengths_B: Tensor, gamma: float
) -> tuple[Tensor, Tensor]:
    """Values [B] and their gradient by the costs [B, S, T], both without graph.

    Worked in float64 whatever the cost's dtype (float32 on devices that have no float64): log space loses about
    four digits. The gradient has the cost's dtype, the values the working one. See `soft_dtw` for the rest.
    """
    cost_BST = cost_BST.detach()
    if not cost_BST.numel():
        return cost_BST.new_zeros(cost_BST.shape[0]), torch.zeros_like(cost_BST)
    row_S, column_T = (torch.arange(size, device=cost_BST.device) for size in cost_BST.shape[1:])
    inside_BS1 = row_S[:, None] < student_lengths_B[:, None, None]
    inside_BST = inside_BS1 & (column_T < teacher_lengths_B[:, None, None])
    working = torch.float32 if cost_BST.device.type == "mps" else torch.float64
    step_BST = cost_BST.to(working) / -gamma
    step_BST = torch.where(step_BST == math.inf, math.nan, step_BST)  # a cost of -inf has no meaning
    log_DBS, share_D3BS = _forward(_skew(torch.where(inside_BST, step_BST, -math.inf)))
    last_B = (student_lengths_B + teacher_lengths_B - 2).clamp_min(0)
    row_B, pair_B = (student_lengths_B - 1).clamp_min(0), torch.arange(cost_BST.shape[0], device=cost_BST.device)
    empty_B = (student_lengths_B == 0) | (teacher_lengths_B == 0)
    value_B = torch.where(empty_B, 0.0, -gamma * log_DBS[last_B, pair_B, row_B])
    seed_DBS = torch.zeros_like(log_DBS)
    seed_DBS[last_B, pair_B, row_B] = torch.where(empty_B, 0.0, 1.0).to(working)
    gradient_BST = _unskew(_backward(share_D3BS, seed_DBS), cost_BST.shape[2])
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


def _skew(x_BST: Tensor) -> Tensor:
    """[D, B, S] with out[i + j, b, i] = x[b, i, j] and -inf where there is no such cell."""
    num_pairs, num_rows, num_columns = x_BST.shape
    padded = F.pad(x_BST, (0, num_rows), value=-math.inf).flatten(1)[:, :-num_rows]
    return padded.view(num_pairs, num_rows, num_rows + num_columns - 1).permute(2, 0, 1).contiguous()


def _unskew(x_DBS: Tensor, num_columns: int) -> Tensor:
    """[B, S, T] with out[b, i, j] = x[i + j, b, i]: the inverse of `_skew`."""
    num_diagonals, num_pairs, num_rows = x_DBS.shape
    padded = F.pad(x_DBS.permute(1, 2, 0).reshape(num_pairs, -1), (0, num_rows))
    return padded.view(num_pairs, num_rows, num_diagonals + 1)[:, :, :num_columns]


# -- long sequences


def is_long(cells: int, device: torch.device) -> bool:
    """Whether a batch of so many cells is worked block by block; without the compiled kernels, never.

    Later on a GPU, whose own recursion is faster as long as its 48 bytes a cell are there.
    """
    return cells > (LONG_CELLS if device.type == "cpu" else 8 * LONG_CELLS) and has_cpu_kernels()


def cosine_soft_dtw(
    x_BSE: Tensor, y_BTE: Tensor, lengths: tuple[Tensor, Tensor], *,
    gamma: float, band: Band | None = None, in_blocks: bool = False,
) -> Tensor:  # fmt: skip
    """`soft_dtw` of the cosine costs of two sides, with a band added, [B]; gradient goes to the vectors alone.

    `in_blocks`: as the module says, in float32; then NaN, in value and gradient, also where a cost is beyond the
    kernels' exponent.
    """
    if not in_blocks:
        cost_BST = cosine_cost(x_BSE, y_BTE)
        return soft_dtw(cost_BST if band is None else cost_BST + band.dense(y_BTE.shape[1]), *lengths, gamma=gamma)
    value_B: Tensor = _Long.apply(  # type: ignore[no-untyped-call]
        unit_vectors(x_BSE), unit_vectors(y_BTE), lengths, gamma, band
    )
    return value_B


class _Long(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_BSE: Tensor, y_BTE: Tensor, lengths: tuple[Tensor, Tensor], gamma: float, band: Band | None
    ) -> Tensor:
        from xkd_trainer.cpu_kernels.soft_dtw import Rows

        ctx.save_for_backward(x_BSE, y_BTE)
        ctx.band, ctx.rows, values = band, [], []
        ctx.sizes = list(zip(*(side.tolist() for side in lengths), strict=True))
        for pair, (size, other) in enumerate(ctx.sizes):
            rows = None
            if size and other:
                rows = Rows((size, other), gamma)
                try:
                    for block in blocks_of(size, other):
                        rows.forward(_costs(x_BSE[pair], y_BTE[pair, :other], band and band.at(pair), block))
                except ValueError:
                    rows.above.clear()
            ctx.rows.append(rows)
            values.append(0.0 if rows is None else rows.value() if rows.above else math.nan)
        return x_BSE.new_tensor(values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream_B: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        x_BSE, y_BTE = ctx.saved_tensors
        to_x_BSE, to_y_BTE = torch.zeros_like(x_BSE), torch.zeros_like(y_BTE)
        for pair, (rows, (size, other)) in enumerate(zip(ctx.rows, ctx.sizes, strict=True)):
            if rows is not None and not rows.above:
                to_x_BSE[pair], to_y_BTE[pair] = math.nan, math.nan
                continue
            y_TE, band = y_BTE[pair, :other], ctx.band and ctx.band.at(pair)
            for number, block in reversed(list(enumerate(blocks_of(size, other) if rows is not None else ()))):
                visits_RT = torch.from_numpy(rows.backward(_costs(x_BSE[pair], y_TE, band, block), number))
                slope_RT = visits_RT.to(x_BSE.device) * -upstream_B[pair]  # a cost is 1 less the product
                to_x_BSE[pair, block] += slope_RT @ y_TE
                to_y_BTE[pair, :other] += slope_RT.mT @ x_BSE[pair, block]
        return to_x_BSE, to_y_BTE, None, None, None


def blocks_of(size: int, other: int) -> Iterator[slice]:
    """Rows of each block."""
    return slices(0, size, max(1, BLOCK_CELLS // other))


def _costs(x_SE: Tensor, y_TE: Tensor, band: Band | None, block: slice) -> Any:
    cost_RT = 1.0 - x_SE[block] @ y_TE.mT
    if band is not None:
        cost_RT += band.at(block).dense(len(y_TE))
    return cost_RT.cpu().contiguous().numpy()

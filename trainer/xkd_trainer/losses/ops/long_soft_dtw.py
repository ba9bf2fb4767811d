"""Soft-DTW of long sequences: costs are made of the vectors, some rows at a time, and made again for the gradient.

What is kept between is one row of path sums for each block, so that nothing has the size of both lengths. The result
is that of `soft_dtw` on `cosine_cost` plus a band. Compiled kernels run the recursion, on the CPU; products are made
where the vectors are.

Shape legend for this file
    B pairs    S student tokens    T teacher tokens    R rows of a block    E width
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from xkd_trainer.losses.ops.soft_dtw import diagonal_of
from xkd_trainer.models.measures import LONG_CELLS, has_cpu_kernels, unit_vectors

BLOCK_CELLS: Final = 1 << 20
"""Cells of a block: its costs have 4 MB, its shares 12."""


def is_long(cells: int, device: torch.device) -> bool:
    """Whether a batch of so many cells is worked block by block; without the compiled kernels, never.

    Later on a GPU, whose own recursion is faster as long as its 48 bytes a cell are there.
    """
    return cells > (LONG_CELLS if device.type == "cpu" else 8 * LONG_CELLS) and has_cpu_kernels()


@dataclass(frozen=True, kw_only=True, slots=True)
class Band:
    """What is added to the cost of a cell (i, j), counted from 1: `penalty` where |j - centre_i| > half_i."""

    centre_BS: Tensor
    half_BS: Tensor
    penalty: float


def soft_band(  # noqa: PLR0913 - as `band_penalty`
    attended_BS: Tensor, entropy_BS: Tensor, lengths: tuple[Tensor, Tensor], *,
    width: float, beta: float, centre_mix: float, penalty: float,
) -> Band:  # fmt: skip
    """`band_penalty` from the mean place that each student token attends to, from 1, and the entropy in nats."""
    diagonal_BS = diagonal_of(attended_BS, *lengths)
    centre_BS = centre_mix * attended_BS + (1.0 - centre_mix) * diagonal_BS
    return Band(centre_BS=centre_BS, half_BS=width + beta * entropy_BS, penalty=penalty)


def sakoe_chiba(like_BS: Tensor, lengths: tuple[Tensor, Tensor], *, width: float) -> Band:
    """`hard_band`."""
    diagonal_BS = diagonal_of(like_BS, *lengths)
    half_BS = (diagonal_BS[:, :1].clamp_min(max(width, 1.0)) * (1.0 + 1e-6)).expand_as(diagonal_BS)
    return Band(centre_BS=diagonal_BS, half_BS=half_BS, penalty=math.inf)


def long_soft_dtw(
    x_BSE: Tensor, y_BTE: Tensor, lengths: tuple[Tensor, Tensor], *, gamma: float, band: Band | None = None
) -> Tensor:
    """`soft_dtw` of the cosine costs of two sides, [B] float32; gradient goes to the vectors alone.

    NaN, in value and gradient, where a cost is NaN or beyond the kernels' exponent.
    """
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
                        rows.forward(_costs(x_BSE[pair], y_BTE[pair, :other], _of_pair(band, pair), block))
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
            y_TE, band = y_BTE[pair, :other], _of_pair(ctx.band, pair)
            for number, block in reversed(list(enumerate(blocks_of(size, other) if rows is not None else ()))):
                visits_RT = torch.from_numpy(rows.backward(_costs(x_BSE[pair], y_TE, band, block), number))
                slope_RT = visits_RT.to(x_BSE.device) * -upstream_B[pair]  # a cost is 1 less the product
                to_x_BSE[pair, block] += slope_RT @ y_TE
                to_y_BTE[pair, :other] += slope_RT.mT @ x_BSE[pair, block]
        return to_x_BSE, to_y_BTE, None, None, None


def blocks_of(size: int, other: int) -> Iterator[slice]:
    """Rows of each block."""
    step = max(1, BLOCK_CELLS // other)
    return (slice(first, min(first + step, size)) for first in range(0, size, step))


def _of_pair(band: Band | None, pair: int) -> Band | None:
    return band and Band(centre_BS=band.centre_BS[pair], half_BS=band.half_BS[pair], penalty=band.penalty)


def _costs(x_SE: Tensor, y_TE: Tensor, band: Band | None, block: slice) -> Any:
    cost_RT = 1.0 - x_SE[block] @ y_TE.mT
    if band is not None:
        column_T = torch.arange(1, len(y_TE) + 1, device=y_TE.device)
        outside_RT = (column_T - band.centre_BS[block, None]).abs() > band.half_BS[block, None]
        cost_RT = torch.where(outside_RT, cost_RT + band.penalty, cost_RT)
    return cost_RT.cpu().contiguous().numpy()

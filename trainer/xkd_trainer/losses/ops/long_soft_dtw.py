"""Soft-DTW of two sequences of vectors. Of long ones costs are made some rows at a time, and again for the gradient.

What is kept between is one row of path sums for each block, so that nothing has the size of both lengths. Compiled
kernels run the recursion, on the CPU; products are made where the vectors are.

Shape legend for this file
    B pairs    S student tokens    T teacher tokens    R rows of a block    E width
"""

import math
from collections.abc import Iterator
from typing import Any, Final

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from xkd_trainer.losses.ops.soft_dtw import Band, cosine_cost, soft_dtw
from xkd_trainer.losses.ops.softmax_rows import slices
from xkd_trainer.models.measures import LONG_CELLS, has_cpu_kernels, unit_vectors

BLOCK_CELLS: Final = 1 << 20
"""Cells of a block: its costs have 4 MB, its shares 12."""


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

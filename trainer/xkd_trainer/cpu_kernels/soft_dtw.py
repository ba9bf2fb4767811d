"""CPU kernels of soft-DTW in float32: value and gradient of a batch of pairs, with neither exp nor log for a cell.

A cell holds Z = exp(-R / gamma) as mantissa * 2**exponent, so the recursion of Cuturi and Blondel (arXiv 1703.01541)
is two additions and one multiplication and its range is that of the exponent. The share of each predecessor in the
sum is kept, and the same call pushes the gradient back through the shares: three floats of memory a cell, for one pair
at a time. Everything runs along anti-diagonals, whose cells do not depend on each other and fill vector registers.
What is far off the path is cut to zero before it becomes a denormal number, on which processors are many times slower.

Compiled at its first use in a process, in two to four seconds.

Shape legend for this file
    B pairs    S student tokens    T teacher tokens    D anti-diagonals, S + T - 1    K cells of one anti-diagonal
Scratch arrays have 3 rows, one for each of the last three anti-diagonals, and are used by (anti-diagonal modulo 3).
"""

import math
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from xkd_trainer.cpu_kernels.compiled import among_threads, compile_kernel, series

Array = npt.NDArray[Any]

CELLS_WORTH_A_THREAD: Final = 1 << 17

ZERO, ONE = np.float32(0), np.float32(1)
LN2: Final = np.float32(math.log(2.0))
MANTISSA_BITS, BIAS = np.int32(23), np.int32(127)
"""Of a float32; BIAS is the exponent bits of the number 1."""
FRACTION_MASK, ONE_BITS = np.int32((1 << 23) - 1), np.int32(127 << 23)
FAINT: Final = np.int32(60)
"""Smaller than 2**-FAINT of the largest predecessor is dropped; 2**(-2 * FAINT) is a normal number."""
LIMIT: Final = float(1 << 27)  # largest magnitude of the exponent along a whole path
NEVER: Final = np.int32(-(1 << 29))  # exponent of a cell that no path reaches


@compile_kernel
def _shrink(exponent: Any, largest: Any) -> Any:
    difference = np.int32(exponent - largest)
    power = np.int32(np.int32(max(difference, -FAINT) + BIAS) << MANTISSA_BITS).view(np.float32)
    return power if difference > -FAINT else ZERO


@compile_kernel
def _advance(step: Any, near: Any, far: Any, out: Any, shares: Any) -> None:
    """Make the K cells of one anti-diagonal out of the two before it."""
    near_m, near_e = near
    far_m, far_e = far
    out_m, out_e = out
    left_share, up_share, corner_share = shares
    for k in range(step.size):
        left_e, up_e, corner_e = near_e[k + 1], near_e[k], far_e[k]
        largest = max(left_e, max(up_e, corner_e))
        left = near_m[k + 1] * _shrink(left_e, largest)
        up = near_m[k] * _shrink(up_e, largest)
        corner = far_m[k] * _shrink(corner_e, largest)
        total = left + up + corner
        inverse = ONE / total if total > ZERO else ZERO
        left_share[k], up_share[k], corner_share[k] = left * inverse, up * inverse, corner * inverse
        whole = math.floor(step[k] + 0.5)
        bits = np.float32(total * series(np.float32(step[k] - whole) * LN2)).view(np.int32)
        alive = total > ZERO and step[k] > -LIMIT
        out_m[k] = np.int32((bits & FRACTION_MASK) | ONE_BITS).view(np.float32) if alive else ZERO
        out_e[k] = np.int32(largest + np.int32(whole) + np.int32(bits >> MANTISSA_BITS) - BIAS) if alive else NEVER


@compile_kernel
def _pull(near: Any, far: Any, out: Any, shares: Any) -> None:
    """What each cell of one anti-diagonal gets from the two after it."""
    left_share, up_share, corner_share = shares
    flushed = np.float32(2.0**-60)
    for k in range(out.size):
        value = near[k] * left_share[k] + near[k + 1] * up_share[k] + far[k] * corner_share[k]
        out[k] = value if value > flushed else ZERO


@compile_kernel
def _cells(diagonal: int, student_length: int, teacher_length: int) -> tuple[int, int]:
    return max(0, diagonal - teacher_length + 1), min(student_length, diagonal + 1)


@compile_kernel
def _steps(cost: Any, diagonal: int, low: int, scale: float, bound: float, step: Any) -> int:
    """-cost / (gamma ln 2), float64, of the cells (low + k, diagonal - low - k); how many are beyond `bound` or NaN.

    A cost of +inf is none of them: its step is so small that its cell is forbidden.
    """
    for k in range(step.size):
        step[k] = -scale * cost[low + k, diagonal - low - k]
    odd = 0
    for k in range(step.size):
        odd += not abs(step[k]) <= bound
    if odd > 0:
        for k in range(step.size):
            if step[k] == -math.inf:
                step[k] = -2.0 * LIMIT
                odd -= 1
    return odd


@compile_kernel
def _forward(cost: Any, limits: Any, above: Any, below: Any, scratch: Any, shares: Any) -> bool:
    """Fill the shares of some rows, and the cells `below` of the last one; False if a cost is too large, or -inf.

    `limits` are the scale and the bound of `_steps`; `above` is the row in front of them, from the cell at column -1
    on, and `below` has the same shape.
    """
    rows, columns = cost.shape
    scale, bound = limits
    above_m, above_e = above
    below_m, below_e = below
    mantissa, exponent, step = scratch
    mantissa[:], exponent[:] = 0, NEVER
    mantissa[1, 0], exponent[1, 0] = above_m[0], above_e[0]  # corner of the first cell
    below_m[0], below_e[0] = 0, NEVER
    for d in range(rows + columns - 1):
        low, high = _cells(d, rows, columns)
        if _steps(cost, d, low, scale, bound, step[: high - low]) > 0:
            return False
        a, b, c = d % 3, (d + 2) % 3, (d + 1) % 3
        if d < columns:
            mantissa[b, 0], exponent[b, 0] = above_m[d + 1], above_e[d + 1]
        _advance(
            step[: high - low],
            (mantissa[b, low : high + 1], exponent[b, low : high + 1]),
            (mantissa[c, low:high], exponent[c, low:high]),
            (mantissa[a, low + 1 : high + 1], exponent[a, low + 1 : high + 1]),
            (shares[0, d, low:high], shares[1, d, low:high], shares[2, d, low:high]),
        )
        if d >= rows - 1:
            below_m[d - rows + 2], below_e[d - rows + 2] = mantissa[a, rows], exponent[a, rows]
    return True


@compile_kernel
def _backward(shares: Any, mass: Any, given: Any, gradient: Any) -> None:
    """Write the expected alignment of some rows, the gradient by their costs, from their shares.

    `given` is what each cell of the last row gets from the row below it, in the end the 1 of the last cell.
    """
    rows, columns = gradient.shape
    mass[:] = 0
    for d in range(rows + columns - 2, -1, -1):
        low, high = _cells(d, rows, columns)
        a, b, c = d % 3, (d + 1) % 3, (d + 2) % 3
        below = slice(low + 1, high + 1)
        _pull(
            mass[b, low : high + 1],
            mass[c, below],
            mass[a, low:high],
            (shares[0, d + 1, low:high], shares[1, d + 1, below], shares[2, d + 2, below]),
        )
        if d >= rows - 1:
            mass[a, rows - 1] += given[d - rows + 1]
        for k in range(high - low):
            gradient[low + k, d - low - k] = mass[a, low + k]


@compile_kernel
def _make_scratch(rows: int) -> Any:
    whole, near = np.zeros((3, rows + 1), np.float32), np.zeros((3, rows + 1), np.int32)
    return whole, near, np.zeros(rows, np.float64)


@compile_kernel
def _make_row(columns: int) -> Any:
    return np.zeros(columns + 1, np.float32), np.full(columns + 1, NEVER, np.int32)


@compile_kernel
def _first_row(columns: int) -> Any:
    """What stands in front of the first row: the empty path, at column -1."""
    mantissa, exponent = _make_row(columns)
    mantissa[0], exponent[0] = ONE, 0
    return mantissa, exponent


@compile_kernel
def _batch(cost: Any, lengths: Any, gamma: float, values: Any, gradient: Any) -> None:
    student_lengths, teacher_lengths = lengths
    rows, columns = cost.shape[1:]
    scratch, mass = _make_scratch(rows), np.zeros((3, rows + 1), np.float32)
    shares = np.zeros((3, rows + columns + 1, rows + 1), np.float32)
    scale = 1.0 / (gamma * math.log(2.0))
    below = _make_row(columns)
    for b in range(cost.shape[0]):
        s, t = student_lengths[b], teacher_lengths[b]
        if s > 0 and t > 0:
            whole, above, given = cost[b, :s, :t], _first_row(t), np.zeros(t, np.float32)
            values[b], given[t - 1] = math.nan, ONE
            if _forward(whole, (scale, LIMIT / (s + t)), above, below, scratch, shares):
                values[b] = (math.log2(below[0][t]) + below[1][t]) / -scale
                _backward(shares, mass, given, gradient[b, :s, :t])


def soft_dtw(
    cost_BST: Array, student_lengths_B: Array, teacher_lengths_B: Array, gamma: float, threads: int
) -> tuple[Array, Array] | None:
    """Values [B], float64, and their gradient by the costs [B, S, T], float32.

    Costs are C-contiguous float32, lengths int64 and not checked here; cells outside them are not read. A cost of +inf
    forbids its cell; a pair with no path has the value +inf. None where a cost is NaN, -inf or beyond the exponent:
    cost / gamma of about 2**26 / (S + T). Pairs are spread over threads where there is work enough.
    """
    values, slopes = np.zeros(len(cost_BST)), np.zeros(cost_BST.shape, np.float32)

    def work(b: slice) -> None:
        _batch(cost_BST[b], (student_lengths_B[b], teacher_lengths_B[b]), float(gamma), values[b], slopes[b])

    among_threads(work, len(cost_BST), max(1, min(threads, cost_BST.size // CELLS_WORTH_A_THREAD)))
    return None if np.isnan(values).any() else (values, slopes)


class Rows:
    """One pair of sequences, some rows of costs at a time: from the first to the last, then back for the gradient.

    `lengths` are those of the pair. Costs are C-contiguous float32 [R, T]; what is kept of a block is its last row.
    """

    def __init__(self, lengths: tuple[int, int], gamma: float) -> None:
        self.scale, self.bound = 1.0 / (gamma * math.log(2.0)), LIMIT / sum(lengths)
        self.above = [_first_row(lengths[1])]
        self.given = np.zeros(lengths[1], np.float32)
        self.given[-1] = ONE

    def forward(self, cost: Array) -> None:
        """The next block; ValueError where a cost is beyond the exponent, NaN or -inf."""
        self.above.append(self._fill(cost, self.above[-1])[0])

    def value(self) -> float:
        """Soft minimum over all blocks so far; +inf where there is no path."""
        mantissa, exponent = self.above[-1]
        return float(np.log2(mantissa[-1]) + exponent[-1]) / -self.scale if mantissa[-1] > 0 else math.inf

    def backward(self, cost: Array, number: int) -> Array:
        """Gradient by the costs of block `number`, [R, T]; the blocks behind it were asked for before."""
        shares = self._fill(cost, self.above[number])[1]
        gradient = np.zeros(cost.shape, np.float32)
        _backward(shares, np.zeros((3, len(cost) + 1), np.float32), self.given, gradient)
        to_row, column = gradient[0], np.arange(cost.shape[1])
        self.given = to_row * shares[1, column, 0]
        self.given[:-1] += to_row[1:] * shares[2, column[1:], 0]
        return gradient

    def _fill(self, cost: Array, above: Any) -> tuple[Any, Array]:
        rows, columns = cost.shape
        below, shares = _make_row(columns), np.zeros((3, rows + columns + 1, rows + 1), np.float32)
        if not _forward(cost, (self.scale, self.bound), above, below, _make_scratch(rows), shares):
            raise ValueError("soft_dtw: a cost is NaN, -inf or beyond the exponent")
        return below, shares

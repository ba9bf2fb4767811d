"""CPU kernels of soft-DTW: value and gradient of a batch of pairs, without exp or log in the chain of cells.

A cell holds Z = exp(-R / gamma) as mantissa * 2**exponent, so the recursion of Cuturi and Blondel (arXiv 1703.01541)
is two additions and one multiplication and its range is that of the exponent. The share of each predecessor in the
sum is kept, and the same call pushes the gradient back through the shares: three floats of memory a cell, for one pair
at a time. Everything runs along anti-diagonals, whose cells do not depend on each other and fill vector registers.
What is far off the path is cut to zero before it becomes a denormal number, on which processors are many times slower.

Each float type is compiled at its first use in a process, in two to four seconds.

Shape legend for this file
    B pairs    S student tokens    T teacher tokens    D anti-diagonals, S + T - 1    K cells of one anti-diagonal
Scratch arrays have 3 rows, one for each of the last three anti-diagonals, and are used by (anti-diagonal modulo 3).
"""

import math
from dataclasses import dataclass
from typing import Any, Final

import numba
import numpy as np
import numpy.typing as npt

from xkd_trainer.cpu_kernels.compiled import among_threads, bits_of, compile_kernel, float_of

Array = npt.NDArray[Any]

CELLS_WORTH_A_THREAD: Final = 1 << 17

FINE: Final = 0
TOO_LARGE: Final = 1
"""Status of a pair with a cost / gamma beyond the exponent of this float type."""
NOT_A_NUMBER: Final = 2
"""Status of a pair whose costs hold NaN or minus infinity."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Width:
    """What a kernel has to know about its float type."""

    real: Any
    """numpy type of mantissas, shares and gradient."""
    integer: Any
    """numpy integer type of the same size."""
    mantissa_bits: int
    bias: int
    """Exponent bits of the number 1."""
    faint: int
    """Smaller than 2**-faint of the largest predecessor is dropped; 2**(-2 * faint) must be a normal number."""
    limit: int
    """Largest magnitude of the exponent along a whole path."""
    terms: int
    """Degree of the polynomial for 2**x."""


SINGLE: Final = Width(real=np.float32, integer=np.int32, mantissa_bits=23, bias=127, faint=60, limit=1 << 27, terms=7)
DOUBLE: Final = Width(
    real=np.float64, integer=np.int64, mantissa_bits=52, bias=1023, faint=400, limit=1 << 50, terms=14
)


def _power_of_two(width: Width) -> Any:
    """2**fraction for |fraction| <= 1/2: the Taylor polynomial in fraction * ln 2."""
    one, ln2 = width.real(1), width.real(math.log(2.0))
    inverses = tuple(width.real(1.0 / n) for n in range(width.terms, 0, -1))

    @compile_kernel
    def power_of_two(fraction: Any) -> Any:
        x = fraction * ln2
        value = one
        for inverse in numba.literal_unroll(inverses):
            value = one + x * inverse * value
        return value

    return power_of_two


def _advance(width: Width) -> Any:
    """The kernel that makes the K cells of one anti-diagonal out of the two before it."""
    one, zero, integer = width.real(1), width.real(0), width.integer
    shift, bias, dropped = integer(width.mantissa_bits), integer(width.bias), integer(-width.faint)
    fraction_mask, one_bits = integer((1 << width.mantissa_bits) - 1), integer(width.bias << width.mantissa_bits)
    never, forbidden = integer(-4 * width.limit), float(-width.limit)
    real, power_of_two = width.real, _power_of_two(width)

    @compile_kernel
    def shrink(exponent: Any, largest: Any) -> Any:
        difference = integer(exponent - largest)
        power = float_of(integer(integer(max(difference, dropped) + bias) << shift))
        return power if difference > dropped else zero

    @compile_kernel
    def advance(step: Any, near: Any, far: Any, out: Any, shares: Any) -> None:
        near_m, near_e = near
        far_m, far_e = far
        out_m, out_e = out
        left_share, up_share, corner_share = shares
        for k in range(step.size):
            left_e, up_e, corner_e = near_e[k + 1], near_e[k], far_e[k]
            largest = max(left_e, max(up_e, corner_e))
            left = near_m[k + 1] * shrink(left_e, largest)
            up = near_m[k] * shrink(up_e, largest)
            corner = far_m[k] * shrink(corner_e, largest)
            total = left + up + corner
            inverse = one / total if total > zero else zero
            left_share[k], up_share[k], corner_share[k] = left * inverse, up * inverse, corner * inverse
            whole = math.floor(step[k] + 0.5)
            bits = bits_of(total * power_of_two(real(step[k] - whole)))
            alive = total > zero and step[k] > forbidden
            out_m[k] = float_of(integer((bits & fraction_mask) | one_bits)) if alive else zero
            out_e[k] = integer(largest + integer(whole) + integer(bits >> shift) - bias) if alive else never

    return advance


@compile_kernel
def _cells(diagonal: int, student_length: int, teacher_length: int) -> tuple[int, int]:
    """Half-open range of the rows that an anti-diagonal crosses."""
    return max(0, diagonal - teacher_length + 1), min(student_length, diagonal + 1)


@compile_kernel
def _odd_cells(step: Any, limit: float, forbidden: float) -> int:
    """Give forbidden cells (cost +inf) their mark; the status of the anti-diagonal."""
    status = FINE
    for k in range(step.size):
        if step[k] == -math.inf:
            step[k] = forbidden
        elif not abs(step[k]) < math.inf:
            return NOT_A_NUMBER
        elif abs(step[k]) > limit:
            status = TOO_LARGE
    return status


@compile_kernel
def _steps(cost: Any, diagonal: int, low: int, scale: float, step: Any) -> None:
    """-cost / (gamma ln 2), float64, of the cells (low + k, diagonal - low - k)."""
    for k in range(step.size):
        step[k] = -scale * cost[low + k, diagonal - low - k]


@compile_kernel
def _num_odd(step: Any, limit: float) -> int:
    """How many steps are not finite or beyond `limit`."""
    count = 0
    for k in range(step.size):
        count += not abs(step[k]) <= limit
    return count


def _forward(width: Width) -> Any:
    """The kernel that fills the shares of one pair: (log2 Z of its last cell, status)."""
    advance, one, zero = _advance(width), width.real(1), width.integer(0)
    never, limit, forbidden = width.integer(-4 * width.limit), float(width.limit), float(-2 * width.limit)

    @compile_kernel
    def forward(cost: Any, scale: float, mantissa: Any, exponent: Any, step: Any, shares: Any) -> tuple[float, int]:
        rows, columns = cost.shape
        bound = limit / (rows + columns)
        mantissa[:], exponent[:] = 0, never
        mantissa[1, 0], exponent[1, 0] = one, zero  # the empty path, corner of the first cell
        for d in range(rows + columns - 1):
            low, high = _cells(d, rows, columns)
            steps = step[: high - low]
            _steps(cost, d, low, scale, steps)
            if _num_odd(steps, bound) > 0:
                status = _odd_cells(steps, bound, forbidden)
                if status != FINE:
                    return 0.0, status
            a, b, c = d % 3, (d + 2) % 3, (d + 1) % 3
            advance(
                steps,
                (mantissa[b, low : high + 1], exponent[b, low : high + 1]),
                (mantissa[c, low:high], exponent[c, low:high]),
                (mantissa[a, low + 1 : high + 1], exponent[a, low + 1 : high + 1]),
                (shares[0, d, low:high], shares[1, d, low:high], shares[2, d, low:high]),
            )
            mantissa[1, 0], exponent[1, 0] = 0, never
        last = (rows + columns - 2) % 3
        return math.log2(mantissa[last, rows]) + exponent[last, rows], FINE

    return forward


def _backward(width: Width) -> Any:
    """The kernel that writes the expected alignment of one pair, its gradient by the costs, from its shares."""
    flushed, zero, one = width.real(2.0**-width.faint), width.real(0), width.real(1)

    @compile_kernel
    def pull(near: Any, far: Any, out: Any, shares: Any) -> None:
        left_share, up_share, corner_share = shares
        for k in range(out.size):
            value = near[k] * left_share[k] + near[k + 1] * up_share[k] + far[k] * corner_share[k]
            out[k] = value if value > flushed else zero

    @compile_kernel
    def backward(shares: Any, mass: Any, gradient: Any) -> None:
        rows, columns = gradient.shape
        mass[:] = 0
        for d in range(rows + columns - 2, -1, -1):
            low, high = _cells(d, rows, columns)
            a, b, c = d % 3, (d + 1) % 3, (d + 2) % 3
            pull(
                mass[b, low : high + 1],
                mass[c, low + 1 : high + 1],
                mass[a, low:high],
                (
                    shares[0, d + 1, low:high],
                    shares[1, d + 1, low + 1 : high + 1],
                    shares[2, d + 2, low + 1 : high + 1],
                ),
            )
            if d == rows + columns - 2:
                mass[a, rows - 1] = one
            for k in range(high - low):
                gradient[low + k, d - low - k] = mass[a, low + k]

    return backward


def _batch(width: Width) -> Any:
    """The kernel for a batch of pairs: see `SINGLE_BATCH`."""
    forward, backward, real, integer = _forward(width), _backward(width), width.real, width.integer

    @compile_kernel
    def batch(cost: Any, student_lengths: Any, teacher_lengths: Any, gamma: float, out: Any) -> None:
        values, gradient, status = out
        rows, columns = cost.shape[1:]
        mantissa, exponent = np.zeros((3, rows + 1), real), np.zeros((3, rows + 1), integer)
        mass, step = np.zeros((3, rows + 1), real), np.zeros(rows, np.float64)
        shares = np.zeros((3, rows + columns + 1, rows + 1), real)
        scale = 1.0 / (gamma * math.log(2.0))
        for b in range(cost.shape[0]):
            s, t = student_lengths[b], teacher_lengths[b]
            if s > 0 and t > 0:
                logarithm, status[b] = forward(cost[b, :s, :t], scale, mantissa, exponent, step, shares)
                values[b] = -logarithm / scale
                if gradient.size > 0 and status[b] == FINE:
                    backward(shares, mass, gradient[b, :s, :t])

    return batch


SINGLE_BATCH: Final = _batch(SINGLE)
"""(cost [B, S, T], student lengths [B], teacher lengths [B], gamma, (values [B], gradient [B, S, T], status [B])).

Costs and gradient are C-contiguous float32, values float64, lengths and status int64. The three outputs come in as
zeros and are filled; pairs with a length of 0 and cells outside the lengths are left alone. A gradient of size 0 is
not computed. Lengths are not checked here. A cost of +inf forbids its cell; a pair with no path has the value +inf.
Values and gradient of a pair whose status is not FINE mean nothing.
"""
DOUBLE_BATCH: Final = _batch(DOUBLE)
"""The same with float64 costs and gradient."""


def soft_dtw(
    cost_BST: Array, student_lengths_B: Array, teacher_lengths_B: Array, gamma: float, *, gradient: bool, threads: int
) -> tuple[Array, Array] | None:
    """Values [B] in float64 and their gradient by the costs [B, S, T] in the cost's dtype, of size 0 if not asked for.

    Pairs are spread over threads where there is work enough. float32 costs beyond the exponent of the float32 kernel,
    which takes cost / gamma of about 2**26 / (S + T), are done by the float64 kernel; None where its exponent, about
    2**50 / (S + T), is too small as well.
    """
    num_pairs = len(cost_BST)
    values, status = np.zeros(num_pairs), np.zeros(num_pairs, np.int64)
    slopes = np.zeros(cost_BST.shape if gradient else (num_pairs, 0, 0), cost_BST.dtype)
    kernel = SINGLE_BATCH if cost_BST.dtype == np.float32 else DOUBLE_BATCH

    def work(b: slice) -> None:
        lengths = student_lengths_B[b], teacher_lengths_B[b]
        kernel(cost_BST[b], *lengths, float(gamma), (values[b], slopes[b], status[b]))

    among_threads(work, num_pairs, max(1, min(threads, cost_BST.size // CELLS_WORTH_A_THREAD)))
    if (status == TOO_LARGE).any():
        if kernel is DOUBLE_BATCH:
            return None
        lengths = student_lengths_B, teacher_lengths_B
        return soft_dtw(cost_BST.astype(np.float64), *lengths, gamma, gradient=gradient, threads=threads)
    for b in np.flatnonzero(status == NOT_A_NUMBER):
        values[b] = math.nan
        slopes[b, : student_lengths_B[b], : teacher_lengths_B[b]] = math.nan
    return values, slopes

"""CPU kernel of `measures.prediction_stats`: one row of logits at a time, piece by piece in the CPU's nearest cache.

Exponentials and sums of a row are taken while its numbers are at hand, which in torch are passes over memory of their
own. Sums are kept in as many parts as there are LANES, so that the result does not depend on how wide the vector
registers are, and are carried on in double precision from piece to piece.

Imports numba: compiled at its first use in a process, in about two seconds.

Shape legend for this file
    N positions    V classes    P numbers of a piece    L lanes
"""

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from xkd_trainer.cpu_kernels.compiled import among_threads, compile_kernel

Floats = npt.NDArray[np.float64]

PIECE: Final = 1024
"""Numbers taken at once: 4 KB in float32."""
LANES: Final = 64
"""Parts of a sum; a piece is a whole number of them."""
FLOOR: Final = np.float32(-80.0)
"""As in `measures.LOWEST`: a class further below the likeliest counts as this far."""
LOG2E: Final = np.float32(1.44269504)
LN2_HIGH: Final = np.float32(0.693359375)
LN2_LOW: Final = np.float32(-2.12194440e-4)
TERMS: Final = tuple(np.float32(1.0 / f) for f in (5040.0, 720.0, 120.0, 24.0, 6.0, 2.0, 1.0, 1.0))
"""Of the exponential's series, the highest power first: exact to float32 between -ln 2 / 2 and ln 2 / 2."""


@compile_kernel
def _widen(bits_P: Any, factor: Any, value_P: Any) -> None:
    """The float32 numbers of these bits."""
    value_bits_P = value_P.view(np.int32)
    for p in range(len(bits_P)):
        value_bits_P[p] = np.int32(bits_P[p]) * factor


@compile_kernel
def _largest(bits_V: Any, factor: Any, value_P: Any, top_L: Any) -> Any:
    """The largest number; NaN counts as none."""
    top_L[:] = -np.inf
    for first in range(0, len(bits_V), PIECE):
        piece_P = bits_V[first : first + PIECE]
        value_P[len(piece_P) :] = -np.inf
        _widen(piece_P, factor, value_P)
        for start in range(0, PIECE, LANES):
            for lane in range(LANES):
                value = value_P[start + lane]
                top_L[lane] = value if value > top_L[lane] else top_L[lane]
    return top_L.max()


@compile_kernel
def _place(bits_V: Any, factor: Any, top: Any, value_P: Any) -> int:
    """Where the first number equal to `top` stands, or -1."""
    for first in range(0, len(bits_V), PIECE):
        piece_P = bits_V[first : first + PIECE]
        _widen(piece_P, factor, value_P)
        equal = 0
        for p in range(len(piece_P)):
            equal += value_P[p] == top
        if equal:
            for p in range(len(piece_P)):
                if value_P[p] == top:
                    return first + p
    return -1


@compile_kernel
def series(rest: Any) -> Any:
    """The exponential of a number between -ln 2 / 2 and ln 2 / 2."""
    value = TERMS[0]
    value = value * rest + TERMS[1]
    value = value * rest + TERMS[2]
    value = value * rest + TERMS[3]
    value = value * rest + TERMS[4]
    value = value * rest + TERMS[5]
    value = value * rest + TERMS[6]
    return value * rest + TERMS[7]


@compile_kernel
def _exponentials(size: int, top: Any, value_P: Any, odds_P: Any, power_P: Any) -> None:
    """value - top, FLOOR at least, in place of each value, and its exponential; zeros after `size`."""
    odds_bits_P = odds_P.view(np.int32)
    for p in range(size):
        below = value_P[p] - top
        below = FLOOR if below < FLOOR else below
        power = np.float32(np.rint(below * LOG2E))
        rest = (below - power * LN2_HIGH) - power * LN2_LOW
        odds = series(rest)
        value_P[p], odds_P[p], power_P[p] = below, odds, power
    for p in range(size):
        odds_bits_P[p] += np.int32(power_P[p]) << 23
    value_P[size:] = np.float32(0.0)
    odds_P[size:] = np.float32(0.0)


@compile_kernel
def _add(value_P: Any, odds_P: Any, part_2L: Any, sums_2L: Any) -> None:
    """Add the exponentials, and their products with what they are of, to the sums of each lane."""
    part_2L[:] = np.float32(0.0)
    total_L, dot_L = part_2L[0], part_2L[1]
    for start in range(0, PIECE, LANES):
        for lane in range(LANES):
            total_L[lane] += odds_P[start + lane]
            dot_L[lane] += odds_P[start + lane] * value_P[start + lane]
    for lane in range(LANES):
        sums_2L[0, lane] += total_L[lane]
        sums_2L[1, lane] += dot_L[lane]


@compile_kernel
def _fill(bits_NV: Any, factor: Any, entropy_N: Any, argmax_N: Any, logsumexp_N: Any) -> None:
    """Every row's entropy, class of the largest logit and logsumexp; `factor` makes bits of float32 of the bits."""
    value_P, odds_P, power_P = np.empty(PIECE, np.float32), np.empty(PIECE, np.float32), np.empty(PIECE, np.float32)
    part_2L, sums_2L = np.empty((2, LANES), np.float32), np.empty((2, LANES), np.float64)
    for n in range(len(bits_NV)):
        bits_V = bits_NV[n]
        top = _largest(bits_V, factor, value_P, part_2L[0])
        sums_2L[:] = 0.0
        for first in range(0, len(bits_V), PIECE):
            piece_P = bits_V[first : first + PIECE]
            _widen(piece_P, factor, value_P)
            _exponentials(len(piece_P), top, value_P, odds_P, power_P)
            _add(value_P, odds_P, part_2L, sums_2L)
        total = sums_2L[0].sum()
        argmax_N[n] = _place(bits_V, factor, top, value_P)
        logsumexp_N[n] = top + np.log(total)
        entropy_N[n] = np.log(total) - sums_2L[1].sum() / total


def stats_of_bits(bits_NV: npt.NDArray[Any], threads: int = 1) -> tuple[Floats, npt.NDArray[np.int64], Floats]:
    """How sure a model is at each position, and of what, from logits as int16 (bits of bfloat16) or int32 (of
    float32).

    Rows have no gap. Entropy [N] in nats, float64; class of the largest logit [N], int64, the first of equals;
    logsumexp [N], float64. A row with NaN or +inf, or of -inf alone, has an entropy that is NaN. Threads change no
    result.

    >>> logits = np.array([[0.0, 0.0, 0.0, 0.0], [1.0, 9.0, 9.0, 1.0]], np.float32)
    >>> entropy, argmax, _ = stats_of_bits(logits.view(np.int32))
    >>> entropy.round(4).tolist(), argmax.tolist()
    ([1.3863, 0.6962], [0, 1])
    """
    entropy_N, logsumexp_N = np.empty(len(bits_NV)), np.empty(len(bits_NV))
    argmax_N = np.empty(len(bits_NV), np.int64)
    factor = np.int32(2**16 if bits_NV.dtype == np.int16 else 1)

    def fill(rows: slice) -> None:
        _fill(bits_NV[rows], factor, entropy_N[rows], argmax_N[rows], logsumexp_N[rows])

    among_threads(fill, len(bits_NV), threads)
    return entropy_N, argmax_N, logsumexp_N

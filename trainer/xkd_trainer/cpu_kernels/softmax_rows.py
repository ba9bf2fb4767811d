"""CPU kernels of softmaxes of float32 logits: what they say of a prediction, and losses with their gradient.

In torch every step of a softmax is a pass over memory of its own, and there are ten and more. Here a row is read once
for its maximum and once for everything else, piece by piece in the CPU's nearest cache; sums go on in double precision
from piece to piece.

Imports numba: compiled at its first use in a process, in about two seconds.

Shape legend for this file
    P positions    V classes    C classes of a piece    L lanes, parts of a sum on any processor
"""

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from xkd_trainer.cpu_kernels.compiled import among_threads, compile_kernel, compile_sums, series

Array = npt.NDArray[Any]

PIECE: Final = 1024  # classes taken at once: 4 KB
LANES: Final = 64
FLOOR: Final = np.float32(-80.0)
"""A class further below the likeliest, by a factor of 2e-35, counts as 0: no exponential is a denormal number."""
LOG2E: Final = np.float32(1.44269504)
LN2_HIGH: Final = np.float32(0.693359375)
LN2_LOW: Final = np.float32(-2.12194440e-4)
ZERO: Final = np.float32(0.0)


@compile_kernel
def _row(rows: Any, number: Any, classes: Any) -> Any:
    return rows[0][number * rows[1] : number * rows[1] + classes]


@compile_kernel
def _largest(row_V: Any) -> Any:
    top_L = np.full(LANES, -np.inf, np.float32)
    whole = len(row_V) // LANES * LANES
    for start in range(0, whole, LANES):
        for lane in range(LANES):
            value = row_V[start + lane]
            top_L[lane] = value if value > top_L[lane] else top_L[lane]
    for v in range(whole, len(row_V)):
        top_L[0] = row_V[v] if row_V[v] > top_L[0] else top_L[0]
    return top_L.max()


@compile_kernel
def _exponential(below: Any) -> Any:
    """e to the power of a number that is at most 0, 0 below FLOOR; NaN of NaN."""
    given = below
    below = FLOOR if below < FLOOR else below
    power = np.float32(np.rint(below * LOG2E))
    rest = (below - power * LN2_HIGH) - power * LN2_LOW
    bits = np.float32(series(rest)).view(np.int32) + (np.int32(power) << 23)
    odds = np.int32(bits).view(np.float32)
    return ZERO if given < FLOOR else odds


@compile_kernel
def _place(row_V: Any, top: Any) -> int:
    for first in range(0, len(row_V), PIECE):
        piece_C, equal = row_V[first : first + PIECE], 0
        for c in range(len(piece_C)):
            equal += piece_C[c] == top
        if equal > 0:
            for c in range(len(piece_C)):
                if piece_C[c] == top:
                    return first + c
    return -1


@compile_kernel
def _add_odds(logits_L: Any, top: Any, total_L: Any, dot_L: Any) -> None:
    """Add exponentials, FLOOR at least, and their products with what they are of to each lane's sums."""
    for lane in range(len(logits_L)):
        below = logits_L[lane] - top
        below = FLOOR if below < FLOOR else below
        odds = _exponential(below)
        total_L[lane] += odds
        dot_L[lane] += odds * below


@compile_kernel
def _statistics(logits: Any, classes: Any, entropy_P: Any, argmax_P: Any, logsumexp_P: Any) -> None:
    part_2L, sums_2L = np.empty((2, LANES), np.float32), np.empty((2, LANES), np.float64)
    for p in range(len(entropy_P)):
        logits_V = _row(logits, p, classes)
        top = _largest(logits_V)
        sums_2L[:] = 0.0
        for first in range(0, classes, PIECE):
            piece_C = logits_V[first : first + PIECE]
            part_2L[:] = ZERO
            for start in range(0, len(piece_C), LANES):
                _add_odds(piece_C[start : start + LANES], top, part_2L[0], part_2L[1])
            sums_2L += part_2L
        total = sums_2L[0].sum()
        argmax_P[p] = _place(logits_V, top)
        logsumexp_P[p] = top + np.log(total)
        entropy_P[p] = np.log(total) - sums_2L[1].sum() / total


@compile_sums
def _to_odds(logits_C: Any, top: Any) -> Any:
    total = ZERO
    for c in range(len(logits_C)):
        odds = _exponential(logits_C[c] - top)
        logits_C[c] = odds
        total += odds
    return total


@compile_kernel
def _cross_entropy(logits: Any, classes: Any, target_P: Any, factor: Any, loss_P: Any) -> None:
    for p in range(len(loss_P)):
        logits_V, target = _row(logits, p, classes), target_P[p]
        top, total = _largest(logits_V), 0.0
        below = logits_V[target] - top
        for first in range(0, len(logits_V), PIECE):
            total += _to_odds(logits_V[first : first + PIECE], top)
        share = np.float32(factor / total)
        for v in range(len(logits_V)):
            logits_V[v] *= share
        logits_V[target] -= np.float32(factor)
        loss_P[p] = np.log(total) - below


@compile_sums
def _gap_sums(student_C: Any, teacher_C: Any, tops: Any, coldness: Any, q_C: Any, p_C: Any) -> Any:
    """Exponentials of both sides; their sums, and that of the teacher's times the gap between what they are of."""
    q_sum, p_sum, dot = ZERO, ZERO, ZERO
    for c in range(len(student_C)):
        student, teacher = (student_C[c] - tops[0]) * coldness, (teacher_C[c] - tops[1]) * coldness
        q, p = _exponential(student), _exponential(teacher)
        q_C[c], p_C[c] = q, p
        q_sum += q
        p_sum += p
        dot += p * (teacher - student)
    return q_sum, p_sum, dot


@compile_kernel
def _forward_kl(  # noqa: PLR0913 - as `forward_kl`
    student: Any, teacher: Any, share_P: Any, coldness: Any, into: Any, odds_2V: Any, loss_P: Any
) -> None:
    """The exponentials have memory of their own: a loop that may write where it reads is not vectorised."""
    q_V, p_V, classes = odds_2V[0], odds_2V[1], odds_2V.shape[1]
    for n in range(len(loss_P)):
        student_V, teacher_V, into_V = _row(student, n, classes), _row(teacher, n, classes), _row(into, n, classes)
        tops = _largest(student_V), _largest(teacher_V)
        q_sum, p_sum, dot = 0.0, 0.0, 0.0
        for first in range(0, len(student_V), PIECE):
            last = first + PIECE
            sums = _gap_sums(
                student_V[first:last], teacher_V[first:last], tops, coldness, q_V[first:last], p_V[first:last]
            )
            q_sum += sums[0]
            p_sum += sums[1]
            dot += sums[2]
        q_share, p_share = np.float32(share_P[n] / q_sum), np.float32(share_P[n] / p_sum)
        for v in range(len(into_V)):
            into_V[v] = q_V[v] * q_share - p_V[v] * p_share
        loss_P[n] = dot / p_sum + np.log(q_sum) - np.log(p_sum)


def _flat(x_PV: Array) -> tuple[Array, int]:
    """The numbers from the first one to the last in a row, and how many lie from one row to the next.

    So a row is known to have no gaps, and is vectorised, even where the matrix is a slice of a wider one.

    >>> _flat(np.arange(6).reshape(2, 3)[:, :2])
    (array([0, 1, 2, 3, 4]), 3)
    """
    rows, classes = x_PV.shape
    step = x_PV.strides[0] // x_PV.itemsize
    size = (rows - 1) * step + classes if rows and classes else 0
    return np.lib.stride_tricks.as_strided(x_PV, (size,), (x_PV.itemsize,)), step


def statistics(logits_PV: Array, threads: int) -> tuple[Array, Array, Array]:
    """Entropy [P] in nats, first class of the largest logit [P], int64, and logsumexp [P] of float32 logits [P, V].

    Entropy and logsumexp are float32. A row with NaN or +inf, or of -inf alone, has NaN, and a class that means
    nothing. The number of threads changes no result.

    >>> statistics(np.zeros((1, 4), np.float32), 1)
    (array([1.3862944], dtype=float32), array([0]), array([1.3862944], dtype=float32))
    """
    entropy_P, logsumexp_P = np.empty(len(logits_PV), np.float32), np.empty(len(logits_PV), np.float32)
    argmax_P, classes = np.empty(len(logits_PV), np.int64), logits_PV.shape[1]

    def work(r: slice) -> None:
        _statistics(_flat(logits_PV[r]), classes, entropy_P[r], argmax_P[r], logsumexp_P[r])

    among_threads(work, len(logits_PV), threads)
    return entropy_P, argmax_P, logsumexp_P


def cross_entropy(logits_PV: Array, target_P: Array, factor: float, threads: int) -> Array:
    """-log p(target) [P], float32; the logits are overwritten by `factor` times its gradient.

    IndexError where a target is not one of the classes. The number of threads changes no result.

    >>> logits = np.zeros((1, 4), np.float32)
    >>> cross_entropy(logits, np.array([1]), 4.0, 1), logits.tolist()
    (array([1.3862944], dtype=float32), [[1.0, -3.0, 1.0, 1.0]])
    """
    classes = logits_PV.shape[1]
    if ((target_P < 0) | (target_P >= classes)).any():
        raise IndexError(f"a target is not one of the {classes} classes")
    loss_P = np.empty(len(logits_PV), np.float32)

    def work(r: slice) -> None:
        _cross_entropy(_flat(logits_PV[r]), classes, target_P[r], factor, loss_P[r])

    among_threads(work, len(logits_PV), threads)
    return loss_P


def forward_kl(  # noqa: PLR0913 - two sides, their weights, and the memory they may use
    student_PV: Array, teacher_PV: Array, share_P: Array, temperature: float, *, into_PV: Array, odds_P2V: Array,
    threads: int,
) -> Array:  # fmt: skip
    """KL(p || q) of softened logits [P], float32; `into` becomes `share` times q - p.

    All are float32, rows without a gap; the teacher's are left as they are, `into` may be the student's. `odds` is
    memory for exponentials, apart from all others; each thread uses that of its first row. Their number changes no
    result.

    >>> student, teacher = np.zeros((1, 2), np.float32), np.array([[1.0986123, 0.0]], np.float32)
    >>> memory, one = np.empty((1, 2, 2), np.float32), np.ones(1, np.float32)
    >>> loss = forward_kl(student, teacher, one, 1.0, into_PV=student, odds_P2V=memory, threads=1)
    >>> loss.round(4), student.round(4)
    (array([0.1308], dtype=float32), array([[-0.25,  0.25]], dtype=float32))
    """
    loss_P, coldness = np.empty(len(student_PV), np.float32), np.float32(1.0 / temperature)

    def work(r: slice) -> None:
        flat = _flat(student_PV[r]), _flat(teacher_PV[r]), _flat(into_PV[r])
        _forward_kl(flat[0], flat[1], share_P[r], coldness, flat[2], odds_P2V[r.start], loss_P[r])

    among_threads(work, len(student_PV), threads)
    return loss_P

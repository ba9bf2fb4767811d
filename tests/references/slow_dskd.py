"""The DSKD family as loops over its equations, in Python floats: the definition that tests compare with.

A matrix is a list of rows; a head is a list of one row for each class.
"""

import math
import operator
from collections.abc import Sequence

import slow_losses

Row = Sequence[float]
Matrix = Sequence[Row]


def dot(a: Row, b: Row) -> float:
    """Sum of products."""
    return sum(map(operator.mul, a, b))


def linear(rows: Matrix, weight: Matrix, bias: Row | None = None) -> list[list[float]]:
    """Every row times every row of the weight, plus the bias."""
    offsets = bias if bias is not None else [0.0] * len(weight)
    return [[dot(x, w) + b for w, b in zip(weight, offsets, strict=True)] for x in rows]


def attention(query: Matrix, key: Matrix) -> list[list[float]]:
    """softmax over keys of Q K^T / sqrt(width)."""
    return [slow_losses.softmax([dot(q, k) / math.sqrt(len(q)) for k in key]) for q in query]


def mixed(shares: Matrix, values: Matrix) -> list[list[float]]:
    """Every row of shares as a mixture of the values."""
    return [[dot(row, column) for column in zip(*values, strict=True)] for row in shares]


def best(logits: Row) -> int:
    """The first class of the largest logit."""
    return list(logits).index(max(logits))


def projected_ce(projected: Matrix, targets: Sequence[int]) -> float:
    """L_ce of one document."""
    return slow_losses.cross_entropy(projected, targets, [True] * len(targets))[0]


def student_space(
    own: Matrix, projected: Matrix, targets: Sequence[int] | None, kind: str, tau: float, skew: float, alpha: float
) -> float:
    """L_stu of one document; with targets, only where the projected teacher predicts them."""
    total = 0.0
    for n, (mine, theirs) in enumerate(zip(own, projected, strict=True)):
        if targets is None or best(theirs) == targets[n]:
            total += slow_losses.divergence(mine, theirs, kind, tau, skew, alpha)
    return total


def teacher_space(back: Matrix, teacher: Matrix, kind: str, tau: float, skew: float, alpha: float) -> float:
    """L_tea of one document."""
    return math.fsum(
        slow_losses.divergence(mine, theirs, kind, tau, skew, alpha)
        for mine, theirs in zip(back, teacher, strict=True)
    )

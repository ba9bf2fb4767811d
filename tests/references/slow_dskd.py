"""The DSKD family as loops over its equations, in Python floats: the definition that tests compare with.

A matrix is a list of rows; a head is a list of one row for each class.
"""

import math
from collections.abc import Sequence

from slow_losses import divergence, dot, softmax

Row = Sequence[float]
Matrix = Sequence[Row]


def linear(rows: Matrix, weight: Matrix, bias: Row | None = None) -> list[list[float]]:
    """Every row times every row of the weight, plus the bias."""
    offsets = bias if bias is not None else [0.0] * len(weight)
    return [[dot(x, w) + b for w, b in zip(weight, offsets, strict=True)] for x in rows]


def attention(query: Matrix, key: Matrix) -> list[list[float]]:
    """softmax over keys of Q K^T / sqrt(width)."""
    return [softmax([dot(q, k) / math.sqrt(len(q)) for k in key]) for q in query]


def mixed(shares: Matrix, values: Matrix) -> list[list[float]]:
    """Every row of shares as a mixture of the values."""
    return [[dot(row, column) for column in zip(*values, strict=True)] for row in shares]


def discriminated(rows: Matrix, layers: Sequence[tuple[Matrix, Row]]) -> list[float]:
    """DSKD-CMA-GA's logit that each row is a key: a highway, a leaky layer, one number."""
    found = []
    for x in rows:
        opened = linear([x], *layers[0])[0]
        gates = [1.0 / (1.0 + math.exp(-h)) for h in opened]
        z = [g * max(h, 0.0) + (1.0 - g) * y for g, h, y in zip(gates, opened, x, strict=True)]
        inner = [y if y > 0 else 0.1 * y for y in linear([z], *layers[1])[0]]
        found.append(linear([inner], *layers[2])[0][0])
    return found


def surprise(logits: Row, label: int) -> float:
    """Sum of -log of the probability that the label has."""
    return -math.fsum(math.log(1.0 / (1.0 + math.exp(-x if label else x))) for x in logits)


def best(logits: Row) -> int:
    return list(logits).index(max(logits))


def space(own: Matrix, other: Matrix, targets: Sequence[int] | None = None) -> float:
    """L_stu or L_tea of one document, as by default; with targets, only where the other side predicts them."""
    return math.fsum(
        divergence(mine, theirs, "forward_kl", 2.0, 0.1, 0.5)
        for n, (mine, theirs) in enumerate(zip(own, other, strict=True))
        if targets is None or best(theirs) == targets[n]
    )

"""GOLD, SimCT and X-Token as loops over plain numbers: one piece, one token, one class at a time.

A document is both models' logits at their predictions, the ids they predict, and its pieces: ranges of predictions.
"""

import math
from collections.abc import Mapping, Sequence

from slow_chunks import log_softmax
from slow_losses import Vector, kl, softmax
from slow_ot import sorted_l1

Range = tuple[int, int]
Side = tuple[Sequence[Vector], Sequence[int]]
Document = tuple[Side, Side, Sequence[tuple[Range, Range]]]
LEAST = 1e-8


def merged(side: Side, piece: Range, tau: float, how: str) -> list[float]:
    """GOLD's distribution of a piece, which sums to the probability of its other tokens."""
    rows = {k: [math.exp(z) for z in log_softmax([x / tau for x in side[0][k]])] for k in range(*piece)}
    base = piece[0] if how == "observed" else piece[1] - 1
    product = math.prod(max(rows[k][side[1][k]], LEAST) for k in rows if k != base)
    return [p * product for p in rows[base]]


def jensen_shannon(p: Vector, q: Vector, beta: float) -> float:
    p, q = ([max(x, LEAST) for x in side] for side in (p, q))
    middle = [beta * a + (1 - beta) * b for a, b in zip(p, q, strict=True)]
    return beta * kl(p, middle) + (1 - beta) * kl(q, middle)


def gold(
    documents: Sequence[Document], shared: Mapping[int, int], parts: tuple[float, float], *, tau: float = 1.0,
    merge: str = "observed", mean: str = "pieces", beta: float = 0.5,
) -> dict[str, float]:  # fmt: skip
    """Sums of `gold`, `matched` and `unmatched`, and the `count`; shared classes are student id -> teacher id."""
    found = dict.fromkeys(("gold", "matched", "unmatched", "count"), 0.0)
    for student, teacher, pieces in documents:
        weight = 1.0 if mean == "pieces" else 1 / max(1, len(pieces))
        for s_piece, t_piece in pieces:
            q, p = merged(student, s_piece, tau, merge), merged(teacher, t_piece, tau, merge)
            matched = jensen_shannon([p[t] for t in shared.values()], [q[s] for s in shared], beta)
            rest = [
                [x for v, x in enumerate(side) if v not in ids] for side, ids in ((q, shared), (p, shared.values()))
            ]
            unmatched = sorted_l1(*rest)
            found["gold"] += weight * (parts[0] * matched + parts[1] * unmatched)
            found["matched"] += weight * matched
            found["unmatched"] += weight * unmatched
            found["count"] += weight
    return found


def simct(
    documents: Sequence[Document], shared: Mapping[int, int], *, tau: float = 1.0, reverse: bool = True
) -> tuple[float, int]:
    """The sum over pieces, and how many pieces are a class of their own."""
    total, extra = 0.0, 0
    for student, teacher, pieces in documents:
        for s_piece, t_piece in pieces:
            units = []
            for side, (start, end), ids in ((student, s_piece, shared), (teacher, t_piece, shared.values())):
                logits, text = side[0], side[1][start:end]
                mean = math.fsum(logits[start + k][y] for k, y in enumerate(text)) / (end - start)
                units.append(([logits[start][v] / tau for v in ids], mean / tau, text))
            (own, own_mean, y), (theirs, their_mean, x) = units
            if len(y) > 1 or len(x) > 1 or shared.get(y[0]) != x[0]:
                extra += 1
                own, theirs = [*own, own_mean], [*theirs, their_mean]
            q, p = softmax(own), softmax(theirs)
            total += kl(q, p) if reverse else kl(p, q)
    return total, extra

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


# X-Token


def cut(text: bytes, ids: Mapping[bytes, int]) -> list[int]:
    found: list[int] = []
    while text and len(found) < 4:
        fitting = [n for n in range(1, len(text) + 1) if text[:n] in ids]
        if not fitting:
            return []
        found.append(ids[text[: max(fitting)]])
        text = text[max(fitting) :]
    return found


Texts = tuple[Mapping[int, bytes], Mapping[bytes, int]]
"""The text of each id, and the id that a text is read as."""


def project(student: Texts, teacher: Texts, same: Mapping[int, int], targets: int) -> dict[int, dict[int, float]]:
    """W by student id, then by teacher id."""
    shares: list[tuple[int, int, float]] = []
    for own, other, forth in ((student, teacher, True), (teacher, student, False)):
        for number, text in own[0].items():
            pieces = cut(text, other[1])
            total = sum(10.0**-k for k in range(len(pieces)))
            for place, n in enumerate(pieces):
                shares.append((number, n, 10.0**-place / total) if forth else (n, number, 10.0**-place / total))
    found = {}
    for s in student[0]:
        weights: dict[int, float] = {}
        for _, t, share in [(s, same[s], 1.0)] if s in same else [x for x in shares if x[0] == s]:
            weights[t] = weights.get(t, 0.0) + share
        kept = sorted(weights, key=lambda t: (-round(weights[t], 12), t))[:targets]
        found[s] = {t: weights[t] / sum(weights[k] for k in kept) for t in kept}
    return found


def means(rows: Sequence[Vector]) -> list[float]:
    return [math.fsum(column) / len(rows) for column in zip(*rows, strict=True)]


def p_kl(documents: Sequence[Document], w: Mapping[int, Mapping[int, float]], most: int, tau: float) -> float:
    total = 0.0
    for student, teacher, pieces in documents:
        rows = [teacher[0][k] for _, (start, end) in pieces for k in range(start, end)]
        classes = range(len(teacher[0][0]))
        likeliest = sorted(classes, key=lambda v: (-max((row[v] for row in rows), default=0.0), v))[:most]
        for s_piece, t_piece in pieces:
            log_p = means([log_softmax([teacher[0][k][v] / tau for v in likeliest]) for k in range(*t_piece)])
            projected = []
            for k in range(*s_piece):
                q, row = softmax([z / tau for z in student[0][k]]), dict.fromkeys(classes, 0.0)
                for s, targets in w.items():
                    for t, weight in targets.items():
                        row[t] += weight * q[s]
                projected.append([row[v] for v in likeliest])
            mean = means(projected)
            log_q = [math.log(x / (math.fsum(mean) + 1e-10) + 1e-10) for x in mean]
            total += tau**2 * math.fsum(math.exp(a) * (a - b) for a, b in zip(log_p, log_q, strict=True))
    return total


def h_kl(
    documents: Sequence[Document], w: Mapping[int, Mapping[int, float]], threshold: float, ranks: int, tau: float
) -> tuple[float, float]:
    """The sums of both parts."""
    best: dict[int, int] = {}
    for s, targets in sorted(w.items()):
        for t, weight in targets.items():
            if weight >= threshold and (t not in best or weight > w[best[t]][t]):
                best[t] = s
    matched = unmatched = 0.0
    for student, teacher, pieces in documents:
        for s_piece, t_piece in pieces:
            log_q, log_p = (
                means([log_softmax([z / tau for z in side[0][k]]) for k in range(*piece)])
                for side, piece in ((student, s_piece), (teacher, t_piece))
            )
            matched += tau**2 * math.fsum(math.exp(log_p[t]) * (log_p[t] - log_q[s]) for t, s in best.items())
            q, p = (
                sorted((math.exp(z) for v, z in enumerate(side) if v not in ids), reverse=True)
                for side, ids in ((log_q, set(best.values())), (log_p, set(best)))
            )
            unmatched += tau**2 * math.fsum(abs(a - b) for a, b in list(zip(q, p, strict=False))[:ranks])
    return matched, unmatched

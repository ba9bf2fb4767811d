"""ULD and MultiLevelOT as loops over plain floats: one document, one position, one class at a time."""

import math
from collections.abc import Sequence

from slow_losses import softmax
from xkd_schemas.signals import draw_spans

Vector = Sequence[float]


def sorted_l1(student: Vector, teacher: Vector) -> float:
    """sum_v |p^S(v) - p^T(v)| of two distributions, both sorted and the shorter filled up with 0."""
    p, q = sorted(student, reverse=True), sorted(teacher, reverse=True)
    classes = max(len(p), len(q))
    p, q = p + [0.0] * (classes - len(p)), q + [0.0] * (classes - len(q))
    return math.fsum(abs(a - b) for a, b in zip(p, q, strict=True))


def uld(documents: Sequence[tuple[Sequence[Vector], Sequence[Vector]]], temperature: float, mean: str) -> list[float]:
    """[total, count] over documents of (student logits, teacher logits), paired by shift."""
    total = count = 0.0
    for student, teacher in documents:
        parts = [
            sorted_l1(softmax([z / temperature for z in s]), softmax([z / temperature for z in t]))
            for s, t in zip(student, teacher, strict=False)
        ]
        if parts:
            total += math.fsum(parts) / (1 if mean == "tokens" else len(parts))
            count += len(parts) if mean == "tokens" else 1
    return [total, count]


# MultiLevelOT


def scaled_softmax(logits: Vector, temperature: float) -> list[float]:
    """Softmax of logits over their standard deviation."""
    mean = math.fsum(logits) / len(logits)
    std = math.sqrt(math.fsum((z - mean) ** 2 for z in logits) / max(1, len(logits) - 1))
    return softmax([z / (std + 1e-4) / temperature for z in logits])


def likeliest(documents: Sequence[Sequence[Vector]], classes: int) -> list[int]:
    """Classes by probability summed over all positions of some documents, the largest first."""
    mass = [math.fsum(p[v] for d in documents for p in d) for v in range(len(documents[0][0]))]
    return sorted(range(len(mass)), key=lambda v: (-mass[v], v))[:classes]


def filled(rows: Sequence[Vector], classes: int) -> list[list[float]]:
    return [[*row, *[0.0] * (classes - len(row))] for row in rows]


def greedy(student: list[list[float]], teacher: list[list[float]]) -> list[list[float]]:
    """The student's columns, each moved to the teacher's column that took it."""
    left, order = list(range(len(student[0]))), []
    for t in range(len(teacher[0])):
        costs = [math.fsum(abs(p[s] - q[t]) for p, q in zip(student, teacher, strict=True)) for s in left]
        order.append(left.pop(costs.index(min(costs))))
    return [[row[s] for s in order] for row in student]


def sinkhorn(student: list[list[float]], teacher: list[list[float]], epsilon: float, rounds: int) -> float:
    """<P, W> of one document."""
    x, y = ([softmax([p / 2 for p in row]) for row in side] for side in (student, teacher))
    cost = [[math.fsum(abs(a - b) for a, b in zip(p, q, strict=True)) for q in y] for p in x]
    plan = [[math.exp(-w / epsilon) for w in row] for row in cost]
    for _ in range(rounds):
        plan = [[v / math.fsum(row) for v in row] for row in plan]
        sums = [math.fsum(column) for column in zip(*plan, strict=True)]
        plan = [[v / s for v, s in zip(row, sums, strict=True)] for row in plan]
    return math.fsum(a * b for p, w in zip(plan, cost, strict=True) for a, b in zip(p, w, strict=True))


def multilevelot(
    documents: Sequence[tuple[Sequence[Vector], Sequence[Vector]]],
    *,
    temperature: float = 1.0,
    classes: int = 50,
    order: str = "document",
    match: str = "rank",
    word_target: str = "teacher",
    epsilon: float = 0.1,
    rounds: int = 10,
    max_positions: int = 1024,
) -> dict[str, list[float]]:
    """[total, count] of each term over documents of (student logits, teacher logits), paired by shift."""
    found = {name: [0.0, 0.0] for name in ("l1", "word", "sequence", "left_out")}
    sides: list[list[list[list[float]]]] = [[], []]
    for student, teacher in documents:
        n = min(len(student), len(teacher))
        for side, logits in zip(sides, (student, teacher), strict=True):
            side.append([scaled_softmax(z, temperature) for z in logits[:n]])
    for number in range(len(documents)):
        if not sides[0][number]:
            continue
        pair = []
        for side in sides:
            seen = [d for d in side if d] if order == "batch" else [side[number]]
            ids = likeliest(seen, classes) if match == "rank" or pair else list(range(len(side[number][0])))
            pair.append([[p[v] for v in ids] for p in side[number]])
        k = max(len(pair[0][0]), len(pair[1][0]))
        p, q = (filled(rows, k) for rows in pair)
        if match == "greedy":  # all classes of the student, those of the teacher that are chosen
            q = pair[1]
            p = greedy(filled(pair[0], max(len(pair[0][0]), len(q[0]))), q)
        gaps = [abs(a - b) for x, y in zip(p, q, strict=True) for a, b in zip(x, y, strict=True)]
        found["l1"][0] += math.fsum(gaps) / len(p)
        for x, y in zip(p, q, strict=True):
            weights, scored = (softmax(y), softmax(x)) if word_target == "teacher" else (softmax(x), softmax(y))
            found["word"][0] -= math.fsum(w * math.log(s) for w, s in zip(weights, scored, strict=True))
        drawn = draw_spans(len(p), max_positions)
        kept = range(len(p)) if drawn is None else drawn.tolist()
        found["sequence"][0] += sinkhorn([p[i] for i in kept], [q[i] for i in kept], epsilon, rounds)
        found["left_out"][0] += len(p) - len(kept)
        found["l1"][1] += 1
        found["word"][1] += len(p)
        found["sequence"][1] += 1
        found["left_out"][1] += 1
    return found

"""ULD and MultiLevelOT as loops over plain floats: one document, one position, one class at a time."""

import math
from collections.abc import Sequence

from slow_losses import softmax

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

"""FDD as loops over plain floats: one prediction at a time."""

import itertools
import math
from collections.abc import Sequence

from slow_losses import Vector, cosine, softmax


def log_probabilities(logits: Vector) -> list[float]:
    return [math.log(p) for p in softmax(logits)]


def derivative(teacher: Sequence[Vector], student: Sequence[Vector]) -> float:
    """Mean over neighbouring layers of 1 - cos between the changes of log p."""
    changes = []
    for side in (teacher, student):
        logs = [log_probabilities(z) for z in side]
        changes.append([[b - a for a, b in zip(x, y, strict=True)] for x, y in itertools.pairwise(logs)])
    return math.fsum(1 - cosine(a, b) for a, b in zip(*changes, strict=True)) / (len(teacher) - 1)

"""The definitions of ALM, MinED and FDD as loops over plain numbers: one document, chunk or token at a time."""

import itertools
import math
from collections.abc import Sequence

from slow_losses import Vector, cosine

Range = tuple[int, int]


def log_softmax(logits: Sequence[float]) -> list[float]:
    peak = max(logits)
    total = peak + math.log(math.fsum(math.exp(z - peak) for z in logits))
    return [z - total for z in logits]


# ALM


def chunk_log_likelihood(log_p_of: dict[int, float], chunk: Range) -> float | None:
    """Sum over the tokens of a chunk; None where one of them is not predicted."""
    places = range(*chunk)
    if not len(places) or any(place not in log_p_of for place in places):
        return None
    return math.fsum(log_p_of[place] for place in places)


def binarised(student: float, teacher: float, divergence: str, tau: float, scaled: bool) -> float:
    """Loss of one chunk from both log-likelihoods: a sum over the two outcomes."""
    floor = 1e-6
    if divergence == "kl_limit":
        b, a = student - floor, teacher - floor
        return (a - b) + a * (math.log(-b) - math.log(-a))
    p, q = math.exp(teacher / tau - floor), math.exp(student / tau - floor)
    total = 0.0
    for p_k, q_k in ((p, q), (1 - p, 1 - q)):
        total += {
            "kl": p_k * math.log(p_k / q_k), "reverse_kl": q_k * math.log(q_k / p_k), "tv": abs(p_k - q_k) / 2
        }[divergence]  # fmt: skip
    return total * (tau if scaled else 1.0)


def alm(
    documents: Sequence[tuple[dict[int, float], dict[int, float], Sequence[Range], Sequence[Range]]],
    *,
    divergence: str = "kl",
    tau: float = 100.0,
    scaled: bool = True,
    average: str = "chunks",
) -> tuple[float, float]:
    """Total and count. A document: log-probabilities by place (student, teacher) and chunks (student, teacher)."""
    total = count = 0.0
    for student, teacher, student_chunks, teacher_chunks in documents:
        for s_chunk, t_chunk in zip(student_chunks, teacher_chunks, strict=True):
            s, t = chunk_log_likelihood(student, s_chunk), chunk_log_likelihood(teacher, t_chunk)
            if s is not None and t is not None:
                weight = 1.0 if average == "chunks" else float(t_chunk[1] - t_chunk[0])
                total += weight * binarised(s, t, divergence, tau, scaled)
                count += weight
    return total, count


# MinED


def edit_distance(a: bytes, b: bytes) -> int:
    table = [[max(i, j) for j in range(len(b) + 1)] for i in range(len(a) + 1)]
    for i in range(1, len(a) + 1):
        for j in range(1, len(b) + 1):
            table[i][j] = min(table[i - 1][j] + 1, table[i][j - 1] + 1, table[i - 1][j - 1] + (a[i - 1] != b[j - 1]))
    return table[-1][-1]


def nearest(query: bytes, texts: Sequence[bytes]) -> int:
    """Index of the nearest text; ties by difference of lengths, then the shorter, then the first."""

    def key(index: int) -> tuple[int, int, bool, int]:
        text = texts[index]
        return edit_distance(query, text), abs(len(text) - len(query)), len(text) > len(query), index

    return min(range(len(texts)), key=key)


def partners(student: Sequence[bytes], teacher: Sequence[bytes]) -> list[int]:
    """Time warping: the teacher tokens beside each student token; -1 unless it is one."""
    if not student or not teacher:
        return [-1] * len(student)
    cost: dict[tuple[int, int], float] = {}
    for i, t in enumerate(teacher):
        for j, s in enumerate(student):
            before = [cost.get(c, math.inf) for c in ((i - 1, j - 1), (i - 1, j), (i, j - 1))]
            cost[i, j] = edit_distance(s, t) + (0 if (i, j) == (0, 0) else min(before))
    beside: list[list[int]] = [[] for _ in student]
    i, j = len(teacher) - 1, len(student) - 1
    while True:
        beside[j].append(i)
        if (i, j) == (0, 0):
            break
        i, j = min(((i - 1, j - 1), (i - 1, j), (i, j - 1)), key=lambda c: cost.get(c, math.inf))
    return [found[0] if len(found) == 1 else -1 for found in beside]


def softened(logits: Sequence[float], tau: float) -> list[float]:
    return log_softmax([z / tau for z in logits])


def mined(
    positions: Sequence[tuple[Sequence[float], Sequence[float] | None, int]], to_teacher: Sequence[int], tau: float
) -> tuple[float, float]:
    """Total and count. A position: student logits, the partner's logits in its own vocabulary or None, gold id."""
    total = 0.0
    for student, teacher, gold in positions:
        log_q = softened(student, tau)
        if teacher is None:
            total -= log_q[gold]
        else:
            log_p = softened([-1e5 if t < 0 else teacher[t] for t in to_teacher], tau)
            total += math.fsum(math.exp(p) * (p - q) for p, q in zip(log_p, log_q, strict=True))
    return total, float(len(positions))


# FDD


def derivative(teacher: Sequence[Vector], student: Sequence[Vector]) -> float:
    """Mean over neighbouring layers of 1 - cos between the changes of log p."""
    changes = []
    for side in (teacher, student):
        logs = [log_softmax(z) for z in side]
        changes.append([[b - a for a, b in zip(x, y, strict=True)] for x, y in itertools.pairwise(logs)])
    return math.fsum(1 - cosine(a, b) for a, b in zip(*changes, strict=True)) / (len(teacher) - 1)

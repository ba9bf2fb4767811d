"""The definitions of ALM and MinED as loops over plain numbers: one document, one chunk, one token at a time."""

import math
from collections.abc import Sequence

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

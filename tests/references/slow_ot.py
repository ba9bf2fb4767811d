"""ULD as loops over plain floats, and MultiLevelOT of one document at a time, with all its logits at once."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from slow_losses import softmax
from xkd_schemas.signals import draw_spans
from xkd_trainer.losses.baselines.multilevelot import MultiLevelOtSettings

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


# MultiLevelOT, of float64 logits [positions, classes] of both models


def soften(logits: Tensor, temperature: float) -> Tensor:
    """Softmax of logits over their standard deviation."""
    centred = logits - logits.mean(-1, keepdim=True)
    std = (centred.square().sum(-1, keepdim=True) / (logits.shape[1] - 1)).sqrt()
    return (logits / (std + 1e-4) / temperature).softmax(-1)


def likeliest(documents: Sequence[Tensor], classes: int) -> Tensor:
    """Classes by probability summed over all positions of some documents, the largest first."""
    return torch.cat([*documents]).sum(0).sort(descending=True, stable=True).indices[:classes]


def take_nearest(student: Tensor, teacher: Tensor) -> Tensor:
    """The student's columns beside the teacher's, each of which took the nearest that was left."""
    left, order = list(range(student.shape[1])), []
    for column in teacher.T:
        costs = [float((student[:, s] - column).abs().sum()) for s in left]
        order.append(left.pop(costs.index(min(costs))))
    return student[:, order]


def sinkhorn(student: Tensor, teacher: Tensor, epsilon: float, rounds: int) -> Tensor:
    """<P, W> of one document."""
    cost = ((student / 2).softmax(-1)[:, None] - (teacher / 2).softmax(-1)).abs().sum(-1)
    plan = (-cost / epsilon).exp()
    for _ in range(rounds):
        plan = plan / plan.sum(1, keepdim=True)
        plan = plan / plan.sum(0)
    return (plan * cost).sum()


def multilevelot(documents: Sequence[tuple[Tensor, Tensor]], how: MultiLevelOtSettings) -> dict[str, list[float]]:
    """[total, count] of each term over documents of (student logits, teacher logits), paired by shift."""
    found = {name: [0.0, 0.0] for name in ("l1", "word", "sequence", "left_out")}
    sides = [
        [soften(z, how.temperature) for z in both]
        for both in zip(*((s[: len(t)], t[: len(s)]) for s, t in documents), strict=True)
    ]
    for p, q in zip(*sides, strict=True):
        if not len(p):
            continue
        own, theirs = (side if how.order == "batch" else [each] for side, each in zip(sides, (p, q), strict=True))
        q = q[:, likeliest(theirs, how.classes)]
        if how.match == "greedy":  # of all classes of the student
            p = take_nearest(F.pad(p, (0, max(0, q.shape[1] - p.shape[1]))), q)
        else:
            p = p[:, likeliest(own, how.classes)]
        k = max(p.shape[1], q.shape[1])
        p, q = (F.pad(side, (0, k - side.shape[1])) for side in (p, q))
        weights, scored = (q, p) if how.word_target == "teacher" else (p, q)
        drawn = draw_spans(len(p), how.max_positions)
        kept = range(len(p)) if drawn is None else drawn.tolist()
        totals = {
            "l1": (p - q).abs().sum() / len(p), "word": -(weights.softmax(-1) * scored.log_softmax(-1)).sum(),
            "sequence": sinkhorn(p[kept], q[kept], how.epsilon, how.rounds), "left_out": len(p) - len(kept),
        }  # fmt: skip
        for name, total in totals.items():
            found[name][0] += float(total)
            found[name][1] += len(p) if name == "word" else 1
    return found

"""Softmaxes, cross-entropies and divergences of a few rows of logits, with their gradients by the logits.

On a CPU the rows are few enough to stay in its cache, so that a pass over them costs little beside the product that
made them. Every exponential is taken once, of numbers at most 0. Products are summed in two passes, one in place: a
batched product of single rows takes ten times as long.

Shape legend for this file
    C positions of a chunk    P positions of a part of it    V classes
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from xkd_trainer.losses.divergence import Kind, divergence

PART_ELEMENTS = 1 << 16
"""Numbers of a chunk that softmaxes and their like are taken of at a time, or one row; products take the whole chunk.

One long row took 0.65 of the time a row that five of them did: what is subtracted from a row is then a scalar.
"""

SHARED_ELEMENTS = 1 << 20
"""The same where threads share the work: each of a part's small steps costs some 50 microseconds of meeting."""

PARTS_OFF_CPU = 8
"""Parts of a chunk where every piece is a kernel's launch: few, but fewer temporaries than the whole chunk."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Which divergence, with its numbers; see `divergence.divergence`."""

    kind: Kind
    temperature: float
    skew: float = 0.1
    adaptive_alpha: float = 0.5


class Statistics(NamedTuple):
    """What the logits say at each position, at temperature 1, without gradient."""

    entropy: Tensor
    """[...] nats, at least 0."""
    peak: Tensor
    """[...] probability of the likeliest class."""


class Scratch:
    """Memory for temporaries of one part after another: on a CPU, fresh pages cost more than what is done in them."""

    def __init__(self) -> None:
        self._kept: dict[int, Tensor] = {}

    def like(self, logits_PV: Tensor, number: int) -> Tensor:
        """Numbers of the same shape, dtype and device, not set; the ones of the same number are overwritten."""
        kept = self._kept.get(number)
        if kept is None or kept.numel() < logits_PV.numel():
            kept = self._kept[number] = logits_PV.new_empty(logits_PV.numel())
        return kept[: logits_PV.numel()].view(logits_PV.shape)


def slices(first: int, last: int, size: int) -> Iterator[slice]:
    """The range in pieces of at most `size`.

    >>> list(slices(3, 8, 2))
    [slice(3, 5, None), slice(5, 7, None), slice(7, 8, None)]
    """
    for start in range(first, last, size):
        yield slice(start, min(start + size, last))


def parts(logits_CV: Tensor) -> Iterator[slice]:
    """Ranges of the rows of a chunk that are worked on at a time."""
    rows, classes = logits_CV.shape
    on_cpu = logits_CV.device.type == "cpu"
    elements = PART_ELEMENTS if torch.get_num_threads() == 1 else SHARED_ELEMENTS
    size = elements // max(1, classes) if on_cpu else math.ceil(rows / PARTS_OFF_CPU)
    return slices(0, rows, max(1, size))


def statistics_rows(logits_PV: Tensor, scratch: Scratch) -> Statistics:
    """Entropy and peak of each row.

    >>> statistics_rows(torch.zeros(1, 4), Scratch())
    Statistics(entropy=tensor([1.3863]), peak=tensor([0.2500]))
    """
    below_PV = torch.sub(logits_PV, logits_PV.amax(-1, keepdim=True), out=scratch.like(logits_PV, 0))
    odds_PV = torch.exp(below_PV, out=scratch.like(logits_PV, 1))
    sum_P = odds_PV.sum(-1)
    entropy_P = sum_P.log() - below_PV.mul_(odds_PV).sum(-1) / sum_P
    return Statistics(entropy_P.clamp_min(0.0), sum_P.reciprocal())


def cross_entropy_rows(logits_PV: Tensor, target_P: Tensor, factor: Tensor) -> Tensor:
    """-log p(target) of each row; the logits are overwritten by `factor` (a scalar) times its gradient.

    >>> logits = torch.zeros(1, 4)
    >>> cross_entropy_rows(logits, torch.tensor([1]), torch.tensor(4.0)), logits
    (tensor([1.3863]), tensor([[ 1., -3.,  1.,  1.]]))
    """
    target_P1 = target_P[:, None]
    logits_PV -= logits_PV.amax(-1, keepdim=True)
    below_P1 = logits_PV.gather(-1, target_P1)
    sum_P1 = logits_PV.exp_().sum(-1, keepdim=True)
    logits_PV *= factor / sum_P1
    logits_PV.scatter_add_(-1, target_P1, -factor.expand(target_P1.shape))
    return (sum_P1.log() - below_P1)[:, 0]


def divergence_rows(
    student_PV: Tensor, teacher_PV: Tensor, factor_P1: Tensor, how: Comparison, scratch: Scratch, into_PV: Tensor
) -> Tensor:
    """The divergence of each row; `factor` times its gradient by the student's logits goes to `into`.

    >>> student, teacher, one = torch.zeros(1, 2), torch.tensor([[1.0986123, 0.0]]), torch.ones(1, 1)
    >>> divergence_rows(student, teacher, one, Comparison(kind="forward_kl", temperature=1.0), Scratch(), student)
    tensor([0.1308])
    >>> student
    tensor([[-0.2500,  0.2500]])

    Args:
        student_PV: Logits.
        teacher_PV: Logits; left as they are.
        factor_P1: Constants.
        how: Kind and numbers.
        scratch: For temporaries, numbers 0 to 2.
        into_PV: Of the same shape; may be `student_PV` itself.
    """
    if how.kind == "forward_kl":
        return _forward_kl_rows(student_PV, teacher_PV, factor_P1 / how.temperature, how.temperature, scratch, into_PV)
    leaf_PV = student_PV.detach().requires_grad_()
    with torch.enable_grad():
        loss_P = divergence(
            leaf_PV, teacher_PV, how.kind, temperature=how.temperature,
            skew=how.skew, adaptive_alpha=how.adaptive_alpha,
        )  # fmt: skip
        (slope_PV,) = torch.autograd.grad(loss_P, leaf_PV, grad_outputs=factor_P1[:, 0].to(loss_P.dtype))
    into_PV.copy_(slope_PV)
    return loss_P.detach()


def _forward_kl_rows(
    student_PV: Tensor, teacher_PV: Tensor, share_P1: Tensor, temperature: float, scratch: Scratch, into_PV: Tensor
) -> Tensor:
    """KL(p || q) as sum p (log p - log q); its gradient is (q - p) / temperature."""
    q_PV, gap_PV, p_PV = (scratch.like(student_PV, number) for number in range(3))
    torch.sub(student_PV, student_PV.amax(-1, keepdim=True), out=q_PV).mul_(1.0 / temperature)
    torch.sub(teacher_PV, teacher_PV.amax(-1, keepdim=True), out=gap_PV).mul_(1.0 / temperature)
    torch.exp(gap_PV, out=p_PV)
    gap_PV -= q_PV
    p_sum_P1, q_sum_P1 = p_PV.sum(-1, keepdim=True), q_PV.exp_().sum(-1, keepdim=True)
    loss_P1 = gap_PV.mul_(p_PV).sum(-1, keepdim=True) / p_sum_P1 + q_sum_P1.log() - p_sum_P1.log()
    torch.mul(q_PV, share_P1 / q_sum_P1, out=into_PV).addcmul_(p_PV, share_P1 / p_sum_P1, value=-1.0)
    return loss_P1[:, 0]

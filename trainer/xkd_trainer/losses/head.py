"""Sums over tokens of losses between full-vocabulary logits, without holding the logits.

A vocabulary of 152,000 classes is 600 KB of logits a token. Here the caller hands over states and heads; logits are
made for a few tokens at a time, and the gradient of that chunk is taken at once, in the forward pass. So memory does
not grow with the number of tokens, and nothing is computed twice. Nothing here knows models, batches or papers.

Shape legend for this file
    N positions    D width of the states    V classes    C positions of one chunk    P positions of a part of it
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from xkd_trainer.losses.divergence import Kind, divergence
from xkd_trainer.losses.term import at_least_float32

CHUNK_BYTES = 20 << 20
"""Size of one chunk of logits; a divergence holds two, the student's and the teacher's, and about two temporaries."""

PART_ELEMENTS = 1 << 18
"""Numbers of a chunk that softmaxes and their like are taken of at a time; products take the whole chunk."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LazyLogits:
    """Logits as what they are made of: hidden @ weight.T + bias, in the dtype of the head, then in float32 or better.

    The states are brought to the head's dtype, so a head kept in bfloat16 gives logits with eight bits of mantissa.
    """

    hidden: Tensor
    """[..., D], finite. Post-final-norm states, or states projected into this head's space."""
    weight: Tensor
    """[V, D]. A constant unless it requires a gradient; detach it where the loss holds it fixed."""
    bias: Tensor | None = None
    """[V], or None."""

    def detached(self) -> "LazyLogits":
        """The same logits without gradient."""
        bias = None if self.bias is None else self.bias.detach()
        return LazyLogits(hidden=self.hidden.detach(), weight=self.weight.detach(), bias=bias)

    def at(self, chosen: Tensor | slice) -> "LazyLogits":
        """The logits at some positions: a bool mask over the leading axes, or a slice of the first; [N, D] inside."""
        return replace(self, hidden=self.hidden[chosen])

    def dense(self) -> Tensor:
        """[..., V] logits, float32, or float64 where the head is."""
        return at_least_float32(F.linear(self.hidden.to(self.weight.dtype), self.weight, self.bias))


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


Pointwise = Callable[[slice, Tensor], tuple[Tensor, Tensor]]
"""(positions, their logits [C, V], which may be overwritten) -> (loss [C], its gradient by the logits [C, V])."""


def head_statistics(logits: LazyLogits, valid: Tensor) -> Statistics:
    """Entropy and peak of the distributions at valid positions; 0 elsewhere.

    >>> logits = LazyLogits(hidden=torch.zeros(1, 2, 3), weight=torch.zeros(4, 3))
    >>> head_statistics(logits, torch.tensor([[True, False]]))
    Statistics(entropy=tensor([[1.3863, 0.0000]]), peak=tensor([[0.2500, 0.0000]]))

    Args:
        logits: States [..., D].
        valid: Bool [...]; the states elsewhere are not read.

    Returns:
        Both of the shape of `valid`, float32, or float64 where the head is.
    """
    chosen = logits.detached().at(valid)
    entropy_N, peak_N = [], []
    with torch.no_grad():
        for rows in chunks(chosen):
            logits_CV = chosen.at(rows).dense()
            for part in _parts(logits_CV):
                log_p_PV = logits_CV[part]
                log_p_PV -= log_p_PV.logsumexp(-1, keepdim=True)
                peak_N.append(log_p_PV.amax(-1).exp())
                entropy_N.append(-torch.linalg.vecdot(log_p_PV.exp(), log_p_PV))
    return Statistics(_scattered(entropy_N, valid, logits).clamp_min(0.0), _scattered(peak_N, valid, logits))


def head_argmax(logits: LazyLogits, valid: Tensor) -> Tensor:
    """The class of the largest logit at valid positions, the first of equals; -1 elsewhere.

    >>> logits = LazyLogits(hidden=torch.eye(2), weight=torch.eye(2))
    >>> head_argmax(logits, torch.tensor([False, True]))
    tensor([-1,  1])

    Args:
        logits: States [..., D].
        valid: Bool [...]; the states elsewhere are not read.

    Returns:
        int64, of the shape of `valid`, without gradient.
    """
    chosen = logits.detached().at(valid)
    out = torch.full(valid.shape, -1, dtype=torch.int64, device=valid.device)
    with torch.no_grad():
        parts = [chosen.at(rows).dense().argmax(-1) for rows in chunks(chosen)]
    if parts:
        out[valid] = torch.cat(parts)
    return out


def head_cross_entropy(logits: LazyLogits, target_N: Tensor) -> Tensor:
    """Sum over positions of -log p(target).

    >>> logits = LazyLogits(hidden=torch.zeros(2, 3), weight=torch.zeros(4, 3))
    >>> head_cross_entropy(logits, torch.tensor([0, 3]))
    tensor(2.7726)

    Args:
        logits: States [N, D].
        target_N: int64 classes, 0 to V - 1.

    Returns:
        Scalar with gradient by states, and by weight and bias where they require one. 0 where N is 0.
    """

    def pointwise(rows: slice, logits_CV: Tensor) -> tuple[Tensor, Tensor]:
        target_C1 = target_N[rows, None]
        losses = []
        for part in _parts(logits_CV):
            log_q_PV, target_P1 = logits_CV[part], target_C1[part]
            log_q_PV -= log_q_PV.logsumexp(-1, keepdim=True)
            losses.append(-log_q_PV.gather(-1, target_P1)[:, 0])
            log_q_PV.exp_().scatter_add_(-1, target_P1, -torch.ones_like(losses[-1])[:, None])
        return torch.cat(losses), logits_CV

    return weighted_sum(logits, None, pointwise)


def head_divergence(student: LazyLogits, teacher: LazyLogits, weights_N: Tensor | None, how: Comparison) -> Tensor:
    """Sum over positions of weight times divergence between teacher and student.

    A student that is uniform over two classes against a teacher sure of one to three parts in four, weight 2:
    2 (0.75 log 1.5 + 0.25 log 0.5) = 0.2616.

    >>> one = torch.ones(1, 1)
    >>> student = LazyLogits(hidden=one, weight=torch.zeros(2, 1))
    >>> teacher = LazyLogits(hidden=one, weight=torch.tensor([[1.0986123], [0.0]]))
    >>> head_divergence(student, teacher, torch.tensor([2.0]), Comparison(kind="forward_kl", temperature=1.0))
    tensor(0.2616)

    Args:
        student: States [N, D].
        teacher: States [N, E] with a head over the same V classes. A constant: detached here.
        weights_N: A constant, detached here; None is 1 everywhere.
        how: Kind, temperature and the rest.

    Returns:
        Scalar with gradient by the student's states, and by its head where that requires one. 0 where N is 0.
    """
    constant = teacher.detached()

    def forward_kl(rows: slice, logits_CV: Tensor) -> tuple[Tensor, Tensor]:
        teacher_CV, losses = constant.at(rows).dense(), []
        for part in _parts(logits_CV):
            log_p_PV, log_q_PV = teacher_CV[part].div_(how.temperature), logits_CV[part].div_(how.temperature)
            log_p_PV -= log_p_PV.logsumexp(-1, keepdim=True)
            log_q_PV -= log_q_PV.logsumexp(-1, keepdim=True)
            p_PV = log_p_PV.exp()
            losses.append(torch.linalg.vecdot(p_PV, log_p_PV.sub_(log_q_PV)))
            log_q_PV.exp_().sub_(p_PV).div_(how.temperature)
        return torch.cat(losses), logits_CV

    def other(rows: slice, logits_CV: Tensor) -> tuple[Tensor, Tensor]:
        teacher_CV = constant.at(rows).dense()
        losses = []
        for part in _slices(logits_CV.shape[0], math.ceil(logits_CV.shape[0] / 8)):  # a dozen temporaries of this size
            leaf_PV = logits_CV[part].detach().requires_grad_()
            with torch.enable_grad():
                loss_P = divergence(
                    leaf_PV, teacher_CV[part], how.kind, temperature=how.temperature,
                    skew=how.skew, adaptive_alpha=how.adaptive_alpha,
                )  # fmt: skip
                (slope_PV,) = torch.autograd.grad(loss_P.sum(), leaf_PV)
            logits_CV[part] = slope_PV
            losses.append(loss_P.detach())
        return torch.cat(losses), logits_CV

    return weighted_sum(student, weights_N, forward_kl if how.kind == "forward_kl" else other)


def _parts(logits_CV: Tensor) -> Iterator[slice]:
    """On a CPU, ranges of rows small enough for its cache; elsewhere all rows, as every piece is a kernel's launch."""
    rows, classes = logits_CV.shape
    return _slices(rows, max(1, PART_ELEMENTS // max(1, classes)) if logits_CV.device.type == "cpu" else max(1, rows))


def _slices(num: int, size: int) -> Iterator[slice]:
    """0 to `num` in ranges of at most `size`."""
    for first in range(0, num, size):
        yield slice(first, min(first + size, num))


def chunks(logits: LazyLogits) -> Iterator[slice]:
    """Ranges of positions whose logits take at most CHUNK_BYTES, one position at least."""
    row_bytes = logits.weight.shape[0] * max(4, logits.weight.dtype.itemsize)
    return _slices(logits.hidden.shape[0], max(1, CHUNK_BYTES // max(1, row_bytes)))


def _scattered(parts: list[Tensor], valid: Tensor, logits: LazyLogits) -> Tensor:
    """The concatenated parts at the True positions of `valid`, 0 elsewhere."""
    out = at_least_float32(logits.weight.detach()).new_zeros(valid.shape)
    if parts:
        out[valid] = torch.cat(parts)
    return out


def weighted_sum(logits: LazyLogits, weights_N: Tensor | None, pointwise: Pointwise) -> Tensor:
    """Sum of weight times pointwise loss, with the gradient taken chunk by chunk."""
    if weights_N is None:
        weights_N = torch.ones(logits.hidden.shape[0], device=logits.hidden.device)
    total: Tensor = _WeightedSum.apply(  # type: ignore[no-untyped-call]
        logits.hidden, logits.weight, logits.bias, weights_N.detach(), pointwise
    )
    return total


class _WeightedSum(torch.autograd.Function):
    """Loss and gradients in one pass over the chunks; backward multiplies them by the upstream scalar."""

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, weights_N: Tensor, pointwise: Pointwise
    ) -> Tensor:
        """Walk over the chunks."""
        logits = LazyLogits(hidden=hidden_ND, weight=weight_VD, bias=bias_V)
        wide_VD = at_least_float32(weight_VD.new_empty(0))
        total, weights_N = wide_VD.new_zeros(()), weights_N.to(wide_VD.dtype)
        hidden_slope = torch.zeros_like(hidden_ND) if ctx.needs_input_grad[0] else None
        weight_slope = wide_VD.new_zeros(weight_VD.shape) if ctx.needs_input_grad[1] else None
        bias_slope = wide_VD.new_zeros(bias_V.shape) if bias_V is not None and ctx.needs_input_grad[2] else None
        for rows in chunks(logits):
            loss_C, slope_CV = pointwise(rows, logits.at(rows).dense())
            total += (loss_C * weights_N[rows]).sum()
            slope_CV *= weights_N[rows, None]
            if hidden_slope is not None:
                hidden_slope[rows] = (slope_CV.to(weight_VD.dtype) @ weight_VD).to(hidden_ND.dtype)
            if weight_slope is not None:
                weight_slope.addmm_(slope_CV.T, hidden_ND[rows].to(wide_VD.dtype))
            if bias_slope is not None:
                bias_slope += slope_CV.sum(0)
        ctx.save_for_backward(hidden_slope, weight_slope, bias_slope)
        ctx.head_dtype = weight_VD.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Scale what the forward pass has stored."""
        hidden_slope, weight_slope, bias_slope = ctx.saved_tensors
        return (
            None if hidden_slope is None else hidden_slope * upstream.to(hidden_slope.dtype),
            None if weight_slope is None else (weight_slope * upstream).to(ctx.head_dtype),
            None if bias_slope is None else (bias_slope * upstream).to(ctx.head_dtype),
            None,
            None,
        )

"""Sums over tokens of losses between full-vocabulary logits, without holding the logits.

A vocabulary of 152,000 classes is 600 KB of logits a token. Here the caller hands over states and heads; logits are
made for a few tokens at a time, and the gradient of that chunk is taken at once, in the forward pass. So memory does
not grow with the number of tokens, and nothing is computed twice. Nothing here knows models, batches or papers.

Shape legend for this file
    N positions    D width of the states    V classes    C positions of one chunk
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from xkd_trainer.losses.at_once import Made, made_at_once
from xkd_trainer.losses.head_rows import Comparison as Comparison
from xkd_trainer.losses.head_rows import Statistics as Statistics
from xkd_trainer.losses.head_rows import cross_entropy_rows, divergence_rows, parts, slices, statistics_rows
from xkd_trainer.losses.term import at_least_float32

CHUNK_BYTES = 16 << 20
"""Size of one chunk of logits where the head learns: its gradient is memory enough. A divergence holds two chunks."""

WIDER = 3
"""How many times as much where the head is a constant: large products cost less a position."""


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


class Chunk:
    """Memory for the logits of a chunk, used again for the next: fresh pages cost as much as a product."""

    def __init__(self, rows: int, logits: LazyLogits) -> None:
        self._wide_CV = at_least_float32(logits.weight.new_empty(0)).new_empty(rows, logits.weight.shape[0])

    def of(self, logits: LazyLogits) -> Tensor:
        """Like `dense`, of at most so many rows [C, D]; valid until the next call."""
        out_CV = self._wide_CV[: logits.hidden.shape[0]]
        if logits.weight.dtype != out_CV.dtype:
            return out_CV.copy_(F.linear(logits.hidden.to(logits.weight.dtype), logits.weight, logits.bias))
        torch.mm(logits.hidden.to(out_CV.dtype), logits.weight.T, out=out_CV)
        return out_CV if logits.bias is None else out_CV.add_(logits.bias)


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
            for part in parts(logits_CV):
                found = statistics_rows(logits_CV[part])
                entropy_N.append(found.entropy)
                peak_N.append(found.peak)
    return Statistics(_scattered(entropy_N, valid, logits), _scattered(peak_N, valid, logits))


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

    one = at_least_float32(logits.weight.new_ones(()))

    def pointwise(rows: slice, logits_CV: Tensor) -> tuple[Tensor, Tensor]:
        target_C = target_N[rows]
        losses = [cross_entropy_rows(logits_CV[part], target_C[part], one) for part in parts(logits_CV)]
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

    def pointwise(rows: slice, logits_CV: Tensor) -> tuple[Tensor, Tensor]:
        teacher_CV, losses = constant.at(rows).dense(), []
        for part in parts(logits_CV):
            one_P1 = torch.ones_like(logits_CV[part, :1])
            loss_P, logits_CV[part] = divergence_rows(logits_CV[part], teacher_CV[part], one_P1, how)
            losses.append(loss_P)
        return torch.cat(losses), logits_CV

    return weighted_sum(student, weights_N, pointwise)


def chunks(logits: LazyLogits) -> Iterator[slice]:
    """Ranges of positions that are worked on at a time."""
    return slices(0, logits.hidden.shape[0], max(1, rows_at_once(logits)))


def rows_at_once(logits: LazyLogits) -> int:
    """Positions of a chunk, one at least where there is one."""
    row_bytes = logits.weight.shape[0] * max(4, logits.weight.dtype.itemsize)
    chunk_bytes = CHUNK_BYTES if logits.weight.requires_grad else WIDER * CHUNK_BYTES
    return min(max(1, chunk_bytes // max(1, row_bytes)), logits.hidden.shape[0])


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
    constant_N = at_least_float32(weights_N.detach())

    def make(wanted: Sequence[bool], inputs: Sequence[Any]) -> Made:
        given = LazyLogits(hidden=inputs[0], weight=inputs[1], bias=inputs[2])
        slopes = HeadSlopes(given, wanted)
        total = at_least_float32(given.weight.new_zeros(()))
        chunk = Chunk(rows_at_once(given), given)
        for rows in chunks(given):
            loss_C, slope_CV = pointwise(rows, chunk.of(given.at(rows)))
            total += (loss_C * constant_N[rows]).sum()
            slope_CV *= constant_N[rows, None]
            slopes.add(rows, slope_CV)
        return total, total.new_zeros(0), slopes.by_input()

    return made_at_once(make, logits.hidden, logits.weight, logits.bias)[0]


class HeadSlopes:
    """Gradients of a sum by states, head and bias, from those by the logits of one chunk after another."""

    def __init__(self, logits: LazyLogits, wanted: Sequence[bool]) -> None:
        wide = at_least_float32(logits.weight.new_empty(0))
        self._logits = logits
        self.hidden_ND = torch.zeros_like(logits.hidden) if wanted[0] else None
        self.weight_VD = wide.new_empty(logits.weight.shape) if wanted[1] else None
        self.bias_V = wide.new_zeros(logits.bias.shape) if logits.bias is not None and wanted[2] else None

    def add(self, rows: slice, slope_CV: Tensor) -> None:
        """The positions of a chunk; every position once, the first ones first."""
        hidden_ND, weight_VD = self._logits.hidden, self._logits.weight
        if self.hidden_ND is not None:
            self.hidden_ND[rows] = (slope_CV.to(weight_VD.dtype) @ weight_VD).to(hidden_ND.dtype)
        if self.weight_VD is not None:
            beta = 0 if rows.start == 0 else 1  # the first chunk overwrites
            self.weight_VD.addmm_(slope_CV.T, hidden_ND[rows].to(slope_CV.dtype), beta=beta)
        if self.bias_V is not None:
            self.bias_V += slope_CV.sum(0)

    def by_input(self) -> list[Tensor | None]:
        """By states, weight and bias."""
        if self.weight_VD is not None and not len(self._logits.hidden):
            self.weight_VD.zero_()
        return [self.hidden_ND, self.weight_VD, self.bias_V]

"""Logits that are not made yet, functions of them a chunk of positions at a time, and the gradients of their parts.

A vocabulary of 152,000 classes is 600 KB of logits a token. A loss hands over states and head instead; the logits of a
few positions are made, read, and overwritten by those of the next, so memory does not grow with the number of
positions. Nothing here knows a loss.

Shape legend for this file
    N positions (or [N, P])    D width of the states    V classes    C positions of one chunk
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from xkd_trainer.losses.ops.softmax_rows import Scratch, scratch_for, slices
from xkd_trainer.models.measures import at_least_float32

CHUNK_BYTES = 16 << 20
"""Size of one chunk of logits where the head learns: its gradient is memory enough. A divergence holds two chunks."""

WIDER = 3  # how many times as much where the head is a constant: large products cost less a position

Function = Callable[[slice, Tensor], Tensor]
"""(positions, their logits [C, ..., V], left as they are) -> values [C, ...]; everything else it reads is constant."""

Made = tuple[Tensor, Tensor, list[Tensor | None]]
"""A scalar, a vector without gradient that comes with it, and the scalar's gradient by each input."""

Make = Callable[[Sequence[bool], Sequence[Any]], Made]
"""(for each input whether its gradient is wanted, the inputs) -> new tensors; called again by a second backward."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LazyLogits:
    """Logits as what they are made of: hidden @ weight.T + bias, in the dtype of the head, then in float32 or better.

    The states are brought to the head's dtype, so a head kept in bfloat16 gives logits with eight bits of mantissa.
    """

    hidden: Tensor  # [..., D], finite. Post-final-norm states, or states projected into this head's space
    weight: Tensor  # [V, D]. A constant unless it requires a gradient; detach it where the loss holds it fixed
    bias: Tensor | None = None  # [V], or None

    @property
    def row_bytes(self) -> int:
        """Of the logits of one position."""
        return self.weight.shape[0] * max(4, self.weight.dtype.itemsize)

    @property
    def wide(self) -> Tensor:
        """An empty tensor in the dtype and on the device of sums over these logits."""
        return at_least_float32(self.weight.detach()[:0])

    def detach(self) -> "LazyLogits":
        """The same logits without gradient."""
        bias = None if self.bias is None else self.bias.detach()
        return LazyLogits(hidden=self.hidden.detach(), weight=self.weight.detach(), bias=bias)

    def at(self, chosen: Tensor | slice) -> "LazyLogits":
        """The logits at some positions: a bool mask over the leading axes, or a slice of the first; [N, D] inside."""
        return replace(self, hidden=self.hidden[chosen])

    def of_classes(self, classes: Tensor | slice) -> "LazyLogits":
        """The logits of some classes."""
        bias = None if self.bias is None else self.bias[classes]
        return replace(self, weight=self.weight[classes], bias=bias)

    def dense(self) -> Tensor:
        """[..., V] logits, float32, or float64 where the head is."""
        return at_least_float32(F.linear(self.hidden.to(self.weight.dtype), self.weight, self.bias))

    def make_in(self, scratch: Scratch, most: int, number: int = 0) -> Tensor:
        """Like `dense`, in memory for `most` positions that the next call of the same number overwrites.

        Fresh pages cost as much as a product. The chunks of one pass have numbers of their own.
        """
        rows, *inner = self.hidden.shape[:-1]
        out_CV = scratch.of(("chunk", number), (most if rows else 0, *inner, len(self.weight)), self.wide)[:rows]
        if self.weight.dtype != out_CV.dtype:
            return out_CV.copy_(self.dense())
        torch.mm(self.hidden.to(out_CV.dtype).flatten(0, -2), self.weight.T, out=out_CV.flatten(0, -2))
        return out_CV if self.bias is None else out_CV.add_(self.bias)


class HeadSlopes:
    """Gradients of a sum by states, head and bias, from those by the logits of one chunk after another."""

    def __init__(self, logits: LazyLogits, wanted: Sequence[bool]) -> None:
        self._logits = logits
        self.hidden_ND = torch.zeros_like(logits.hidden) if wanted[0] else None
        self.weight_VD = logits.wide.new_empty(logits.weight.shape) if wanted[1] else None
        self.bias_V = logits.wide.new_zeros(logits.bias.shape) if logits.bias is not None and wanted[2] else None

    def add(self, rows: slice, slope_CV: Tensor) -> None:
        """The positions of a chunk; every position once, the first ones first."""
        hidden_ND, weight_VD = self._logits.hidden, self._logits.weight
        if self.hidden_ND is not None:
            self.hidden_ND[rows] = (slope_CV.to(weight_VD.dtype) @ weight_VD).to(hidden_ND.dtype)
        slope_CV = slope_CV.flatten(0, -2)
        if self.weight_VD is not None:
            beta = 0 if rows.start == 0 else 1  # the first chunk overwrites
            self.weight_VD.addmm_(slope_CV.T, hidden_ND[rows].flatten(0, -2).to(slope_CV.dtype), beta=beta)
        if self.bias_V is not None:
            self.bias_V += slope_CV.sum(0)

    def by_input(self) -> list[Tensor | None]:
        """By states, weight and bias."""
        if self.weight_VD is not None and not len(self._logits.hidden):
            self.weight_VD.zero_()
        return [self.hidden_ND, self.weight_VD, self.bias_V]


def rows_at_once(logits: LazyLogits) -> int:
    """Positions of a chunk, one at least."""
    chunk_bytes = CHUNK_BYTES if logits.weight.requires_grad else WIDER * CHUNK_BYTES
    row_bytes = logits.row_bytes * math.prod(logits.hidden.shape[1:-1])
    return max(1, min(chunk_bytes // max(1, row_bytes), logits.hidden.shape[0]))


def chunks(logits: LazyLogits) -> Iterator[slice]:
    """Ranges of positions that are worked on at a time."""
    return slices(0, logits.hidden.shape[0], rows_at_once(logits))


def chunked(function: Function, logits: LazyLogits) -> Tensor:
    """The function at each position, [N, ...]; the logits are made a second time in the backward pass.

    It has gradient by states, and by weight and bias where they require one.

    >>> logits = LazyLogits(hidden=torch.zeros(2, 3), weight=torch.zeros(4, 3))
    >>> chunked(lambda rows, logits_CV: logits_CV.log_softmax(-1)[:, 0], logits)
    tensor([-1.3863, -1.3863])
    """
    found: Tensor = _Chunked.apply(function, logits.hidden, logits.weight, logits.bias)  # type: ignore[no-untyped-call]
    return found


def chunked_sum(function: Function, logits: LazyLogits, weights_N: Tensor | None = None) -> Tensor:
    """Sum over positions of weight times the function, whose values are [C]; nothing is computed twice.

    The gradient of a chunk, by states, and by weight and bias where they require one, is taken at once, in the forward
    pass. The weights are constants; None is 1 everywhere. 0 where N is 0.
    """
    weights_N = logits.wide.new_ones(len(logits.hidden)) if weights_N is None else weights_N
    alone = [(rows, rows) for rows in chunks(logits)]
    return grouped_sum(lambda rows, logits_CV: function(rows, logits_CV)[:, None], logits, weights_N, alone)[0]


def grouped_sum(
    function: Function, logits: LazyLogits, weights_G: Tensor, parts: Sequence[tuple[slice, slice]]
) -> tuple[Tensor, Tensor]:
    """Like `chunked_sum`, of a function of groups of positions, which are not cut: its first value, summed.

    `parts` are the chunks: positions, which stand side by side, and the groups that they are. The function gets the
    latter and gives [groups, values]. The second result are the weighted sums of all its values, without gradient.

    Two groups, of one position and of two, and the largest logit of each:

    >>> logits, parts = LazyLogits(hidden=torch.eye(3), weight=torch.eye(3)), [(slice(0, 3), slice(0, 2))]
    >>> first = lambda groups, logits_CV: torch.stack([logits_CV[:1].max(), logits_CV[1:].max()])[groups, None]
    >>> grouped_sum(first, logits, torch.tensor([1.0, 3.0]), parts)
    (tensor(4.), tensor([4.]))
    """
    wide, constant_G = logits.wide, weights_G.detach().to(logits.wide)

    def make(wanted: Sequence[bool], inputs: Sequence[Any]) -> Made:
        values_GT, slopes = _run(function, inputs, wanted, constant_G, parts)
        sums_T = constant_G @ values_GT.to(wide)
        return sums_T[0].clone(), sums_T, slopes

    return make_at_once(make, logits.hidden, logits.weight, logits.bias)


def head_log_probabilities(logits: LazyLogits, target_N: Tensor) -> Tensor:
    """log p(target) at each position, [N], which a loss may combine as it likes; gradient as of `chunked`.

    >>> logits = LazyLogits(hidden=torch.zeros(2, 3), weight=torch.zeros(4, 3))
    >>> head_log_probabilities(logits, torch.tensor([0, 3]))
    tensor([-1.3863, -1.3863])
    """
    return chunked(lambda rows, logits_CV: -F.cross_entropy(logits_CV, target_N[rows], reduction="none"), logits)


def _run(
    function: Function, inputs: Sequence[Any], wanted: Sequence[bool], upstream: Tensor | None,
    parts: Sequence[tuple[slice, slice]] | None = None,
) -> tuple[Tensor, list[Tensor | None]]:  # fmt: skip
    """The values of all positions, and what `upstream` times them has as gradients by states, weight and bias.

    With `parts`, upstream is that of the groups' first value.
    """
    logits = LazyLogits(hidden=inputs[0], weight=inputs[1], bias=inputs[2])
    slopes, values = HeadSlopes(logits, wanted), []
    plan = parts or [(rows, rows) for rows in chunks(logits)] or [(slice(0, 0), slice(0, 0))]
    most, scratch = max(rows.stop - rows.start for rows, _ in plan), scratch_for(logits.weight)
    for rows, groups in plan:
        leaf = logits.at(rows).make_in(scratch, most).detach().requires_grad_(upstream is not None and any(wanted))
        with torch.enable_grad():
            values.append(function(groups, leaf))
            first = values[-1] if parts is None else values[-1][:, 0]
        if upstream is not None and leaf.requires_grad:
            slopes.add(rows, torch.autograd.grad(first, leaf, upstream[groups].to(first.dtype))[0])
        values[-1] = values[-1].detach()
    return torch.cat(values), slopes.by_input()


class _Chunked(torch.autograd.Function):
    """Nothing of the size of the vocabulary is kept between the passes."""

    @staticmethod
    def forward(ctx: Any, function: Function, *inputs: Tensor | None) -> Tensor:
        ctx.function = function
        ctx.save_for_backward(*inputs)
        return _run(function, inputs, (False,) * 3, None)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors
        _, slopes = _run(ctx.function, inputs, ctx.needs_input_grad[1:], upstream)
        return (None, *(None if s is None else s.to(x.dtype) for s, x in zip(slopes, inputs, strict=True)))


def make_at_once(make: Make, *inputs: Tensor | None) -> tuple[Tensor, Tensor]:
    """A scalar whose gradient by the inputs is made together with it, in the forward pass; and the vector without.

    The gradient is handed out in the buffers it was made in: the backward pass multiplies them in place by the
    upstream scalar. A second backward pass over the same graph makes it again, so `make` is pure; a second derivative
    is refused.

    >>> x = torch.tensor(3.0, requires_grad=True)
    >>> square, seen = make_at_once(lambda wanted, i: (i[0] ** 2, i[0].clone(), [2 * i[0]]), x)
    >>> (10.0 * square).backward(), seen, x.grad
    (None, tensor(3.), tensor(60.))
    """
    total, seen = _MadeAtOnce.apply(make, *inputs)  # type: ignore[no-untyped-call]
    return total, seen


class _MadeAtOnce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, make: Make, *inputs: Tensor | None) -> tuple[Tensor, Tensor]:
        total, seen, ctx.slopes = make(ctx.needs_input_grad[1:], inputs)
        ctx.make = make
        ctx.save_for_backward(*inputs)
        ctx.mark_non_differentiable(seen)
        return total, seen

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, _seen: Tensor) -> tuple[Tensor | None, ...]:
        inputs, slopes, ctx.slopes = ctx.saved_tensors, ctx.slopes, None
        if slopes is None:
            _, _, slopes = ctx.make(ctx.needs_input_grad[1:], inputs)
        return (None, *(_scale(slope, of, upstream) for slope, of in zip(slopes, inputs, strict=True)))


def _scale(slope: Tensor | None, of: Tensor | None, upstream: Tensor) -> Tensor | None:
    if slope is None or of is None:
        return None
    if upstream.device.type == "cpu" and float(upstream) == 1.0:
        return slope.to(of.dtype)
    return slope.mul_(upstream.to(slope.dtype)).to(of.dtype)

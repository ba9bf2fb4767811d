"""Logits that are not made yet, and the gradients of what they were made of.

Nothing here knows a loss.

Shape legend for this file
    N positions (or [N, P])    D width of the states    V classes    C positions of one chunk
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from xkd_trainer.losses.ops.softmax_rows import Scratch, slices
from xkd_trainer.losses.ops.term import at_least_float32

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

    @property
    def row_bytes(self) -> int:
        """Of the logits of one position."""
        return self.weight.shape[0] * max(4, self.weight.dtype.itemsize)

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

    def __init__(self, rows: int, logits: LazyLogits, scratch: Scratch, number: int = 0) -> None:
        """At most so many rows; chunks of one pass have numbers of their own."""
        wide = at_least_float32(logits.weight.detach()[:0])
        shape = (rows, *logits.hidden.shape[1:-1], len(logits.weight))
        self._wide_CV = scratch.of(("chunk", number), shape, wide)

    def of(self, logits: LazyLogits) -> Tensor:
        """Like `dense`, of at most so many rows [C, D]; valid until the next call."""
        out_CV = self._wide_CV[: logits.hidden.shape[0]]
        if logits.weight.dtype != out_CV.dtype:
            return out_CV.copy_(F.linear(logits.hidden.to(logits.weight.dtype), logits.weight, logits.bias))
        torch.mm(logits.hidden.to(out_CV.dtype).flatten(0, -2), logits.weight.T, out=out_CV.flatten(0, -2))
        return out_CV if logits.bias is None else out_CV.add_(logits.bias)


def chunks(logits: LazyLogits) -> Iterator[slice]:
    """Ranges of positions that are worked on at a time."""
    return slices(0, logits.hidden.shape[0], rows_at_once(logits))


def rows_at_once(logits: LazyLogits) -> int:
    """Positions of a chunk, one at least."""
    chunk_bytes = CHUNK_BYTES if logits.weight.requires_grad else WIDER * CHUNK_BYTES
    row_bytes = logits.row_bytes * math.prod(logits.hidden.shape[1:-1])
    return max(1, min(chunk_bytes // max(1, row_bytes), logits.hidden.shape[0]))


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
            slope_CV = slope_CV.flatten(0, -2)
            self.weight_VD.addmm_(slope_CV.T, hidden_ND[rows].flatten(0, -2).to(slope_CV.dtype), beta=beta)
        if self.bias_V is not None:
            self.bias_V += slope_CV.flatten(0, -2).sum(0)

    def by_input(self) -> list[Tensor | None]:
        """By states, weight and bias."""
        if self.weight_VD is not None and not len(self._logits.hidden):
            self.weight_VD.zero_()
        return [self.hidden_ND, self.weight_VD, self.bias_V]

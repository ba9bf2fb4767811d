"""Any function of full-vocabulary logits at each position, a chunk of positions at a time.

A vocabulary of 152,000 classes is 600 KB of logits a token. The logits of a chunk are made, read, and overwritten by
those of the next, so that memory does not grow with the number of positions.

Shape legend for this file
    N positions    D width of the states    V classes    C positions of one chunk
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from xkd_trainer.losses.ops.eager_gradient import Made, made_at_once
from xkd_trainer.losses.ops.lazy_logits import Chunk, HeadSlopes, LazyLogits, chunks, rows_at_once
from xkd_trainer.losses.ops.softmax_rows import scratch_for
from xkd_trainer.losses.ops.term import at_least_float32

Function = Callable[[slice, Tensor], Tensor]
"""(positions, their logits [C, ..., V], left as they are) -> values [C, ...]; everything else it reads is constant."""


def chunked(function: Function, logits: LazyLogits) -> Tensor:
    """The function at each position; the logits are made a second time in the backward pass.

    >>> logits = LazyLogits(hidden=torch.zeros(2, 3), weight=torch.zeros(4, 3))
    >>> chunked(lambda rows, logits_CV: logits_CV.log_softmax(-1)[:, 0], logits)
    tensor([-1.3863, -1.3863])

    Args:
        function: Of the logits of one chunk.
        logits: States [N, ..., D].

    Returns:
        [N, ...] with gradient by states, and by weight and bias where they require one.
    """
    found: Tensor = _Chunked.apply(function, logits.hidden, logits.weight, logits.bias)  # type: ignore[no-untyped-call]
    return found


def chunked_sum(function: Function, logits: LazyLogits, weights_N: Tensor | None = None) -> Tensor:
    """Sum over positions of weight times the function, whose values are [C]; nothing is computed twice.

    The gradient of a chunk is taken at once, in the forward pass.

    Args:
        function: Of the logits of one chunk.
        logits: States [N, ..., D].
        weights_N: Constants; None is 1 everywhere.

    Returns:
        Scalar with gradient by states, and by weight and bias where they require one. 0 where N is 0.
    """
    wide = at_least_float32(logits.weight.detach()[:0])
    count = len(logits.hidden)
    constant_N = wide.new_ones(count) if weights_N is None else weights_N.detach().to(wide)

    def make(wanted: Sequence[bool], inputs: Sequence[Any]) -> Made:
        values_N, slopes = _run(function, _logits(*inputs), wanted, constant_N)
        return values_N @ constant_N, wide.new_zeros(0), slopes

    return made_at_once(make, logits.hidden, logits.weight, logits.bias)[0]


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> LazyLogits:
    return LazyLogits(hidden=hidden, weight=weight, bias=bias)


def _run(
    function: Function, logits: LazyLogits, wanted: Sequence[bool], upstream: Tensor | None
) -> tuple[Tensor, list[Tensor | None]]:
    """The values of all positions, and what `upstream` times them has as gradients by states, weight and bias."""
    slopes, values = HeadSlopes(logits, wanted), []
    memory = Chunk(rows_at_once(logits), logits, scratch_for(logits.weight))
    for rows in list(chunks(logits)) or [slice(0, 0)]:
        leaf = memory.of(logits.at(rows)).detach().requires_grad_(upstream is not None and any(wanted))
        with torch.enable_grad():
            values.append(function(rows, leaf))
        if upstream is not None and leaf.requires_grad:
            slopes.add(rows, torch.autograd.grad(values[-1], leaf, upstream[rows].to(values[-1].dtype))[0])
        values[-1] = values[-1].detach()
    return torch.cat(values), slopes.by_input()


class _Chunked(torch.autograd.Function):
    """Nothing of the size of the vocabulary is kept between the passes."""

    @staticmethod
    def forward(ctx: Any, function: Function, *inputs: Tensor | None) -> Tensor:
        """Values alone."""
        ctx.function = function
        ctx.save_for_backward(*inputs)
        return _run(function, _logits(*inputs), (False,) * 3, None)[0]  # type: ignore[arg-type]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Values and gradients again."""
        inputs = ctx.saved_tensors
        _, slopes = _run(ctx.function, _logits(*inputs), ctx.needs_input_grad[1:], upstream)
        return (None, *(None if s is None else s.to(x.dtype) for s, x in zip(slopes, inputs, strict=True)))

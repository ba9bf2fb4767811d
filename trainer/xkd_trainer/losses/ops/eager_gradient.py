"""A scalar whose gradient is made together with it, in the forward pass, so that nothing large is kept for later.

The gradient is handed out in the buffers it was made in: the backward pass multiplies them in place by the upstream
scalar. A second backward pass over the same graph makes it again.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Made = tuple[Tensor, Tensor, list[Tensor | None]]
"""The scalar, a vector without gradient to be looked at, and the scalar's gradient by each input."""

Make = Callable[[Sequence[bool], Sequence[Any]], Made]
"""(for each input whether its gradient is wanted, the inputs) -> new tensors; called again by a second backward."""


def made_at_once(make: Make, *inputs: Tensor | None) -> tuple[Tensor, Tensor]:
    """The scalar with gradient by the inputs, and the vector without.

    x squared, and x to be looked at:

    >>> x = torch.tensor(3.0, requires_grad=True)
    >>> square, seen = made_at_once(lambda wanted, i: (i[0] ** 2, i[0].clone(), [2 * i[0]]), x)
    >>> (10.0 * square).backward(), seen, x.grad
    (None, tensor(3.), tensor(60.))

    Args:
        make: Pure: a second call gives the same. Its gradients may be in another dtype than their inputs.
        inputs: Tensors, or None.

    Raises:
        RuntimeError: A second derivative is asked for.
    """
    total: Tensor
    seen: Tensor
    total, seen = _MadeAtOnce.apply(make, *inputs)  # type: ignore[no-untyped-call]
    return total, seen


class _MadeAtOnce(torch.autograd.Function):
    """Forward does the work."""

    @staticmethod
    def forward(ctx: Any, make: Make, *inputs: Tensor | None) -> tuple[Tensor, Tensor]:
        """Keep the gradients, and the inputs for a second backward pass."""
        total, seen, ctx.slopes = make(ctx.needs_input_grad[1:], inputs)
        ctx.make = make
        ctx.save_for_backward(*inputs)
        ctx.mark_non_differentiable(seen)
        return total, seen

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, _seen: Tensor) -> tuple[Tensor | None, ...]:
        """Give the gradients away."""
        inputs, slopes, ctx.slopes = ctx.saved_tensors, ctx.slopes, None
        if slopes is None:
            _, _, slopes = ctx.make(ctx.needs_input_grad[1:], inputs)
        return (None, *map(_scaled, slopes, inputs, [upstream] * len(inputs)))


def _scaled(slope: Tensor | None, of: Tensor | None, upstream: Tensor) -> Tensor | None:
    """In place, then in the dtype of the input."""
    if slope is None or of is None:
        return None
    if upstream.device.type == "cpu" and float(upstream) == 1.0:
        return slope.to(of.dtype)
    return slope.mul_(upstream.to(slope.dtype)).to(of.dtype)

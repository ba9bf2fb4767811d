"""What every loss returns: a sum, and how much was summed. Nothing here knows a model or a batch."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class LossTerm:
    """A sum and the number, or weight, of the things that were summed.

    The step adds `total` and `count` over all micro-batches and ranks and divides once. A loss
    that returned its own mean would weigh a short micro-batch like a long one.

    >>> import torch
    >>> halves = [LossTerm(total=torch.tensor(3.0), count=torch.tensor(1.0)),
    ...           LossTerm(total=torch.tensor(1.0), count=torch.tensor(3.0))]
    >>> float(sum(h.total for h in halves) / sum(h.count for h in halves))
    1.0
    """

    total: Tensor
    """Scalar with gradient; float32, or float64 where the inputs were. Always finite for finite inputs."""
    count: Tensor
    """Scalar without gradient, dtype of `total`. 0 is legal: nothing in this batch qualified, and `total` is 0."""


def term(total: Tensor, count: Tensor) -> LossTerm:
    """The term of two scalars; `count` (any dtype) is cut from the graph and brought to `total`'s dtype."""
    return LossTerm(total=total, count=count.detach().to(total.dtype))

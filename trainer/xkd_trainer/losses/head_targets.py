"""Log-probability of one class at each position, without making all logits at once.

Unlike the sums of `head`, the result is a number for each position, which a loss may combine as it likes. The gradient
is made in the backward pass, where the logits of a chunk are computed a second time.

Shape legend for this file
    N positions    D width of the states    V classes    C positions of one chunk
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from xkd_trainer.losses.head import CHUNK_BYTES, LazyLogits
from xkd_trainer.losses.term import at_least_float32


def head_log_probabilities(logits: LazyLogits, target_N: Tensor) -> Tensor:
    """log p(target) at each position.

    >>> logits = LazyLogits(hidden=torch.zeros(2, 3), weight=torch.zeros(4, 3))
    >>> head_log_probabilities(logits, torch.tensor([0, 3]))
    tensor([-1.3863, -1.3863])

    Args:
        logits: States [N, D].
        target_N: int64 classes, 0 to V - 1.

    Returns:
        [N], at most 0, float32, or float64 where the head is; gradient by states, and by weight and bias where they
        require one.
    """
    found: Tensor = _LogProbabilities.apply(  # type: ignore[no-untyped-call]
        logits.hidden, logits.weight, logits.bias, target_N
    )
    return found


def _chunks(logits: LazyLogits) -> Iterator[slice]:
    """Ranges of positions whose logits take at most CHUNK_BYTES, one position at least."""
    size = max(1, CHUNK_BYTES // max(1, logits.weight.shape[0] * max(4, logits.weight.dtype.itemsize)))
    for first in range(0, logits.hidden.shape[0], size):
        yield slice(first, first + size)


class _LogProbabilities(torch.autograd.Function):
    """Chunk by chunk in both directions; nothing of the size of the vocabulary is kept between them."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, target_N: Tensor) -> Tensor:
        """Logit of the target minus the logarithm of the sum."""
        logits = LazyLogits(hidden=hidden_ND, weight=weight_VD, bias=bias_V)
        out_N = at_least_float32(weight_VD.new_empty(0)).new_zeros(hidden_ND.shape[0])
        for rows in _chunks(logits):
            logits_CV = logits.at(rows).dense()
            out_N[rows] = logits_CV.gather(-1, target_N[rows, None])[:, 0] - logits_CV.logsumexp(-1)
        ctx.save_for_backward(hidden_ND, weight_VD, bias_V, target_N)
        return out_N.clamp_max_(0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream_N: Tensor) -> tuple[Tensor | None, ...]:
        """(1[class = target] - p) times the upstream number of the position."""
        hidden_ND, weight_VD, bias_V, target_N = ctx.saved_tensors
        logits = LazyLogits(hidden=hidden_ND, weight=weight_VD, bias=bias_V)
        wanted = ctx.needs_input_grad
        hidden_slope = torch.zeros_like(hidden_ND) if wanted[0] else None
        weight_slope = upstream_N.new_zeros(weight_VD.shape) if wanted[1] else None
        bias_slope = upstream_N.new_zeros(bias_V.shape) if bias_V is not None and wanted[2] else None
        for rows in _chunks(logits):
            slope_CV = logits.at(rows).dense().softmax(-1).mul_(-upstream_N[rows, None])
            slope_CV.scatter_add_(-1, target_N[rows, None], upstream_N[rows, None])
            if hidden_slope is not None:
                hidden_slope[rows] = (slope_CV.to(weight_VD.dtype) @ weight_VD).to(hidden_ND.dtype)
            if weight_slope is not None:
                weight_slope.addmm_(slope_CV.T, hidden_ND[rows].to(upstream_N.dtype))
            if bias_slope is not None:
                bias_slope += slope_CV.sum(0)
        return (
            hidden_slope,
            None if weight_slope is None else weight_slope.to(weight_VD.dtype),
            None if bias_slope is None or bias_V is None else bias_slope.to(bias_V.dtype),
            None,
        )

"""FDD, Feature Dynamics Distillation: how a prediction forms from layer to layer, for one tokenizer.

Every picked layer's state is read with the model's own head, z_l = W h_l, as the code of MTA's authors does, where FDD
is the base loss of arXiv 2605.01374: inner states go in as the block leaves them, without the final norm.
    final        KL_tau(teacher || student) of the last states
    trajectory   (1/n) sum_l KL_tau(z_l^T || z_l^S)
    derivative   (1/(n-1)) sum_l>1 of 1 - cos(log p_l^S - log p_l-1^S, log p_l^T - log p_l-1^T)
L = L_final + L_trajectory + L_derivative.

Shape legend for this file
    N positions    C positions of one chunk    P picked layers, lowest first    D width    V classes
"""

from collections.abc import Iterator
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch.autograd.function import once_differentiable

from xkd_trainer.losses.geometry import cosine_distance
from xkd_trainer.losses.head import CHUNK_BYTES, LazyLogits
from xkd_trainer.losses.term import at_least_float32

Layer = Annotated[int, Field(ge=1)]


class FddSettings(BaseModel):
    """Options of FDD; the code has no others and weighs its three parts alike."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    layers: tuple[Layer, ...] = ()
    """Picked teacher layers, 1 is the first block. Empty: at capture the layers of words and phrases, in training
    those whose states are in the cache; the last layer is always one of them."""
    student_layers: tuple[Layer, ...] = ()
    """Student blocks, one for each picked layer. Empty: those at the same depth."""
    temperature: float = Field(default=2.0, gt=0, allow_inf_nan=False)
    """tau: divides the logits of L_final and L_trajectory; no factor of its square. Code: 2. L_derivative has none."""
    final: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    """Weight of L_final; 0 turns it off."""
    trajectory: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    """Weight of L_trajectory; 0 turns it off."""
    derivative: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    """Weight of L_derivative; 0 turns it off."""


def derivative(student: LazyLogits, teacher: LazyLogits) -> Tensor:
    """Sum over positions of the mean over neighbouring layers of 1 - cos between the changes of log p.

    From sure of nothing, the teacher turns to the first of two classes and the student to the second, both to three
    parts in four: the changes are (log 1.5, log 0.5) and (log 0.5, log 1.5), their cosine is -0.8717.

    >>> log3 = 1.0986123
    >>> teacher = LazyLogits(hidden=torch.tensor([[[0.0], [log3]]]), weight=torch.tensor([[1.0], [0.0]]))
    >>> student = LazyLogits(hidden=torch.tensor([[[0.0], [log3]]]), weight=torch.tensor([[0.0], [1.0]]))
    >>> derivative(student, teacher)
    tensor(1.8717)

    Args:
        student: States [N, P, d] of the picked layers, P at least 2.
        teacher: States [N, P, D] with a head over the same V classes. A constant: detached here.

    Returns:
        Scalar with gradient by the student's states, and by its head where that requires one. A change that is zero
        costs 1 and has no gradient. Logits are made for a chunk of positions at a time and read in all layers at once.
    """
    total: Tensor = _Derivative.apply(  # type: ignore[no-untyped-call]
        student.hidden, student.weight, student.bias, teacher.detached()
    )
    return total


def _changes(logits_CPV: Tensor) -> Tensor:
    """log p of each layer less that of the layer before, [C, P - 1, V]."""
    return logits_CPV.log_softmax(-1).diff(dim=1)


def _chunks(logits: LazyLogits) -> Iterator[slice]:
    """Ranges of positions whose logits in all layers take at most CHUNK_BYTES, one position at least."""
    num, layers = logits.hidden.shape[:2]
    size = max(1, CHUNK_BYTES // max(1, layers * logits.weight.shape[0] * max(4, logits.weight.dtype.itemsize)))
    for first in range(0, num, size):
        yield slice(first, min(first + size, num))


class _Derivative(torch.autograd.Function):
    """Loss and gradients in one pass over the chunks; backward multiplies them by the upstream scalar."""

    @staticmethod
    def forward(ctx: Any, hidden_NPD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, teacher: LazyLogits) -> Tensor:
        """Walk over the chunks."""
        logits = LazyLogits(hidden=hidden_NPD, weight=weight_VD, bias=bias_V)
        wide = at_least_float32(weight_VD.new_empty(0))
        total = wide.new_zeros(())
        hidden_slope = torch.zeros_like(hidden_NPD) if ctx.needs_input_grad[0] else None
        weight_slope = wide.new_zeros(weight_VD.shape) if ctx.needs_input_grad[1] else None
        bias_slope = wide.new_zeros(bias_V.shape) if bias_V is not None and ctx.needs_input_grad[2] else None
        for rows in _chunks(logits):
            leaf_CPV = logits.at(rows).dense().detach().requires_grad_()
            with torch.enable_grad():
                distance = cosine_distance(_changes(leaf_CPV), _changes(teacher.at(rows).dense()))
                loss = distance.mean(-1).sum()
                (slope_CPV,) = torch.autograd.grad(loss, leaf_CPV)
            total += loss.detach()
            if hidden_slope is not None:
                hidden_slope[rows] = (slope_CPV.to(weight_VD.dtype) @ weight_VD).to(hidden_NPD.dtype)
            if weight_slope is not None:
                weight_slope.addmm_(slope_CPV.flatten(0, 1).T, hidden_NPD[rows].flatten(0, 1).to(wide.dtype))
            if bias_slope is not None:
                bias_slope += slope_CPV.sum((0, 1))
        ctx.save_for_backward(hidden_slope, weight_slope, bias_slope)
        ctx.dtypes = (weight_VD.dtype, None if bias_V is None else bias_V.dtype)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """What the forward pass kept, times the upstream scalar."""
        hidden_slope, weight_slope, bias_slope = ctx.saved_tensors
        weight_dtype, bias_dtype = ctx.dtypes
        return (
            None if hidden_slope is None else hidden_slope * upstream.to(hidden_slope.dtype),
            None if weight_slope is None else (weight_slope * upstream).to(weight_dtype),
            None if bias_slope is None else (bias_slope * upstream).to(bias_dtype),
            None,
        )

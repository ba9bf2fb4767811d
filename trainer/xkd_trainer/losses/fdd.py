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

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from xkd_trainer.losses.chunked import chunked_sum
from xkd_trainer.losses.geometry import cosine_distance
from xkd_trainer.losses.lazy_logits import LazyLogits

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

    >>> import torch
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
    constant = teacher.detached()

    def distances(rows: slice, logits_CPV: Tensor) -> Tensor:
        return cosine_distance(_changes(logits_CPV), _changes(constant.at(rows).dense())).mean(-1)

    return chunked_sum(distances, student)


def _changes(logits_CPV: Tensor) -> Tensor:
    """log p of each layer less that of the layer before, [C, P - 1, V]."""
    return logits_CPV.log_softmax(-1).diff(dim=1)

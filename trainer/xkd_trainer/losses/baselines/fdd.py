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

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from xkd_schemas.errors import UsageError
from xkd_schemas.signals import Signal
from xkd_trainer.data.batch import Batch, gather_rows
from xkd_trainer.losses.declaration import Context, Declaration, Levels, StudentPass
from xkd_trainer.losses.dual_space import TeacherHead, teacher_states
from xkd_trainer.losses.layer_pairing import paired_layers
from xkd_trainer.losses.ops.chunked import chunked_sum
from xkd_trainer.losses.ops.geometry import cosine_distance
from xkd_trainer.losses.ops.head_sums import Comparison, head_divergence
from xkd_trainer.losses.ops.lazy_logits import LazyLogits
from xkd_trainer.losses.ops.term import LossTerm, term
from xkd_trainer.losses.same_tokenizer import first_classes, refuse_other_predictions, refuse_two_tokenizers

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


# FDD wired to the cache: which layers, and both models' states there at the positions that predict.
#
# Shape legend: see batch.py; P picked layers, N predictions of all documents, d the student's width.


def picked(settings: FddSettings, levels: Levels) -> tuple[int, ...]:
    """Teacher layers, lowest first; see `FddSettings.layers`."""
    return tuple(sorted(settings.layers)) or (*levels.states, levels.num_layers)


def needs(settings: FddSettings, levels: Levels) -> tuple[Signal, ...]:
    """Last states, and those of the picked layers below."""
    inner = [layer for layer in picked(settings, levels) if layer != levels.num_layers]
    return (Signal("hidden_last"), *(Signal("hidden", layer) for layer in inner))


class Fdd(nn.Module):
    """Terms `final`, `trajectory` and `derivative`, those that have a weight; each per prediction."""

    attention = False

    def __init__(self, settings: FddSettings, context: Context) -> None:
        super().__init__()
        refuse_two_tokenizers("fdd", context)
        self.settings = settings
        self.last = context.teacher_layers
        self.student_last = context.student_layers
        self.pairs = paired_layers("fdd", picked(settings, context.levels), settings.student_layers, context)
        self.layers = tuple(sorted(student for _, student in self.pairs))
        factors = {
            "final": settings.final,
            "trajectory": settings.trajectory,
            "derivative": settings.derivative if len(self.pairs) > 1 else 0.0,
        }
        self.factors = {name: factor for name, factor in factors.items() if factor > 0}
        if not self.factors:
            raise UsageError("loss fdd has no term left: all its weights are 0, or one layer has no derivative")
        self.how = Comparison(kind="forward_kl", temperature=settings.temperature)
        self.head = TeacherHead(context, "fdd")
        self.classes = max(context.student_vocab.values()) + 1
        """Ids of the tokenizer; heads may have rows beyond them, and not the same number."""

    def weights(self, step: int) -> Mapping[str, float]:
        """Those of the settings."""
        return self.factors

    def counts(self, batch: Batch) -> Mapping[str, Tensor]:
        """Predictions.

        Raises:
            BadData: A document has not the same number of predictions in both models.
        """
        refuse_other_predictions("fdd", batch)
        return dict.fromkeys(self.factors, batch.num_predictions)

    def forward(self, batch: Batch, student: StudentPass, step: int) -> Mapping[str, LossTerm]:
        """Both models' states, read with their heads, layer by layer."""
        sums: dict[str, Tensor] = {}
        layers = [self._layer(batch, student, *pair) for pair in self.pairs]
        if "final" in self.factors or ("trajectory" in self.factors and self._ends_with_the_last()):
            sums["final"] = head_divergence(*self._layer(batch, student, self.last, self.student_last), None, self.how)
        if "trajectory" in self.factors:
            inner = layers[:-1] if self._ends_with_the_last() else layers
            parts = [head_divergence(*pair, None, self.how) for pair in inner]
            parts += [sums["final"]] if self._ends_with_the_last() else []
            sums["trajectory"] = torch.stack(parts).mean(0)
        if "derivative" in self.factors:
            own, theirs = (_stacked(side) for side in zip(*layers, strict=True))
            sums["derivative"] = derivative(own, theirs)
        return {name: term(sums[name], batch.num_predictions) for name in self.factors}

    def _ends_with_the_last(self) -> bool:
        return self.pairs[-1] == (self.last, self.student_last)

    def _layer(
        self, batch: Batch, student: StudentPass, teacher_layer: int, student_layer: int
    ) -> tuple[LazyLogits, LazyLogits]:
        """Student's and teacher's logits of one layer at all valid predictions, not made yet."""
        valid_BN, own = batch.predict_valid_BN, student.logits
        if student_layer != self.student_last:
            own = replace(own, hidden=gather_rows(student.states.layers[student_layer], batch.predict_BN))
        if teacher_layer == self.last:
            theirs = self.head(teacher_states(batch))
        else:
            hidden_BTD, kept_BR = batch.states(teacher_layer).hidden_BTD, batch.teacher_kept_BR
            assert hidden_BTD is not None
            assert kept_BR is not None
            theirs = self.head(gather_rows(hidden_BTD, kept_BR.gather(1, batch.teacher_predict_BM)).float())
        return first_classes(own, self.classes).at(valid_BN), first_classes(theirs, self.classes).at(valid_BN)


def _stacked(layers: tuple[LazyLogits, ...]) -> LazyLogits:
    """One head's logits of several layers, states [N, P, D]."""
    return replace(layers[0], hidden=torch.stack([logits.hidden for logits in layers], dim=1))


FDD = Declaration(
    name="fdd",
    source="FDD, as the base loss of MTA, arXiv 2605.01374",
    settings=FddSettings,
    needs=needs,
    build=Fdd,
    one_tokenizer=True,
    ce_weight=0,
)

"""FDD, Feature Dynamics Distillation: how a prediction forms from layer to layer, for one tokenizer.

Every picked layer's state is read with the model's own head, z_l = W h_l, as the code of MTA's authors does, where FDD
is the base loss of arXiv 2605.01374: inner states go in as the block leaves them, without the final norm.
    final        KL_tau(teacher || student) of the last states
    trajectory   (1/n) sum_l KL_tau(z_l^T || z_l^S)
    derivative   (1/(n-1)) sum_l>1 of 1 - cos(log p_l^S - log p_l-1^S, log p_l^T - log p_l-1^T)
L = L_final + L_trajectory + L_derivative.

Shape legend: see batch.py; P picked layers, lowest first; N also all predictions of a batch, C those of one chunk,
    d the student's width, V classes.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from xkd_schemas.errors import UsageError
from xkd_schemas.signals import Signal
from xkd_trainer.data.batch import Batch, gather_rows, unwrap
from xkd_trainer.losses.declaration import Context, Declaration, Levels, Positive, Settings, StudentPass, Weight
from xkd_trainer.losses.dual_space import TeacherHead, teacher_states
from xkd_trainer.losses.ops.divergence import Comparison, cosine_distance
from xkd_trainer.losses.ops.lazy_logits import LazyLogits, chunked_sum
from xkd_trainer.losses.ops.shared_pass import head_divergence
from xkd_trainer.losses.ops.term import LossTerm, term
from xkd_trainer.losses.pairing import LayerIndex, OneTokenizerLoss, pair_layers


class FddSettings(Settings):
    """Options of FDD; the code has no others and weighs its three parts alike."""

    layers: tuple[LayerIndex, ...] = ()
    """Picked teacher layers, 1 is the first block. Empty: at capture the layers of words and phrases, in training
    those whose states are in the cache; the last layer is always one of them."""
    student_layers: tuple[LayerIndex, ...] = ()
    """Student blocks, one for each picked layer. Empty: those at the same depth."""
    temperature: Positive = 2.0
    """tau: divides the logits of L_final and L_trajectory; no factor of its square. Code: 2. L_derivative has none."""
    final: Weight = 1.0
    """Weight of L_final; 0 turns it off."""
    trajectory: Weight = 1.0
    """Weight of L_trajectory; 0 turns it off."""
    derivative: Weight = 1.0
    """Weight of L_derivative; 0 turns it off."""


def derivative(student: LazyLogits, teacher: LazyLogits) -> Tensor:
    """Sum over positions of the mean over neighbouring layers of 1 - cos between the changes of log p.

    States of the picked layers, [N, P, d] and [N, P, D], P at least 2; heads over the same V classes; the teacher is a
    constant. A change that is zero costs 1 and has no gradient. Logits are made for a chunk of positions at a time and
    read in all layers at once.

    From sure of nothing, the teacher turns to the first of two classes and the student to the second, both to three
    parts in four: the changes are (log 1.5, log 0.5) and (log 0.5, log 1.5), their cosine is -0.8717.

    >>> log3 = 1.0986123
    >>> teacher = LazyLogits(hidden=torch.tensor([[[0.0], [log3]]]), weight=torch.tensor([[1.0], [0.0]]))
    >>> student = LazyLogits(hidden=torch.tensor([[[0.0], [log3]]]), weight=torch.tensor([[0.0], [1.0]]))
    >>> derivative(student, teacher)
    tensor(1.8717)
    """

    def distances(rows: slice, logits_CPV: Tensor) -> Tensor:
        both = logits_CPV, teacher.at(rows).dense()
        return cosine_distance(*(z_CPV.log_softmax(-1).diff(dim=1) for z_CPV in both)).mean(-1)

    return chunked_sum(distances, student)


# -- wiring to the cache


def pick_layers(settings: FddSettings, levels: Levels) -> tuple[int, ...]:
    """Teacher layers, lowest first; see `FddSettings.layers`."""
    return tuple(sorted(settings.layers)) or (*levels.states, levels.num_layers)


def needs(settings: FddSettings, levels: Levels) -> tuple[Signal, ...]:
    """Last states, and those of the picked layers below."""
    picked = pick_layers(settings, levels)
    return (Signal("hidden_last"), *(Signal("hidden", layer) for layer in picked if layer != levels.num_layers))


class Fdd(OneTokenizerLoss):
    """Terms `final`, `trajectory` and `derivative`, those that have a weight; each per prediction."""

    def __init__(self, settings: FddSettings, context: Context) -> None:
        super().__init__("fdd", context)
        self.last, self.student_last = context.teacher_layers, context.student_layers
        self.pairs = pair_layers("fdd", pick_layers(settings, context.levels), settings.student_layers, context)
        self.layers = tuple(sorted(student for _, student in self.pairs))
        derivative = settings.derivative if len(self.pairs) > 1 else 0.0
        factors = {"final": settings.final, "trajectory": settings.trajectory, "derivative": derivative}
        self.terms = {name: factor for name, factor in factors.items() if factor > 0}
        if not self.terms:
            raise UsageError("loss fdd has no term left: all its weights are 0, or one layer has no derivative")
        self.how = Comparison(kind="forward_kl", temperature=settings.temperature)
        self.head = TeacherHead(context, "fdd")

    def forward(self, batch: Batch, student: StudentPass, step: int) -> Mapping[str, LossTerm]:
        """Both models' states, read with their heads, layer by layer."""
        ends, sums = (self.last, self.student_last), dict[str, Tensor]()
        logits = {pair: self._layer(batch, student, *pair) for pair in (*self.pairs, ends)}

        @cache
        def compare(pair: tuple[int, int]) -> Tensor:
            return head_divergence(*logits[pair], None, self.how)

        if "final" in self.terms:
            sums["final"] = compare(ends)
        if "trajectory" in self.terms:
            sums["trajectory"] = torch.stack([compare(pair) for pair in self.pairs]).mean(0)
        if "derivative" in self.terms:
            sides = zip(*(logits[pair] for pair in self.pairs), strict=True)
            sums["derivative"] = derivative(
                *(replace(side[0], hidden=torch.stack([z.hidden for z in side], dim=1)) for side in sides)
            )
        return {name: term(sums[name], batch.num_predictions) for name in self.terms}

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
            hidden_BTD, kept_BR = unwrap(batch.states(teacher_layer).hidden_BTD), unwrap(batch.teacher_kept_BR)
            theirs = self.head(gather_rows(hidden_BTD, kept_BR.gather(1, batch.teacher_predict_BM)).float())
        classes = slice(self.classes)
        return own.of_classes(classes).at(valid_BN), theirs.of_classes(classes).at(valid_BN)


FDD = Declaration(
    name="fdd", source="FDD, as the base loss of MTA, arXiv 2605.01374", settings=FddSettings, needs=needs, build=Fdd,
    one_tokenizer=True, ce_weight=0,
)  # fmt: skip

"""DSKD (arXiv 2406.17328): for one tokenizer by position, for two by cross-model attention; see `dual_space`.

Shape legend: see batch.py; d is the student's width.
"""

from collections.abc import Mapping

from torch import nn

from xkd_trainer.data.batch import Batch
from xkd_trainer.losses.declaration import Context, Declaration, Projectors, StudentPass, uniform_weights
from xkd_trainer.losses.dual_space import (
    CrossModelLoss,
    DskdCmaSettings,
    DskdSettings,
    TeacherHead,
    find_correct,
    last_states,
    projected_cross_entropy,
    student_space,
    teacher_space,
    teacher_states,
    with_fixed_head,
)
from xkd_trainer.losses.ops.term import LossTerm
from xkd_trainer.losses.pairing import OneTokenizerLoss

_PROJECTORS = Projectors(projector_lr=1e-3, projector_weight_decay=0.01)


class Dskd(OneTokenizerLoss):
    """Terms `projected_ce`, `student_space` and `teacher_space`; prediction n of both models is the same token's."""

    terms = ("projected_ce", "student_space", "teacher_space")

    def __init__(self, settings: DskdSettings, context: Context) -> None:
        super().__init__("dskd", context)
        self.settings = settings
        self.t2s = nn.Linear(context.teacher_width, context.student_width)
        self.s2t = nn.Linear(context.student_width, context.teacher_width)
        self.head = TeacherHead(context, "dskd")

    def forward(self, batch: Batch, student: StudentPass, step: int) -> Mapping[str, LossTerm]:
        """Both spaces, with every prediction weighing the same."""
        valid_BN, hidden_BND = batch.predict_valid_BN, teacher_states(batch)
        ones_BN, count = uniform_weights(valid_BN), batch.num_predictions
        projected = with_fixed_head(student, self.t2s(hidden_BND))
        back, theirs = self.head(self.s2t(student.predict_hidden_BNd)), self.head(hidden_BND)
        return {
            "projected_ce": projected_cross_entropy(projected, batch.target_BN, valid_BN),
            "student_space": student_space(student.logits, projected, ones_BN, valid_BN, self.settings),
            "teacher_space": teacher_space(back, theirs, ones_BN, valid_BN, self.settings, count=count),
        }


class DskdCma(CrossModelLoss):
    """The same three terms between two tokenizers; each token takes a mixture of the other model's states."""

    terms = Dskd.terms

    def __init__(self, settings: DskdCmaSettings, context: Context) -> None:
        super().__init__(context, "dskd_cma")
        self.settings = settings

    def forward(self, batch: Batch, student: StudentPass, step: int) -> Mapping[str, LossTerm]:
        """Both spaces; in the student's only where the projected teacher is right."""
        valid_BN, valid_BM, mixed = batch.predict_valid_BN, batch.teacher_predict_valid_BM, self.mix(batch, student)
        kept_BN = find_correct(mixed.projected, batch.target_BN, valid_BN) if self.settings.correct_only else valid_BN
        weights_BN, ones_BM = uniform_weights(kept_BN), uniform_weights(valid_BM)
        theirs, count = self.head(mixed.hidden_BMD), batch.num_predictions
        return {
            "projected_ce": projected_cross_entropy(mixed.projected, batch.target_BN, valid_BN),
            "student_space": student_space(student.logits, mixed.projected, weights_BN, valid_BN, self.settings),
            "teacher_space": teacher_space(mixed.back, theirs, ones_BM, valid_BM, self.settings, count=count),
        }


DSKD = Declaration(
    name="dskd",
    source="DSKD for one vocabulary, arXiv 2406.17328",
    settings=DskdSettings,
    needs=last_states,
    build=Dskd,
    one_tokenizer=True,
    default_weight=0.5,
    ce_weight=0.5,
    projectors=_PROJECTORS,
)

DSKD_CMA = Declaration(
    name="dskd_cma",
    source="DSKD with cross-model attention, arXiv 2406.17328",
    settings=DskdCmaSettings,
    needs=last_states,
    build=DskdCma,
    default_weight=0.5,
    ce_weight=0.5,
    projectors=_PROJECTORS,
)

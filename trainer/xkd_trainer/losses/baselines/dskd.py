"""DSKD wired to the cache: for one tokenizer by position, for two by cross-model attention.

Shape legend: see batch.py; d is the student's width.
"""

from collections.abc import Mapping

from torch import Tensor, nn

from xkd_trainer.data.batch import Batch
from xkd_trainer.losses.declaration import Context, Declaration, Projectors, StudentPass, uniform_weights
from xkd_trainer.losses.dual_space import (
    DskdCmaSettings,
    DskdSettings,
    TeacherHead,
    attention_scores,
    correct,
    last_states,
    projected_cross_entropy,
    student_space,
    teacher_side,
    teacher_space,
    teacher_states,
    with_fixed_head,
)
from xkd_trainer.losses.ops.cross_model_attention import attend
from xkd_trainer.losses.ops.term import LossTerm
from xkd_trainer.losses.same_tokenizer import refuse_other_predictions, refuse_two_tokenizers

_TERMS = ("projected_ce", "student_space", "teacher_space")


class Dskd(nn.Module):
    """Terms `projected_ce`, `student_space` and `teacher_space`; prediction n of both models is the same token's."""

    layers: tuple[int, ...] = ()
    attention = False

    def __init__(self, settings: DskdSettings, context: Context) -> None:
        super().__init__()
        refuse_two_tokenizers("dskd", context)
        self.settings = settings
        self.t2s = nn.Linear(context.teacher_width, context.student_width)
        self.s2t = nn.Linear(context.student_width, context.teacher_width)
        self.head = TeacherHead(context, "dskd")

    def weights(self, step: int) -> Mapping[str, float]:
        """L_KD is their sum; its factor is the loss's own."""
        return dict.fromkeys(_TERMS, 1.0)

    def counts(self, batch: Batch) -> Mapping[str, Tensor]:
        """Student predictions.

        Raises:
            BadData: A document has not the same number of predictions in both models.
        """
        refuse_other_predictions("dskd", batch)
        return dict.fromkeys(_TERMS, batch.num_predictions)

    def forward(self, batch: Batch, student: StudentPass, step: int) -> Mapping[str, LossTerm]:
        """Both spaces, with every prediction weighing the same."""
        valid_BN, hidden_BND = batch.predict_valid_BN, teacher_states(batch)
        ones_BN, count = uniform_weights(valid_BN), batch.num_predictions
        projected = with_fixed_head(student, self.t2s(hidden_BND))
        back = self.head(self.s2t(student.predict_hidden_BNd))
        return {
            "projected_ce": projected_cross_entropy(projected, batch.target_BN, valid_BN),
            "student_space": student_space(student.logits, projected, ones_BN, valid_BN, self.settings),
            "teacher_space": teacher_space(
                back, self.head(hidden_BND), ones_BN, valid_BN, self.settings, count=count
            ),
        }  # fmt: skip


class DskdCma(nn.Module):
    """The same three terms between two tokenizers; each token takes a mixture of the other model's states.

    All are sums divided by the number of the student's predictions. Projectors are those of the authors'
    configuration: single linear layers with bias.
    """

    layers: tuple[int, ...] = ()
    attention = False

    def __init__(self, settings: DskdCmaSettings, context: Context) -> None:
        super().__init__()
        self.settings = settings
        self.hidden_std, self.embedding_std = context.hidden_std, context.embedding_std
        d, wide = context.student_width, context.teacher_width
        self.t2s = nn.Linear(wide, d)
        self.s2t = nn.Linear(d, wide)
        self.query = nn.Linear(2 * d, 2 * wide)
        self.head = TeacherHead(context, "dskd_cma")
        self.embeddings_VD: Tensor
        self.register_buffer("embeddings_VD", context.teacher_embeddings(), persistent=False)

    def weights(self, step: int) -> Mapping[str, float]:
        """L_KD is their sum; its factor is the loss's own."""
        return dict.fromkeys(_TERMS, 1.0)

    def counts(self, batch: Batch) -> Mapping[str, Tensor]:
        """Student predictions."""
        return dict.fromkeys(_TERMS, batch.num_predictions)

    def forward(self, batch: Batch, student: StudentPass, step: int) -> Mapping[str, LossTerm]:
        """Both spaces; in the student's only where the projected teacher is right."""
        s_valid_BN, t_valid_BM = batch.predict_valid_BN, batch.teacher_predict_valid_BM
        teacher = teacher_side(batch, self.embeddings_VD)
        scores_BNM = attention_scores(batch, student, teacher, self.query, self.embedding_std)
        values_BMd = self.t2s(teacher.values_BMD(self.hidden_std, self.embedding_std))
        projected = with_fixed_head(student, attend(scores_BNM, "teacher") @ values_BMd)
        back = self.head(attend(scores_BNM, "student") @ self.s2t(student.predict_hidden_BNd))
        kept_BN = correct(projected, batch.target_BN, s_valid_BN) if self.settings.correct_only else s_valid_BN
        return {
            "projected_ce": projected_cross_entropy(projected, batch.target_BN, s_valid_BN),
            "student_space": student_space(
                student.logits, projected, uniform_weights(kept_BN), s_valid_BN, self.settings
            ),
            "teacher_space": teacher_space(
                back, self.head(teacher.hidden_BMD), uniform_weights(t_valid_BM), t_valid_BM, self.settings,
                count=batch.num_predictions,
            ),
        }  # fmt: skip


DSKD = Declaration(
    name="dskd",
    source="DSKD for one vocabulary, arXiv 2406.17328",
    settings=DskdSettings,
    needs=last_states,
    build=Dskd,
    one_tokenizer=True,
    default_weight=0.5,
    ce_weight=0.5,
    projectors=Projectors(projector_lr=1e-3, projector_weight_decay=0.01),
)

DSKD_CMA = Declaration(
    name="dskd_cma",
    source="DSKD with cross-model attention, arXiv 2406.17328",
    settings=DskdCmaSettings,
    needs=last_states,
    build=DskdCma,
    default_weight=0.5,
    ce_weight=0.5,
    projectors=Projectors(projector_lr=1e-3, projector_weight_decay=0.01),
)

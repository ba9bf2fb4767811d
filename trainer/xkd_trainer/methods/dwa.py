"""DWA-KD wired to the cache: cross-model attention, both spaces, and soft-DTW on embeddings and last states.

Shape legend: see batch.py; d is the student's width.
"""

from collections.abc import Mapping

from torch import Tensor, nn

from xkd_schemas.teacher import Signal
from xkd_trainer.batch import Batch
from xkd_trainer.losses.cma import attend
from xkd_trainer.losses.dwa import (
    DwaSettings,
    alignment,
    band,
    sequence_term,
    student_weights,
    teacher_space,
    teacher_weights,
)
from xkd_trainer.losses.head_pass import Weigh
from xkd_trainer.losses.head_plan import Planned
from xkd_trainer.losses.term import LossTerm
from xkd_trainer.methods.declaration import Context, Declaration, Projectors, StudentPass, uniform_weights
from xkd_trainer.methods.dual_space import (
    Teacher,
    TeacherHead,
    at_valid,
    attention_scores,
    teacher_side,
    with_fixed_head,
)

_KD = ("projected_ce", "student_space", "teacher_space")
_DTW = ("dtw_embeddings", "dtw_states")


def needs(settings: DwaSettings, levels: tuple[tuple[int, str], ...]) -> tuple[Signal, ...]:
    """Last states and entropies; heads and embeddings are always in the cache."""
    return (Signal("hidden_last"), *((Signal("entropy"),) if settings.entropy_weights else ()))


class Dwa(nn.Module):
    """Terms `projected_ce`, `student_space`, `teacher_space`, `dtw_embeddings` and `dtw_states`.

    All are sums divided by the number of the student's predictions. Projectors are those of the
    authors' configuration: single linear layers with bias.
    """

    layers: tuple[int, ...] = ()
    attention = False

    def __init__(self, settings: DwaSettings, context: Context) -> None:
        super().__init__()
        self.settings = settings
        self.hidden_std, self.embedding_std = context.hidden_std, context.embedding_std
        self.teacher_vocab_size = context.teacher_vocab_size
        d, wide = context.student_width, context.teacher_width
        self.t2s = nn.Linear(wide, d)
        self.s2t = nn.Linear(d, wide)
        self.query = nn.Linear(2 * d, 2 * wide)
        self.embed_t2s = nn.Linear(wide, d)
        self.head = TeacherHead(context, "dwa")
        self.embeddings_VD: Tensor
        self.register_buffer("embeddings_VD", context.teacher_embeddings(), persistent=False)

    def weights(self, step: int) -> Mapping[str, float]:
        """Script values, on their way up during a warm-up."""
        s = self.settings
        dtw = s.dtw * s.share(step, s.dtw_warmup_steps)
        gate = s.share(step, s.gate_warmup_steps) if s.gate else 1.0
        return dict.fromkeys(_KD, s.kd) | {"student_space": s.kd * gate} | dict.fromkeys(_DTW, dtw)

    def counts(self, batch: Batch) -> Mapping[str, Tensor]:
        """Student predictions."""
        return dict.fromkeys((*_KD, *_DTW), batch.num_predictions)

    def forward(self, batch: Batch, student: StudentPass, step: int) -> Mapping[str, LossTerm | Planned]:
        """Eq. 7-25."""
        teacher = teacher_side(batch, self.embeddings_VD)
        scores_BNM = attention_scores(batch, student, teacher, self.query, self.embedding_std)
        to_student_BNM = attend(scores_BNM, "teacher")
        values_BMD = teacher.values_BMD(self.hidden_std, self.embedding_std)
        mixed_BNd = to_student_BNM @ at_valid(self.t2s, values_BMD, batch.teacher_predict_valid_BM)
        student_BND = at_valid(self.s2t, student.predict_hidden_BNd, batch.predict_valid_BN)
        mixed_BMD = attend(scores_BNM, "student") @ student_BND
        projected = with_fixed_head(student, mixed_BNd)
        terms: dict[str, LossTerm | Planned] = {
            "projected_ce": student.plan.cross_entropy(projected),
            "student_space": student.plan.divergence(
                projected, self.settings.student_space, weigh=self._weigh_student()
            ),
            "teacher_space": teacher_space(
                self.head(mixed_BMD), self.head(teacher.hidden_BMD), self._teacher_weights(batch),
                batch.teacher_predict_valid_BM, self.settings, count=batch.num_predictions,
            ),
        }  # fmt: skip
        return terms | self._sequences(batch, student, teacher, to_student_BNM, step)

    def _weigh_student(self) -> Weigh | None:
        """Eq. 11-12 for some documents, from the student's entropies and the peaks of the projected teacher."""
        s = self.settings

        def weigh(entropy_BN: Tensor, peak_BN: Tensor, valid_BN: Tensor) -> Tensor:
            ones_BN = uniform_weights(valid_BN)
            gate_BN = peak_BN if s.gate else ones_BN
            weight_BN = entropy_BN if s.entropy_weights else ones_BN
            return student_weights(weight_BN, gate_BN, valid_BN, s.student_weight)

        return weigh if s.gate or s.entropy_weights else None

    def _teacher_weights(self, batch: Batch) -> Tensor:
        """Eq. 14."""
        valid_BM = batch.teacher_predict_valid_BM
        if not self.settings.entropy_weights:
            return uniform_weights(valid_BM)
        assert batch.teacher_entropy_BM is not None
        return teacher_weights(batch.teacher_entropy_BM, self.teacher_vocab_size, valid_BM)

    def _sequences(
        self,
        batch: Batch,
        student: StudentPass,
        teacher: Teacher,
        attention_BNM: Tensor,
        step: int,
    ) -> dict[str, LossTerm]:
        """Soft-DTW on target embeddings and on last states (eq. 17-25)."""
        s, valid_BM = self.settings, batch.teacher_predict_valid_BM
        lengths = batch.predict_valid_BN.sum(-1), valid_BM.sum(-1)
        gamma = s.gamma_at(step)
        pairs = {
            "dtw_embeddings": (
                student.target_embeddings_BNd,
                at_valid(self.embed_t2s, teacher.target_BMD, valid_BM),
            ),
            "dtw_states": (student.predict_hidden_BNd, at_valid(self.t2s, teacher.hidden_BMD, valid_BM)),
        }
        found = {}
        for name, (x_BNd, y_BMd) in pairs.items():
            follows_BNM = attention_BNM.detach()
            if s.band == "soft" and s.band_source == "sdtw":
                follows_BNM = alignment(x_BNd, y_BMd, *lengths, gamma=gamma)
            penalty_BNM = self._penalty(follows_BNM, *lengths, step)
            found[name] = sequence_term(x_BNd, y_BMd, penalty_BNM, *lengths, gamma=gamma, divergence=s.dtw_divergence)
        return found

    def _penalty(self, follows_BNM: Tensor, lengths_B: Tensor, teacher_lengths_B: Tensor, step: int) -> Tensor | None:
        """What the band adds to the cross cost, on its way up; None for nothing."""
        share = self.settings.share(step, self.settings.band_warmup_steps)
        penalty_BNM = band(follows_BNM, lengths_B, teacher_lengths_B, self.settings)
        if penalty_BNM is None or self.settings.band == "hard":
            return penalty_BNM
        return share * penalty_BNM


DWA = Declaration(
    name="dwa",
    source="DWA-KD, arXiv 2602.21669, eq. 7-25, on DSKD-CMA, arXiv 2406.17328",
    settings=DwaSettings,
    needs=needs,
    build=Dwa,
    ce_weight=0.5,
    plug_weight=0.5,
    projectors=Projectors(projector_lr=1e-3, projector_weight_decay=0.01),
)

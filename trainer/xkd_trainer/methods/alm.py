"""ALM wired to the cache: both models' log-likelihoods of the aligned spans of the response.

Shape legend: see batch.py.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from xkd_trainer.batch import Batch
from xkd_trainer.losses.alm import AlmSettings, chunk_log_likelihoods, likelihood_matching, whole_chunks
from xkd_trainer.losses.head import head_log_probabilities
from xkd_trainer.losses.term import LossTerm
from xkd_trainer.methods.declaration import Context, Declaration, StudentPass
from xkd_trainer.methods.dual_space import TeacherHead, last_states, teacher_states


class Alm(nn.Module):
    """Term `alm`: a mean over chunks whose tokens both models predict, or over those chunks' teacher tokens."""

    layers: tuple[int, ...] = ()
    attention = False

    def __init__(self, settings: AlmSettings, context: Context) -> None:
        super().__init__()
        self.settings = settings
        self.head = TeacherHead(context, "alm")

    def weights(self, step: int) -> Mapping[str, float]:
        """Factor 1."""
        return {"alm": 1.0}

    def counts(self, batch: Batch) -> Mapping[str, Tensor]:
        """Chunks, or their teacher tokens."""
        student_BK = whole_chunks(
            batch.predict_BN + 1, batch.predict_valid_BN, batch.span_student_BK2, batch.span_valid_BK
        )
        teacher_BK = whole_chunks(
            batch.teacher_predict_BM + 1, batch.teacher_predict_valid_BM, batch.span_teacher_BK2, batch.span_valid_BK
        )
        return {"alm": self._weight(batch)[student_BK & teacher_BK].sum()}

    def forward(self, batch: Batch, student: StudentPass, step: int) -> Mapping[str, LossTerm]:
        """Both sides' chunks, compared."""
        s_valid_BN, t_valid_BM = batch.predict_valid_BN, batch.teacher_predict_valid_BM
        s_log_p_N = head_log_probabilities(student.logits.at(s_valid_BN), batch.target_BN[s_valid_BN])
        student_BK, s_whole_BK = chunk_log_likelihoods(
            _placed(s_log_p_N, s_valid_BN), batch.predict_BN + 1, s_valid_BN,
            batch.span_student_BK2, batch.span_valid_BK,
        )  # fmt: skip
        teacher_BK, t_whole_BK = chunk_log_likelihoods(
            _placed(self._teacher(batch), t_valid_BM), batch.teacher_predict_BM + 1, t_valid_BM,
            batch.span_teacher_BK2, batch.span_valid_BK,
        )  # fmt: skip
        whole_BK = s_whole_BK & t_whole_BK
        return {"alm": likelihood_matching(student_BK, teacher_BK, self._weight(batch), whole_BK, self.settings)}

    @torch.no_grad()
    def _teacher(self, batch: Batch) -> Tensor:
        """The teacher's log-probability of each of its own targets, one for each valid prediction."""
        valid_BM = batch.teacher_predict_valid_BM
        return head_log_probabilities(self.head(teacher_states(batch)).at(valid_BM), batch.teacher_target_BM[valid_BM])

    def _weight(self, batch: Batch) -> Tensor:
        """Weight of each span in the mean, float32."""
        length_BK = batch.span_teacher_BK2[..., 1] - batch.span_teacher_BK2[..., 0]
        return (torch.ones_like(length_BK) if self.settings.average == "chunks" else length_BK).float()


def _placed(values_N: Tensor, valid_BN: Tensor) -> Tensor:
    """The values at the True positions of `valid_BN`, 0 elsewhere."""
    return values_N.new_zeros(valid_BN.shape).masked_scatter(valid_BN, values_N)


ALM = Declaration(
    name="alm",
    source="ALM, arXiv 2503.20083, without its outcome-chunk debiasing",
    settings=AlmSettings,
    needs=last_states,
    build=Alm,
    default_weight=0.5,
    ce_weight=0.5,
)

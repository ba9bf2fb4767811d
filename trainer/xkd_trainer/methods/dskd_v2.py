"""DSKDv2 wired to the cache: pairs of predictions of the same piece of text, and the teacher's own labels.

Shape legend: see batch.py; d is the student's width, K counts the classes both vocabularies share.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from xkd_schemas.teacher import Signal
from xkd_trainer.batch import Batch, gather_rows
from xkd_trainer.losses.dskd import correct, projected_cross_entropy, student_space, teacher_space
from xkd_trainer.losses.dskd_v2 import DskdV2Settings, equal_logits, label_table, pseudo_inverse
from xkd_trainer.losses.head import LazyLogits
from xkd_trainer.losses.term import LossTerm
from xkd_trainer.losses.vocabulary import shared_vocabulary
from xkd_trainer.methods.declaration import (
    Context,
    Declaration,
    Projectors,
    StudentPass,
    constant_head,
    uniform_weights,
)
from xkd_trainer.methods.dual_space import TeacherHead, own_at, teacher_states, with_fixed_head


def needs(settings: DskdV2Settings, levels: tuple[tuple[int, str], ...]) -> tuple[Signal, ...]:
    """Last states, and the classes the teacher finds likeliest."""
    return (Signal("hidden_last"), Signal("argmax"))


class DskdV2(nn.Module):
    """Terms `projected_ce` over labelled pairs, `student_space` over those that agree, `teacher_space` over all pairs.

    A pair is labelled where the teacher's likeliest class is in the student's vocabulary. Each term is a mean over its
    pairs. Which agree is found before the step, with one more product of the student's head.
    """

    layers: tuple[int, ...] = ()
    attention = False

    def __init__(self, settings: DskdV2Settings, context: Context) -> None:
        super().__init__()
        self.settings = settings
        self.student_head = context.student_head
        self.head = TeacherHead(context, "dskd_v2")
        student_ids_K, teacher_ids_K = shared_vocabulary(
            context.student_vocab, context.teacher_vocab, settings.shared_vocab
        )
        student_KD = constant_head(context.student_head(), "this student").weight_VD[student_ids_K]
        teacher_KD = self.head.weight_VD[teacher_ids_K]
        self.t2s = nn.Linear(context.teacher_width, context.student_width, bias=False)
        with torch.no_grad():
            self.t2s.weight.copy_(equal_logits(pseudo_inverse(student_KD), teacher_KD))
        self.student_ids_K: Tensor
        self.inverse_DK: Tensor
        self.labels_V: Tensor
        self.register_buffer("student_ids_K", student_ids_K, persistent=False)
        self.register_buffer("inverse_DK", pseudo_inverse(teacher_KD), persistent=False)
        labels_V = label_table(student_ids_K, teacher_ids_K, self.head.weight_VD.shape[0])
        self.register_buffer("labels_V", labels_V, persistent=False)

    def weights(self, step: int) -> Mapping[str, float]:
        """L_KD is their sum; its factor is the loss's own."""
        student, teacher = (float(self.settings.spaces != other) for other in ("teacher", "student"))
        return {"projected_ce": student, "student_space": student, "teacher_space": teacher}

    def counts(self, batch: Batch) -> Mapping[str, Tensor]:
        """Labelled pairs, those that agree, and all pairs."""
        label_BE, labelled_BE = self._labels(batch)
        kept_BE = labelled_BE
        if self.settings.agreement and self.settings.spaces != "teacher":
            head = constant_head(self.student_head(), "this student", convert=False)
            with torch.no_grad():
                hidden_BEd = self.t2s(gather_rows(teacher_states(batch), batch.pairs_BE2[..., 1]))
                kept_BE = self._kept(
                    LazyLogits(hidden=hidden_BEd, weight=head.weight_VD, bias=head.bias_V), label_BE, labelled_BE
                )
        return {
            "projected_ce": labelled_BE.sum(), "student_space": kept_BE.sum(),
            "teacher_space": batch.pair_valid_BE.sum(),
        }  # fmt: skip

    def _kept(self, projected: LazyLogits, label_BE: Tensor, labelled_BE: Tensor) -> Tensor:
        """The pairs that `student_space` compares, [B, E]."""
        if not self.settings.agreement:
            return labelled_BE
        agreeing_BE = correct(projected, label_BE, labelled_BE)
        share_B1 = agreeing_BE.sum(-1, keepdim=True) / labelled_BE.sum(-1, keepdim=True).clamp_min(1)
        return torch.where(share_B1 > self.settings.t2s_agreement, labelled_BE, agreeing_BE)

    def _labels(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The teacher's likeliest class of each pair as a student class, and where there is one, [B, E] both."""
        assert batch.teacher_argmax_BM is not None
        label_BE = self.labels_V[batch.teacher_argmax_BM.gather(1, batch.pairs_BE2[..., 1])]
        return label_BE, batch.pair_valid_BE & (label_BE >= 0)

    def forward(self, batch: Batch, student: StudentPass, step: int) -> Mapping[str, LossTerm]:
        """Both spaces, over pairs."""
        label_BE, labelled_BE = self._labels(batch)
        own = own_at(student, batch.pairs_BE2[..., 0])
        teacher_BED = gather_rows(teacher_states(batch), batch.pairs_BE2[..., 1])
        projected = with_fixed_head(student, self.t2s(teacher_BED))
        kept_BE = self._kept(projected, label_BE, labelled_BE)
        s2t_Dd = equal_logits(self.inverse_DK, own.weight[self.student_ids_K])
        back = self.head(linear(own.hidden, s2t_Dd))
        return {
            "projected_ce": projected_cross_entropy(projected, label_BE, labelled_BE),
            "student_space": student_space(own, projected, uniform_weights(kept_BE), kept_BE, self.settings),
            "teacher_space": teacher_space(
                back, self.head(teacher_BED), uniform_weights(batch.pair_valid_BE), batch.pair_valid_BE, self.settings,
                count=batch.pair_valid_BE.sum(),
            ),
        }  # fmt: skip


DSKD_V2 = Declaration(
    name="dskd_v2",
    source="DSKDv2 with exact token alignment, arXiv 2504.11426",
    settings=DskdV2Settings,
    needs=needs,
    build=DskdV2,
    default_weight=0.5,
    ce_weight=0.5,
    projectors=Projectors(projector_lr=5e-4, projector_weight_decay=0.01),
)

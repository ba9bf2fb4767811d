"""MultiLevelOT wired to the cache: the likeliest classes of both models at predictions paired by shift.

Shape legend: see batch.py; P pairs of the longest document, N all pairs of the batch, V classes, k chosen classes.
"""

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor, nn

from xkd_schemas.teacher import Signal
from xkd_trainer.batch import Batch
from xkd_trainer.losses.head import LazyLogits
from xkd_trainer.losses.multilevelot import (
    MultiLevelOtSettings,
    chosen_probabilities,
    class_mass,
    class_order,
    greedy_match,
    position_distance,
    sequence_distance,
    word_cross_entropy,
)
from xkd_trainer.losses.term import LossTerm
from xkd_trainer.methods.declaration import Context, Declaration, StudentPass
from xkd_trainer.methods.dual_space import TeacherHead
from xkd_trainer.methods.shift import paired, student_logits, teacher_hidden


def needs(settings: MultiLevelOtSettings, levels: tuple[tuple[int, str], ...]) -> tuple[Signal, ...]:
    """Last states; the head is always in the cache."""
    return (Signal("hidden_last"),)


class MultiLevelOt(nn.Module):
    """Terms `l1` and `sequence`, means over documents with a pair, and `word`, a mean over pairs."""

    layers: tuple[int, ...] = ()
    attention = False

    def __init__(self, settings: MultiLevelOtSettings, context: Context) -> None:
        super().__init__()
        self.settings = settings
        self.head = TeacherHead(context, "multilevelot")

    def weights(self, step: int) -> Mapping[str, float]:
        """As set; cross-entropy on the corpus is a loss of its own."""
        return {"l1": self.settings.l1, "word": self.settings.word, "sequence": self.settings.sequence}

    def counts(self, batch: Batch) -> Mapping[str, Tensor]:
        """Pairs, and documents with one."""
        paired_BP = paired(batch)
        documents = paired_BP.any(-1).sum()
        return {"l1": documents, "word": paired_BP.sum(), "sequence": documents}

    def forward(self, batch: Batch, student: StudentPass, step: int) -> Mapping[str, LossTerm]:
        """The three levels."""
        valid_BP = paired(batch)
        teacher = self.head(teacher_hidden(batch, valid_BP))
        return self.levels(student_logits(student, valid_BP), teacher, valid_BP)

    def levels(self, student: LazyLogits, teacher: LazyLogits, valid_BP: Tensor) -> dict[str, LossTerm]:
        """The terms of the logits at all pairs, [N] positions each; the teacher's are a constant."""
        s = self.settings
        student_BPk = self._chosen(student, valid_BP)
        teacher_BPk = self._chosen(teacher.detached(), valid_BP)
        k = max(student_BPk.shape[-1], teacher_BPk.shape[-1])  # a vocabulary of fewer classes is filled up with 0
        student_BPk, teacher_BPk = (F.pad(p, (0, k - p.shape[-1])) for p in (student_BPk, teacher_BPk))
        if s.match == "greedy":
            student_BPk = greedy_match(student_BPk, teacher_BPk)
        return {
            "l1": position_distance(student_BPk, teacher_BPk, valid_BP),
            "word": word_cross_entropy(student_BPk, teacher_BPk, valid_BP, s.word_target),
            "sequence": sequence_distance(student_BPk, teacher_BPk, valid_BP, s.epsilon, s.rounds),
        }

    def _chosen(self, logits: LazyLogits, valid_BP: Tensor) -> Tensor:
        """Probabilities of a model's likeliest classes, [B, P, k]; 0 where there is no pair."""
        s = self.settings
        document_N = valid_BP.nonzero()[:, 0]
        ids_Bk = class_order(class_mass(logits, document_N, len(valid_BP), s.temperature), s.classes, s.order)
        chosen_Nk = chosen_probabilities(logits, ids_Bk[document_N], s.temperature)
        return chosen_Nk.new_zeros(*valid_BP.shape, ids_Bk.shape[-1]).index_put((valid_BP,), chosen_Nk)


MULTILEVELOT = Declaration(
    name="multilevelot",
    source="MultiLevelOT, arXiv 2412.14528, and its official code",
    settings=MultiLevelOtSettings,
    needs=needs,
    build=MultiLevelOt,
    default_weight=1.5,
)

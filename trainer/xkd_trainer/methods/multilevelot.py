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
    greedy_classes,
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
        document_N = valid_BP.nonzero()[:, 0]
        teacher_Nk = self._chosen(teacher.detached(), document_N, self._likeliest(teacher, valid_BP))
        if s.match == "greedy":
            ids_Bk = greedy_classes(student.detached(), teacher_Nk, valid_BP.sum(-1), s.temperature)
        else:
            ids_Bk = self._likeliest(student, valid_BP)
        student_Nk = self._chosen(student, document_N, ids_Bk)
        k = max(student_Nk.shape[-1], teacher_Nk.shape[-1])  # a vocabulary of fewer classes is filled up with 0
        student_BPk, teacher_BPk = (
            p.new_zeros(*valid_BP.shape, k).index_put((valid_BP,), F.pad(p, (0, k - p.shape[-1])))
            for p in (student_Nk, teacher_Nk)
        )
        return {
            "l1": position_distance(student_BPk, teacher_BPk, valid_BP),
            "word": word_cross_entropy(student_BPk, teacher_BPk, valid_BP, s.word_target),
            "sequence": sequence_distance(student_BPk, teacher_BPk, valid_BP, s.epsilon, s.rounds),
        }

    def _likeliest(self, logits: LazyLogits, valid_BP: Tensor) -> Tensor:
        """A model's likeliest classes of each document, [B, k]."""
        s, document_N = self.settings, valid_BP.nonzero()[:, 0]
        return class_order(class_mass(logits, document_N, len(valid_BP), s.temperature), s.classes, s.order)

    def _chosen(self, logits: LazyLogits, document_N: Tensor, ids_Bk: Tensor) -> Tensor:
        """Probabilities of each document's classes at its pairs, [N, k]."""
        return chosen_probabilities(logits, ids_Bk[document_N], self.settings.temperature)


MULTILEVELOT = Declaration(
    name="multilevelot",
    source="MultiLevelOT, arXiv 2412.14528, and its official code",
    settings=MultiLevelOtSettings,
    needs=needs,
    build=MultiLevelOt,
    default_weight=1.5,
)

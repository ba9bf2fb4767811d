"""ULD wired to the cache: sorted probabilities at predictions paired by shift.

Shape legend: see batch.py; P pairs of the longest document, N all pairs of the batch, V teacher classes.
"""

from collections.abc import Mapping

from torch import Tensor, nn

from xkd_schemas.teacher import Signal
from xkd_trainer.batch import Batch
from xkd_trainer.losses.term import LossTerm, term
from xkd_trainer.losses.uld import SortedTeacher, UldSettings, head_sorted_l1, sorted_teacher, topk_teacher
from xkd_trainer.methods.declaration import Context, Declaration, StudentPass
from xkd_trainer.methods.dual_space import TeacherHead
from xkd_trainer.methods.shift import paired, student_logits, teacher_hidden


def needs(settings: UldSettings, levels: tuple[tuple[int, str], ...]) -> tuple[Signal, ...]:
    """Last states, or the largest logits with the logarithm of the sum over all."""
    if settings.teacher == "topk":
        return (Signal("topk_logits"), Signal("logsumexp"))
    return (Signal("hidden_last"),)


class Uld(nn.Module):
    """Term `l1`: a mean over pairs, or over documents with a pair. Nothing is learned beside the student.

    From the k largest probabilities it is called `approximate_l1`, in the log and on the terminal.
    """

    layers: tuple[int, ...] = ()
    attention = False

    def __init__(self, settings: UldSettings, context: Context) -> None:
        super().__init__()
        self.settings = settings
        self.term = "l1" if settings.teacher == "exact" else "approximate_l1"
        self.head = TeacherHead(context, "uld") if settings.teacher == "exact" else None

    def weights(self, step: int) -> Mapping[str, float]:
        """L_ULD alone; cross-entropy is a loss of its own."""
        return {self.term: 1.0}

    def counts(self, batch: Batch) -> Mapping[str, Tensor]:
        """Pairs, or documents with one."""
        paired_BP = paired(batch)
        return {self.term: paired_BP.sum() if self.settings.mean == "tokens" else paired_BP.any(-1).sum()}

    def forward(self, batch: Batch, student: StudentPass, step: int) -> Mapping[str, LossTerm]:
        """Sum over all pairs."""
        paired_BP = paired(batch)
        weights_N = None
        if self.settings.mean == "documents":
            weights_N = (1.0 / paired_BP.sum(-1, keepdim=True).clamp_min(1)).expand_as(paired_BP)[paired_BP]
        total = head_sorted_l1(
            student_logits(student, paired_BP), self._teacher(batch, paired_BP), weights_N, self.settings.temperature
        )
        return {self.term: term(total, self.counts(batch)[self.term])}

    def _teacher(self, batch: Batch, paired_BP: Tensor) -> SortedTeacher:
        if self.head is not None:
            return sorted_teacher(self.head(teacher_hidden(batch, paired_BP)), self.settings.temperature)
        most = paired_BP.shape[1]
        assert batch.teacher_topk_logits_BMK is not None
        assert batch.teacher_logsumexp_BM is not None
        return topk_teacher(
            batch.teacher_topk_logits_BMK[:, :most][paired_BP], batch.teacher_logsumexp_BM[:, :most][paired_BP]
        )


ULD = Declaration(
    name="uld",
    source="ULD, arXiv 2402.12030; DSKD's code. teacher = topk is an approximation",
    settings=UldSettings,
    needs=needs,
    build=Uld,
    default_weight=0.5,
    ce_weight=0.5,
)

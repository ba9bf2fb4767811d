"""ULD, the Universal Logit Distillation loss (arXiv 2402.12030): two vocabularies compared by sorted probabilities.

L_ULD = sum_n sum_v | p^S_n(v) - p^T_n(v) |, where v counts classes from the likeliest down and the shorter vocabulary
is filled up with zeros: the Wasserstein distance between two distributions whose classes are all equally far apart.
Nothing says which class is which, and the n-th prediction of one model is compared with the n-th of the other.

The paper's total is CE + 1.5 L_ULD; DSKD's code has 0.5 CE + 0.5 L_ULD, which `--loss uld` is.

Shape legend: see batch.py; P pairs of the longest document, N all pairs of the batch, C those of one chunk,
    V student classes, W teacher classes that are known.
"""

from collections.abc import Callable, Mapping
from typing import Literal

from pydantic import model_validator
from torch import Tensor

from xkd_schemas.signals import Signal
from xkd_trainer.data.batch import Batch, unwrap
from xkd_trainer.losses.declaration import Context, Declaration, Loss, Positive, Settings, StudentPass
from xkd_trainer.losses.dual_space import TeacherHead
from xkd_trainer.losses.ops.divergence import sorted_distance
from xkd_trainer.losses.ops.lazy_logits import LazyLogits, chunked_sum
from xkd_trainer.losses.ops.term import LossTerm, term
from xkd_trainer.losses.pairing import find_pairs, student_at_pairs, teacher_at_pairs
from xkd_trainer.models.measures import at_least_float32

SortedTeacher = Callable[[slice], Tensor]
"""From positions to the teacher's probabilities there, [C, W], the largest first."""


class UldSettings(Settings):
    """Options of ULD; the defaults are the paper's loss with our reduction."""

    temperature: Positive = 1.0
    """Divides both logits. Paper and code: 1."""
    mean: Literal["tokens", "documents"] = "tokens"
    """tokens: sum over paired positions by their number (DSKD's code). documents: a mean in each document (ULD's)."""
    teacher: Literal["exact", "topk"] = "exact"
    """exact: all of the teacher's classes, from its last states and its head. topk: AN APPROXIMATION that knows only
    its k largest probabilities and takes the others as 0; a position's loss is then wrong by at most their sum."""

    @model_validator(mode="after")
    def _require_temperature_one(self) -> "UldSettings":
        if self.teacher == "topk" and self.temperature != 1.0:
            raise ValueError("teacher = topk is stored for temperature 1 only")
        return self


def sorted_l1(student_logits_NV: Tensor, teacher_NW: Tensor, temperature: float = 1.0) -> Tensor:
    """sum_v | p^S(v) - p^T(v) | at each position, both sorted from the largest down, [N] from 0 to 2.

    The teacher's probabilities are given sorted, and a constant; V and W may differ. The temperature divides the
    student's logits alone. At equal probabilities the gradient is that of no difference, 0.

    A uniform student over two classes, a teacher over three: |0.5 - 0.7| + |0.5 - 0.2| + |0 - 0.1| = 0.6.

    >>> import torch
    >>> sorted_l1(torch.zeros(1, 2), torch.tensor([[0.7, 0.2, 0.1]]))
    tensor([0.6000])
    """
    sorted_NV = (at_least_float32(student_logits_NV) / temperature).softmax(-1).sort(-1, descending=True).values
    return sorted_distance(sorted_NV, teacher_NW.to(sorted_NV.dtype))


def sorted_teacher(logits: LazyLogits, temperature: float) -> SortedTeacher:
    """All of the teacher's probabilities, made for the positions that are asked for."""
    return lambda rows: (logits.at(rows).dense() / temperature).softmax(-1).sort(-1, descending=True).values


def topk_teacher(logits_NK: Tensor, logsumexp_N: Tensor) -> SortedTeacher:
    """The k largest probabilities, from logits in descending order and the logarithm of the sum over all classes.

    They do not add up to 1; what is missing bounds the error of `sorted_l1` at that position, because every class
    that is left out changes it by at most its own probability.
    """
    return lambda rows: (at_least_float32(logits_NK[rows]) - logsumexp_N[rows, None]).exp()


# -- wiring to the cache


def needs(settings: UldSettings, _levels: object) -> tuple[Signal, ...]:
    """Last states, or the largest logits with the logarithm of the sum over all."""
    if settings.teacher == "topk":
        return (Signal("topk_logits"), Signal("logsumexp"))
    return (Signal("hidden_last"),)


class Uld(Loss):
    """Term `l1`: a mean over pairs, or over documents with a pair. Nothing is learned beside the student.

    From the k largest probabilities it is called `approximate_l1`, in the log and on the terminal.
    """

    def __init__(self, settings: UldSettings, context: Context) -> None:
        super().__init__()
        self.settings = settings
        self.terms = ("l1",) if settings.teacher == "exact" else ("approximate_l1",)
        self.head = TeacherHead(context, "uld") if settings.teacher == "exact" else None

    def counts(self, batch: Batch) -> Mapping[str, Tensor]:
        """Pairs, or documents with one."""
        paired_BP = find_pairs(batch)
        pairs = paired_BP.sum() if self.settings.mean == "tokens" else paired_BP.any(-1).sum()
        return dict.fromkeys(self.terms, pairs)

    def forward(self, batch: Batch, student: StudentPass, step: int) -> Mapping[str, LossTerm]:
        """Sum over all pairs."""
        paired_BP, weights_N = find_pairs(batch), None
        if self.settings.mean == "documents":
            weights_N = (1.0 / paired_BP.sum(-1, keepdim=True).clamp_min(1)).expand_as(paired_BP)[paired_BP]
        if self.head is not None:
            teacher = sorted_teacher(self.head(teacher_at_pairs(batch, paired_BP)), self.settings.temperature)
        else:
            known = unwrap(batch.teacher_topk_logits_BMK), unwrap(batch.teacher_logsumexp_BM)
            teacher = topk_teacher(*(values[:, : paired_BP.shape[1]][paired_BP] for values in known))

        def distances(rows: slice, logits_CV: Tensor) -> Tensor:
            return sorted_l1(logits_CV, teacher(rows), self.settings.temperature)

        total = chunked_sum(distances, student_at_pairs(student, paired_BP), weights_N)
        return {name: term(total, count) for name, count in self.counts(batch).items()}


ULD = Declaration(
    name="uld", source="ULD, arXiv 2402.12030; DSKD's code. teacher = topk is an approximation", settings=UldSettings,
    needs=needs, build=Uld, default_weight=0.5, ce_weight=0.5,
)  # fmt: skip

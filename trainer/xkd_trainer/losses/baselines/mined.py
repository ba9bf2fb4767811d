"""MinED (FuseLLM, arXiv 2401.10491): the teacher's logits in the student's vocabulary, where their tokens match.

Tokens are matched in each document by time warping over edit distances, classes by least edit distance; both are in
`mined_alignment`. Where a student position has one partner and both read the same token there, the student learns the
partner's distribution, elsewhere the token that follows:
    L = sum_n usable_n KL(P_n || Q_n) + (1 - usable_n) (-log Q_n(gold)),    P, Q at temperature tau
The paper adds cross-entropy, half and half: `--loss mined`.

Shape legend for this file
    B documents    N student predictions    M teacher predictions    V the student's classes    D teacher width
"""

import importlib
import importlib.util
from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from xkd_schemas.errors import UsageError
from xkd_schemas.signals import Signal
from xkd_trainer.data.batch import Batch, gather_rows
from xkd_trainer.losses.declaration import Context, Declaration, StudentPass, constant_head
from xkd_trainer.losses.ops.head_sums import Comparison, LazyLogits, head_cross_entropy, head_divergence
from xkd_trainer.losses.ops.term import LossTerm, term

UNMAPPED = -1e5
"""Logit of a student class that no teacher class stands for, as in DSKD's code; its exponential is exactly 0."""


class MinedSettings(BaseModel):
    """Options of MinED."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    temperature: float = Field(default=2.0, gt=0, allow_inf_nan=False)
    """tau, for the one-hot positions too. DSKD's code: 2. No tau squared in front, as in that code."""
    vocabulary: Literal["inverse", "nearest", "exact"] = "inverse"
    """Which teacher class stands for a student class; a class without one gets probability 0.

    inverse (DSKD's code): every teacher class goes to its nearest student class by edit distance, and a student class
    takes the first (lowest id) of those that come to it, so no teacher class is used twice. nearest: the student
    class's own nearest teacher class, so every class has one, and one teacher class may stand for hundreds. exact: a
    token of equal text, blanks aside.
    """


def usable_positions(
    partner_BN: Tensor, student_input_BN: Tensor, teacher_input_BM: Tensor, to_student_V: Tensor
) -> Tensor:
    """Where a student position has one partner whose input token maps to the student's, bool [B, N].

    >>> partner, student, teacher = torch.tensor([[0, -1, 1]]), torch.tensor([[4, 5, 6]]), torch.tensor([[0, 1]])
    >>> usable_positions(partner, student, teacher, torch.tensor([4, 5]))
    tensor([[ True, False, False]])

    Args:
        partner_BN: `mined_alignment.partners`.
        student_input_BN: Ids at the predicting positions.
        teacher_input_BM: The teacher's.
        to_student_V: `mined_alignment.vocabulary_map` from the teacher's ids to the student's.
    """
    theirs_BN = teacher_input_BM.gather(1, partner_BN.clamp_min(0))
    return (partner_BN >= 0) & (to_student_V[theirs_BN] == student_input_BN)


def inverted(to_student_V: Tensor, size: int) -> Tensor:
    """For each of the student's `size` classes the lowest teacher id that maps to it, [size] int64, or -1.

    >>> inverted(torch.tensor([2, 0, 2, -1]), 4)
    tensor([ 1, -1,  0, -1])

    Args:
        to_student_V: The student's id for the teacher's ids 0, 1, ...; -1 where there is none.
        size: The student's classes.
    """
    known = torch.nonzero(to_student_V >= 0)[:, 0]
    none = len(to_student_V)
    lowest = known.new_full((size,), none).scatter_reduce_(0, to_student_V[known], known, "amin")
    return torch.where(lowest == none, -1, lowest)


def carried_head(weight_VD: Tensor, bias_V: Tensor | None, to_teacher_V: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The teacher's head with one row for each of the student's `size` classes, and its bias.

    >>> carried_head(torch.tensor([[1.0], [2.0]]), None, torch.tensor([1, -1]), 3)
    (tensor([[2.],
            [0.],
            [0.]]), tensor([      0., -100000., -100000.]))

    Args:
        weight_VD: The teacher's head.
        bias_V: Its bias, or None.
        to_teacher_V: The teacher's id for the student's ids 0, 1, ...; -1 where there is none.
        size: Rows of the student's head; those beyond `to_teacher_V` have no teacher class.
    """
    to_teacher_V = to_teacher_V[:size]
    known = torch.nonzero(to_teacher_V >= 0)[:, 0]
    chosen = to_teacher_V[known]
    head_VD = weight_VD.new_zeros(size, weight_VD.shape[1])
    logit_V = weight_VD.new_full((size,), UNMAPPED)
    head_VD[known] = weight_VD[chosen]
    logit_V[known] = 0.0 if bias_V is None else bias_V[chosen]
    return head_VD, logit_V


def mined_divergence(
    student: LazyLogits,
    teacher: LazyLogits,
    target_BN: Tensor,
    usable_BN: Tensor,
    valid_BN: Tensor,
    temperature: float,
) -> LossTerm:
    """L of the module, summed; the count is the number of predictions.

    A usable position, where P = (3/4, 1/4) and Q is uniform, and one that only has its gold token: 0.1308 + log 2.

    >>> student = LazyLogits(hidden=torch.zeros(1, 2, 1), weight=torch.ones(2, 1))
    >>> teacher = LazyLogits(hidden=torch.ones(1, 2, 1), weight=torch.tensor([[1.0986123], [0.0]]))
    >>> yes, target = torch.tensor([[True, True]]), torch.tensor([[0, 1]])
    >>> mined_divergence(student, teacher, target, torch.tensor([[True, False]]), yes, 1.0)
    LossTerm(total=tensor(0.8240), count=tensor(2.))

    Args:
        student: States [B, N, .], with gradient.
        teacher: The partners' states [B, N, D] with a head over the student's classes; a constant.
        target_BN: The student's gold ids.
        usable_BN: `usable_positions`.
        valid_BN: Bool, False for padding.
        temperature: Divides all logits.
    """
    usable_BN, gold_BN = usable_BN & valid_BN, valid_BN & ~usable_BN
    how = Comparison(kind="forward_kl", temperature=temperature)
    matched = head_divergence(student.at(usable_BN), teacher.at(usable_BN), None, how)
    bias = None if student.bias is None else student.bias / temperature
    softened = replace(student, hidden=student.hidden / temperature, bias=bias)
    return term(matched + head_cross_entropy(softened.at(gold_BN), target_BN[gold_BN]), valid_BN.sum())


# MinED wired to the cache: both vocabularies aligned when it is built, token strings in each batch.
#
# Shape legend: see batch.py; D is the teacher's width, V a vocabulary.


def needs(settings: MinedSettings, levels: tuple[tuple[int, str], ...]) -> tuple[Signal, ...]:
    """Last states; the head is always in the cache."""
    return (Signal("hidden_last"),)


class Mined(nn.Module):
    """Term `mined`, a mean over the student's predictions, and `matched`, which only shows how many have a partner.

    `matched` has weight 0: the other positions learn their gold token, and how many they are should be seen.
    """

    layers: tuple[int, ...] = ()
    attention = False

    def __init__(self, settings: MinedSettings, context: Context) -> None:
        super().__init__()
        if importlib.util.find_spec("rapidfuzz") is None:
            raise UsageError("mined needs rapidfuzz, which is not installed", fix="pip install rapidfuzz")
        self._alignment = importlib.import_module("xkd_trainer.losses.baselines.mined_alignment")
        self.settings = settings
        student, teacher = context.student_vocab, context.teacher_vocab
        self._student_texts = self._alignment.token_texts(student)
        self._teacher_texts = self._alignment.token_texts(teacher)
        mode = "exact" if settings.vocabulary == "exact" else "nearest"
        to_student_V = self._alignment.vocabulary_map(teacher, student, mode)
        if settings.vocabulary == "inverse":
            to_teacher_V = inverted(to_student_V, max(student.values()) + 1)
        else:
            to_teacher_V = self._alignment.vocabulary_map(student, teacher, mode)
        head = constant_head(context.teacher_head(), "mined")
        size = context.student_head().weight_VD.shape[0]
        head_VD, logit_V = carried_head(head.weight_VD, head.bias_V, to_teacher_V.to(head.weight_VD.device), size)
        self.to_student_V: Tensor
        self.head_VD: Tensor
        self.logit_V: Tensor
        self.register_buffer("to_student_V", to_student_V, persistent=False)
        self.register_buffer("head_VD", head_VD, persistent=False)
        self.register_buffer("logit_V", logit_V, persistent=False)

    def weights(self, step: int) -> Mapping[str, float]:
        """Factor 1; `matched` is there to be read."""
        return {"mined": 1.0, "matched": 0.0}

    def counts(self, batch: Batch) -> Mapping[str, Tensor]:
        """Student predictions."""
        return dict.fromkeys(("mined", "matched"), batch.num_predictions)

    def forward(self, batch: Batch, student: StudentPass, step: int) -> Mapping[str, LossTerm]:
        """Align, carry over, compare."""
        assert batch.teacher_hidden_BRD is not None
        valid_BN = batch.predict_valid_BN
        partner_BN, usable_BN = self.aligned(batch)
        rows_BN = batch.teacher_predict_BM.gather(1, partner_BN.clamp_min(0))
        teacher = LazyLogits(
            hidden=gather_rows(batch.teacher_hidden_BRD, rows_BN), weight=self.head_VD, bias=self.logit_V
        )
        target_BN, tau = batch.target_BN, self.settings.temperature
        return {
            "mined": mined_divergence(student.logits, teacher, target_BN, usable_BN, valid_BN, tau),
            "matched": term(usable_BN.sum().float(), valid_BN.sum()),
        }

    @torch.no_grad()
    def aligned(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Partner of each prediction by the tokens both models read there, and whether it is usable, [B, N]."""
        input_BN = batch.student_ids_BS.gather(1, batch.predict_BN)
        partner_BN: Tensor = self._alignment.partners(
            (self._student_texts, input_BN, batch.predict_valid_BN),
            (self._teacher_texts, batch.teacher_input_BM, batch.teacher_predict_valid_BM),
        )
        return partner_BN, usable_positions(partner_BN, input_BN, batch.teacher_input_BM, self.to_student_V)


MINED = Declaration(
    name="mined",
    source="MinED of FuseLLM, arXiv 2401.10491, as a baseline of DSKD, arXiv 2406.17328",
    settings=MinedSettings,
    needs=needs,
    build=Mined,
    default_weight=0.5,
    ce_weight=0.5,
)

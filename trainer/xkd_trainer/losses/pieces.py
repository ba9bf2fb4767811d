"""Pieces of text that both models predict, and the base of the losses that compare distributions over them.

A piece is a shortest stretch of a response that starts and ends at a token boundary of both models. Those of which one
model cannot predict every token are left out.

Shape legend: see batch.py;
    N predictions of one model, without B all those in pieces    C those of one chunk    G pieces    g of one chunk
    V student classes    W teacher classes    T values of a piece
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Final, Literal

import torch
from torch import Tensor

from xkd_trainer.data.batch import Batch
from xkd_trainer.losses.declaration import Context, Loss, Positive, StudentPass
from xkd_trainer.losses.dual_space import TeacherHead, teacher_states
from xkd_trainer.losses.ops.divergence import DIVERGENCES, Kind, Knobs
from xkd_trainer.losses.ops.lazy_logits import LazyLogits, grouped_sum, rows_at_once
from xkd_trainer.losses.ops.shared_pass import batches
from xkd_trainer.losses.ops.term import LossTerm, term
from xkd_trainer.models.measures import at_least_float32

LONGEST: Final = 64
"""Tokens of a piece, in either model; longer ones are left out where the logits of a whole piece are held."""


def find_pieces(
    place_BN: Tensor, predicted_BN: Tensor, range_BK2: Tensor, valid_BK: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """For one model: the span of each prediction [B, N], whether it lies in it [B, N], which spans are whole [B, K].

    `place` is where the predicted token stands, in the unit of the ranges, which are half-open, ascending and
    disjoint; padding comes last. A span is whole if all of its tokens are predicted.

    >>> place, ranges = torch.tensor([[1, 2, 4]]), torch.tensor([[[1, 3], [3, 5]]])
    >>> find_pieces(place, torch.tensor([[True, True, True]]), ranges, torch.tensor([[True, True]]))
    (tensor([[0, 0, 1]]), tensor([[True, True, True]]), tensor([[ True, False]]))
    """
    if not valid_BK.numel():
        return torch.zeros_like(place_BN), torch.zeros_like(predicted_BN), valid_BK
    never = torch.iinfo(range_BK2.dtype).max
    start_BK = torch.where(valid_BK, range_BK2[..., 0], never).contiguous()
    piece_BN = (torch.searchsorted(start_BK, place_BN.contiguous(), right=True) - 1).clamp_min(0)
    end_BN = torch.where(valid_BK, range_BK2[..., 1], 0).gather(1, piece_BN)
    inside_BN = predicted_BN & (place_BN < end_BN) & (place_BN >= start_BK.gather(1, piece_BN))
    found_BK = torch.zeros_like(range_BK2[..., 0]).scatter_add(1, piece_BN, inside_BN.to(range_BK2.dtype))
    whole_BK = valid_BK & (found_BK > 0) & (found_BK == range_BK2[..., 1] - range_BK2[..., 0])
    return piece_BN, inside_BN, whole_BK


@dataclass(frozen=True, kw_only=True, slots=True)
class PieceSide:
    """One model's predictions inside pieces, those of a piece side by side, pieces in the order of the text."""

    inside_BN: Tensor  # bool: which predictions they are
    target_N: Tensor  # the ids they predict
    size_G: Tensor  # tokens of each piece
    ends: Sequence[int]  # sums of the sizes, 0 in front

    def rows(self, pieces: slice) -> slice:
        """The predictions of some pieces."""
        return slice(self.ends[pieces.start], self.ends[pieces.stop])

    def bounds(self, pieces: slice) -> tuple[Tensor, Tensor]:
        """The first and the last prediction of some pieces, counted from the first of them, [g] both."""
        last_g = self.size_G[pieces].cumsum(0) - 1
        return last_g + 1 - self.size_G[pieces], last_g

    def sum(self, values_C: Tensor, pieces: slice) -> Tensor:
        """Sums [g, ...] over each piece of what its predictions have, [C, ...]."""
        size_g = self.size_G[pieces]
        piece_C = torch.arange(len(size_g), device=size_g.device).repeat_interleave(size_g)
        return values_C.new_zeros(len(size_g), *values_C.shape[1:]).index_add(0, piece_C, values_C)

    def mean(self, values_C: Tensor, pieces: slice) -> Tensor:
        """The same divided by the number of predictions of the piece."""
        sums_g = self.sum(values_C, pieces)
        return sums_g / self.size_G[pieces].view(-1, *[1] * (sums_g.ndim - 1))


@dataclass(frozen=True, kw_only=True, slots=True)
class Pieces:
    """The pieces of a batch that both models predict whole."""

    student: PieceSide
    teacher: PieceSide
    document_G: Tensor  # which document of the batch each is of
    classes_BW: Tensor | None = None  # which of the teacher's classes a loss compares in each document

    def parts(self, student: LazyLogits, teacher: LazyLogits) -> list[tuple[slice, slice]]:
        """The student's predictions in chunks that cut no piece, and the pieces in each."""
        sizes = torch.maximum(self.student.size_G, self.teacher.size_G).tolist()
        most = min(rows_at_once(student), rows_at_once(teacher)) if sizes else 1
        return [(self.student.rows(pieces), pieces) for pieces, _ in batches(sizes, most)]


def shared_pieces(batch: Batch, *, end_token: bool, longest: float) -> Pieces:
    """Pieces of text of at most so many tokens, and with `end_token` the two end tokens."""
    sides = (
        (batch.predict_BN, batch.predict_valid_BN, batch.span_student_BK2, batch.target_BN),
        (batch.teacher_predict_BM, batch.teacher_predict_valid_BM, batch.span_teacher_BK2, batch.teacher_target_BM),
    )
    kept_BK = batch.span_valid_BK if end_token else batch.span_valid_BK & batch.span_text_BK
    found = []
    for predict_BN, predicted_BN, range_BK2, target_BN in sides:
        piece_BN, inside_BN, whole_BK = find_pieces(predict_BN + 1, predicted_BN, range_BK2, batch.span_valid_BK)
        size_BK = range_BK2[..., 1] - range_BK2[..., 0]
        kept_BK = kept_BK & whole_BK & (size_BK <= longest)
        found.append((piece_BN, inside_BN, size_BK, target_BN))
    made = []
    for piece_BN, inside_BN, size_BK, target_BN in found:
        inside_BN = inside_BN & kept_BK.gather(1, piece_BN) if kept_BK.numel() else inside_BN
        size_G = size_BK[kept_BK]
        ends = [0, *accumulate(size_G.tolist())]
        made.append(PieceSide(inside_BN=inside_BN, target_N=target_BN[inside_BN], size_G=size_G, ends=ends))
    return Pieces(student=made[0], teacher=made[1], document_G=kept_BK.nonzero()[:, 0])


def columns(values_gV: Tensor, ids_K: Tensor) -> Tensor:
    """values_gV[:, ids_K], whose gradient does not take seconds where the ids are not ascending."""
    return values_gV.gather(1, ids_K.expand(len(values_gV), -1))


class PieceSettings(Knobs):
    """Options of all losses over pieces."""

    divergence: Kind = "forward_kl"
    """How two distributions are compared."""
    temperature: Positive = 1.0
    """Divides both logits."""
    end_token: Literal["exclude", "include"] = "exclude"
    """Whether the two end tokens are a piece."""


class PieceLoss(Loss):
    """Its first term is a sum over pieces. The others have weight 0: parts of it, and `covered`, the share of the
    student's predictions that are in pieces."""

    def __init__(self, settings: PieceSettings, context: Context, who: str, *parts: str) -> None:
        super().__init__()
        self.how = settings
        self.terms = {who: 1.0} | dict.fromkeys((*parts, "covered"), 0.0)
        self.head = TeacherHead(context, who)

    def compare(self, logits_CV: Tensor, logits_CW: Tensor, pieces: Pieces, some: slice) -> Tensor:
        """From the logits over the temperature of all tokens of some pieces: the terms but `covered`, [g, T]."""
        raise NotImplementedError

    def choose_classes(self, theirs: LazyLogits, pieces: Pieces) -> Tensor | None:
        """The pieces' `classes_BW` for `compare`, from all the teacher's logits; here none."""
        return None

    def divergence(self, p_gV: Tensor, q_gV: Tensor) -> Tensor:
        """Of log-probabilities of teacher and student, [g]."""
        return DIVERGENCES[self.how.divergence](p_gV, q_gV, self.how)

    def weigh(self, pieces: Pieces) -> Tensor:
        """Weights of the pieces, [G]."""
        return torch.ones_like(pieces.document_G).float()

    def counts(self, batch: Batch) -> Mapping[str, Tensor]:
        """The weight of all pieces, and predictions."""
        weights_G = self.weigh(self.pieces_of(batch))
        return dict.fromkeys(self.terms, weights_G.sum().round()) | {"covered": batch.num_predictions}

    def pieces_of(self, batch: Batch) -> Pieces:
        """Those that are compared."""
        return shared_pieces(batch, end_token=self.how.end_token == "include", longest=LONGEST)

    def forward(self, batch: Batch, student: StudentPass, step: int) -> Mapping[str, LossTerm]:
        """All pieces, some at a time."""
        pieces, counts = self.pieces_of(batch), self.counts(batch)
        own = student.logits.at(pieces.student.inside_BN)
        theirs = self.head(teacher_states(batch)[pieces.teacher.inside_BN])
        sums = self.sums(own, theirs, pieces, self.weigh(pieces))
        covered = pieces.student.size_G.sum().to(sums[0].dtype)
        return {name: term(total, counts[name]) for name, total in zip(self.terms, (*sums, covered), strict=True)}

    def sums(self, own: LazyLogits, theirs: LazyLogits, pieces: Pieces, weights_G: Tensor) -> list[Tensor]:
        """The terms but `covered`, from the logits at all predictions in pieces; the first has gradient."""
        pieces = replace(pieces, classes_BW=self.choose_classes(theirs, pieces))

        def compare(some: slice, logits_CV: Tensor) -> Tensor:
            logits_CV = at_least_float32(logits_CV) / self.how.temperature
            with torch.no_grad():
                logits_CW = theirs.at(pieces.teacher.rows(some)).dense() / self.how.temperature
            return self.compare(logits_CV, logits_CW.to(logits_CV.dtype), pieces, some)

        total, sums_T = grouped_sum(compare, own, weights_G, pieces.parts(own, theirs))
        return [total, *sums_T[1:]]

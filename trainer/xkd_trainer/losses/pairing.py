"""What of the student stands beside what of the teacher: layers, equal token ids, predictions in their order, and the
pieces of text that both predict.

Layers are Hugging Face indices, 1 is the output of the first block.

Shape legend: see batch.py; P pairs of the longest document, N all pairs of the batch, d the student's width; of pieces
    N predictions of one model, without B all those of the batch    C those of one chunk    G pieces    g of one chunk
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from xkd_schemas.errors import BadData, UsageError
from xkd_trainer.data.batch import Batch, gather_rows, unwrap
from xkd_trainer.losses.declaration import Context, Loss, StudentPass
from xkd_trainer.losses.ops.divergence import cosine_distance
from xkd_trainer.losses.ops.lazy_logits import LazyLogits, rows_at_once
from xkd_trainer.losses.ops.shared_pass import batches
from xkd_trainer.losses.ops.term import LossTerm, term
from xkd_trainer.models.measures import at_least_float32, divide


def share_out(raw_BK: Tensor, valid_BK: Tensor) -> Tensor:
    """Weights [B, K] without gradient, proportional to `raw` and with sum 1 over the valid ones of a document.

    0 where not valid, and all 0 in a document whose `raw` is. Eq. 9 of MTA, m_k / sum m of SRA, and the scaling of
    eq. 12 and 14 of DWA-KD.

    >>> share_out(torch.tensor([[0.1, 0.3, 0.6]]), torch.tensor([[True, True, False]]))
    tensor([[0.2500, 0.7500, 0.0000]])
    """
    raw_BK = torch.where(valid_BK, at_least_float32(raw_BK.detach()), 0.0)
    return divide(raw_BK, raw_BK.sum(-1, keepdim=True))


def compare_vectors(student_BKD: Tensor, teacher_BKD: Tensor, weights_BK: Tensor, valid_BK: Tensor) -> LossTerm:
    """Sum of w (1 - cos) over valid pairs of vectors, and the sum of w: L_Hid of MTA (eq. 13), L_cos of SRA.

    The student's vectors come projected, with gradient; the teacher's and the weights are constants. A valid zero
    vector costs its weight and has no gradient.

    >>> student, teacher = torch.tensor([[[3.0, 4.0], [1.0, 0.0]]]), torch.tensor([[[8.0, 6.0], [0.0, 2.0]]])
    >>> compare_vectors(student, teacher, torch.tensor([[0.5, 0.25]]), torch.tensor([[True, True]]))
    LossTerm(total=tensor(0.2700), count=tensor(0.7500))
    """
    valid_BK1 = valid_BK.unsqueeze(-1)
    both = (torch.where(valid_BK1, at_least_float32(side), 0.0) for side in (student_BKD, teacher_BKD))
    distance_BK = cosine_distance(*both)
    weights_BK = torch.where(valid_BK, weights_BK.to(distance_BK.dtype), 0.0)
    return term((weights_BK * distance_BK).sum(), weights_BK.sum())


def check_layers(option: str, layers: Sequence[int], side: str, last: int) -> None:
    """UsageError where the student, or the teacher, has no such layer."""
    for layer in layers:
        if not 1 <= layer <= last:
            raise UsageError(f"{option}: layer {layer} does not exist, the {side} has layers 1 to {last}")


def pair_layers(
    name: str, teacher_layers: Sequence[int], student_layers: Sequence[int], context: Context
) -> tuple[tuple[int, int], ...]:
    """(teacher layer, student layer) pairs, lowest teacher layer first; without `student_layers` at the same depth.

    UsageError where a layer does not exist or occurs twice, or the lists have different lengths.
    """
    below = sorted(teacher_layers)
    check_layers(f"{name}.layers", teacher_layers, "teacher", context.teacher_layers)
    if student_layers and len(student_layers) != len(teacher_layers):
        raise UsageError(
            f"{name}.student_layers has {len(student_layers)} layers for the teacher's {', '.join(map(str, below))}",
            fix=f"give {name}.layers and {name}.student_layers in the same number, lowest first",
        )
    check_layers(f"{name}.student_layers", student_layers, "student", context.student_layers)
    beside = tuple(student_layers) or tuple(context.student_layer(layer) for layer in below)
    if len(set(below)) < len(below) or len(set(beside)) < len(beside):
        pairs = ", ".join(f"{s} beside {t}" for t, s in zip(below, beside, strict=True))
        raise UsageError(
            f"{name} would read a layer twice (student beside teacher layer: {pairs})",
            fix=f"--set losses.{name}.layers=[...] with fewer layers, or losses.{name}.student_layers=[...]",
        )
    return tuple(zip(below, beside, strict=True))


def refuse_two_tokenizers(who: str, fix: str, context: Context) -> None:
    """UsageError where the student's tokenizer is not the teacher's."""
    if context.tokenizer_differences:
        raise UsageError(
            f"{who} needs one tokenizer on both sides, and {' and '.join(context.tokenizer_differences)} of the "
            "student's and the teacher's differ",
            fix=fix,
        )


class OneTokenizerLoss(Loss):
    """A loss without any alignment: one tokenizer on both sides, so that prediction n is the same token's."""

    def __init__(self, name: str, context: Context) -> None:
        super().__init__()
        refuse_two_tokenizers(f"loss {name}", "use dskd_cma or dskd_v2 in --loss", context)
        self.name = name
        self.classes = max(context.student_vocab.values()) + 1
        """Ids of the tokenizer; heads may have rows beyond them, and not the same number."""

    def counts(self, batch: Batch) -> Mapping[str, Tensor]:
        """Predictions; BadData where a document has not the same number of them in both models."""
        if not torch.equal(batch.predict_valid_BN, batch.teacher_predict_valid_BM):
            raise BadData(
                f"loss {self.name}: one of the rows {', '.join(map(str, batch.rows))} has responses of different "
                "length in the student's and the teacher's table, though both have one tokenizer",
                fix="use dskd_cma or dskd_v2 in --loss",
            )
        return super().counts(batch)


def refuse_other_tokens(option: str, instead: str, context: Context) -> None:
    """UsageError where no document has the same ids for both models, template included.

    `option` is the setting that compares token with token, `instead` one that does not.
    """
    refuse_two_tokenizers(option, f"--set losses.{instead}", context)
    same, total = context.same_tokens()
    if same == 0:
        raise UsageError(
            f"{option} compares documents that both models read as the same ids, and none of the {total} is: the two "
            "tables have other templates",
            fix=f"xkd-cache align with the teacher's --template, or --set losses.{instead}",
        )


def match_tokens(batch: Batch) -> Tensor:
    """Which documents both models read as the same ids, template included, bool [B]."""
    valid_BS = batch.student_valid_BS
    theirs_BS = fit(unwrap(batch.teacher_ids_BT), valid_BS.shape[1])
    as_long_B = valid_BS.sum(1) == unwrap(batch.teacher_valid_BT).sum(1)
    return as_long_B & ((theirs_BS == batch.student_ids_BS) | ~valid_BS).all(1)


def fit(values_BT: Tensor, length: int) -> Tensor:
    """The first `length` tokens, zeros where there are fewer: [B, length] or [B, length, D]."""
    missing = max(0, length - values_BT.shape[1])
    padding = [0, 0] * (values_BT.ndim - 2) + [0, missing]
    return F.pad(values_BT[:, :length], padding)


# -- prediction n with prediction n, as ULD and its successors pair them. Two tokenizers drift apart inside a response,
# several responses are paired as if they were one, and what one side has more stays unpaired.


def find_pairs(batch: Batch) -> Tensor:
    """Bool [B, P]: both models have an n-th prediction."""
    most = min(batch.predict_valid_BN.shape[1], batch.teacher_predict_valid_BM.shape[1])
    return batch.predict_valid_BN[:, :most] & batch.teacher_predict_valid_BM[:, :most]


def student_at_pairs(student: StudentPass, paired_BP: Tensor) -> LazyLogits:
    """The student's logits at all pairs, states [N, d]."""
    own, most = student.logits, paired_BP.shape[1]
    return LazyLogits(hidden=own.hidden[:, :most], weight=own.weight, bias=own.bias).at(paired_BP)


def teacher_at_pairs(batch: Batch, paired_BP: Tensor) -> Tensor:
    """The teacher's states at all pairs, [N, D] float32."""
    index_BP = batch.teacher_predict_BM[:, : paired_BP.shape[1]]
    return gather_rows(unwrap(batch.teacher_hidden_BRD), index_BP)[paired_BP].float()


# -- pieces: the shortest stretches of a response that start and end at a token boundary of both models. Those of which
# one model cannot predict every token are left out.

LONGEST: Final = 64
"""Tokens of a piece, in either model; longer ones are left out of the losses that hold the logits of a whole piece."""


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


def sides_of(batch: Batch) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Student and teacher, as `find_pieces` wants them."""
    return [
        (batch.predict_BN + 1, batch.predict_valid_BN, batch.span_student_BK2, batch.span_valid_BK),
        (batch.teacher_predict_BM + 1, batch.teacher_predict_valid_BM, batch.span_teacher_BK2, batch.span_valid_BK),
    ]


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


@dataclass(frozen=True, kw_only=True, slots=True)
class Pieces:
    """The pieces of a batch that both models predict whole, of at most LONGEST tokens."""

    student: PieceSide
    teacher: PieceSide
    document_G: Tensor  # which document of the batch each is of

    def parts(self, student: LazyLogits, teacher: LazyLogits) -> list[tuple[slice, slice]]:
        """The student's predictions in chunks that cut no piece, and the pieces in each."""
        sizes = torch.maximum(self.student.size_G, self.teacher.size_G).tolist()
        most = min(rows_at_once(student), rows_at_once(teacher)) if sizes else 1
        return [(self.student.rows(pieces), pieces) for pieces, _ in batches(sizes, most)]


def shared_pieces(batch: Batch, *, end_token: bool) -> Pieces:
    """Pieces of text, and with `end_token` the two end tokens."""
    found, kept_BK = [find_pieces(*side) for side in sides_of(batch)], batch.span_valid_BK
    for (_, _, whole_BK), range_BK2 in zip(found, (batch.span_student_BK2, batch.span_teacher_BK2), strict=True):
        kept_BK = kept_BK & whole_BK & (range_BK2[..., 1] - range_BK2[..., 0] <= LONGEST)
    if not end_token:
        kept_BK = kept_BK & batch.span_text_BK
    targets, made = (batch.target_BN, batch.teacher_target_BM), []
    for (piece_BN, inside_BN, _), side, target_BN in zip(found, sides_of(batch), targets, strict=True):
        inside_BN = inside_BN & kept_BK.gather(1, piece_BN) if kept_BK.numel() else inside_BN
        size_G = (side[2][..., 1] - side[2][..., 0])[kept_BK]
        ends = [0, *accumulate(size_G.tolist())]
        made.append(PieceSide(inside_BN=inside_BN, target_N=target_BN[inside_BN], size_G=size_G, ends=ends))
    return Pieces(student=made[0], teacher=made[1], document_G=kept_BK.nonzero()[:, 0])

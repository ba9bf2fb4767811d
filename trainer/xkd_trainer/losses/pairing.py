"""What of the student stands beside what of the teacher: layers, equal token ids, and predictions in their order.

Layers are Hugging Face indices, 1 is the output of the first block.

Shape legend: see batch.py; P pairs of the longest document, N all pairs of the batch, d the student's width.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from xkd_schemas.errors import BadData, UsageError
from xkd_trainer.data.batch import Batch, gather_rows, unwrap
from xkd_trainer.losses.declaration import Context, Loss, StudentPass, refuse_two_tokenizers
from xkd_trainer.losses.ops.divergence import cosine_distance
from xkd_trainer.losses.ops.lazy_logits import LazyLogits
from xkd_trainer.losses.ops.term import LossTerm, term
from xkd_trainer.models.measures import at_least_float32, divide

LayerIndex = Annotated[int, Field(ge=1)]


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


class OneTokenizerLoss(Loss):
    """A loss without any alignment: one tokenizer on both sides, so that prediction n is the same token's."""

    def __init__(self, name: str, context: Context) -> None:
        super().__init__()
        refuse_two_tokenizers(f"loss {name}", context.tokenizer_differences)
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
    refuse_two_tokenizers(option, context.tokenizer_differences, f"--set losses.{instead}")
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

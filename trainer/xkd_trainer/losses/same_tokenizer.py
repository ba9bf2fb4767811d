"""What losses without any alignment check: one tokenizer on both sides, so that prediction n is the same token's.

Shape legend: see batch.py.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from xkd_schemas.errors import BadData, UsageError
from xkd_trainer.data.batch import Batch
from xkd_trainer.losses.declaration import Context
from xkd_trainer.losses.ops.lazy_logits import LazyLogits


def refuse_two_tokenizers(name: str, context: Context) -> None:
    """UsageError where the student's tokenizer is not the teacher's."""
    if context.tokenizer_differences:
        raise UsageError(
            f"loss {name} needs one tokenizer on both sides, and {' and '.join(context.tokenizer_differences)} of "
            "the student's and the teacher's differ",
            fix="use dskd_cma or dskd_v2 in --loss",
        )


def refuse_other_predictions(name: str, batch: Batch) -> None:
    """BadData where a document has not the same number of predictions in both models."""
    if not torch.equal(batch.predict_valid_BN, batch.teacher_predict_valid_BM):
        raise BadData(
            f"loss {name}: one of the rows {', '.join(map(str, batch.rows))} has responses of different length in "
            "the student's and the teacher's table, though both have one tokenizer",
            fix="use dskd_cma or dskd_v2 in --loss",
        )


def refuse_other_tokens(option: str, instead: str, context: Context) -> None:
    """UsageError where no document has the same ids for both models, template included.

    `option` is the setting that compares token with token, `instead` one that does not.
    """
    if context.tokenizer_differences:
        raise UsageError(
            f"{option} needs one tokenizer on both sides, and {' and '.join(context.tokenizer_differences)} of the "
            "student's and the teacher's differ",
            fix=f"--set losses.{instead}",
        )
    same, total = context.same_tokens()
    if same == 0:
        raise UsageError(
            f"{option} compares documents that both models read as the same ids, and none of the {total} is: the two "
            "tables have other templates",
            fix=f"xkd-cache align with the teacher's --template, or --set losses.{instead}",
        )


def same_tokens(batch: Batch) -> Tensor:
    """Which documents both models read as the same ids, template included, bool [B]."""
    assert batch.teacher_ids_BT is not None
    assert batch.teacher_valid_BT is not None
    valid_BS, length = batch.student_valid_BS, batch.student_valid_BS.shape[1]
    theirs_BS = fitted(batch.teacher_ids_BT, length)
    as_long_B = valid_BS.sum(1) == batch.teacher_valid_BT.sum(1)
    return as_long_B & ((theirs_BS == batch.student_ids_BS) | ~valid_BS).all(1)


def fitted(values_BT: Tensor, length: int) -> Tensor:
    """The first `length` tokens, zeros where there are fewer: [B, length] or [B, length, D]."""
    missing = max(0, length - values_BT.shape[1])
    padding = [0, 0] * (values_BT.ndim - 2) + [0, missing]
    return F.pad(values_BT[:, :length], padding)


def first_classes(logits: LazyLogits, classes: int) -> LazyLogits:
    """The logits of the first `classes` classes: the tokenizer's ids, where a head has rows beyond them."""
    bias_V = None if logits.bias is None else logits.bias[:classes]
    return replace(logits, weight=logits.weight[:classes], bias=bias_V)

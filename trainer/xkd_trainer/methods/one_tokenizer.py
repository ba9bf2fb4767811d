"""What losses without any alignment check: one tokenizer on both sides, so that prediction n is the same token's."""

import torch

from xkd_schemas.errors import BadData, UsageError
from xkd_trainer.batch import Batch
from xkd_trainer.methods.declaration import Context


def refuse_two_tokenizers(name: str, context: Context) -> None:
    """UsageError where the student's tokenizer is not the teacher's."""
    if context.tokenizer_differences:
        raise UsageError(
            f"loss {name} needs one tokenizer on both sides, and {' and '.join(context.tokenizer_differences)} of "
            "the student's and the teacher's differ",
            next="use dskd_cma or dskd_v2 in --loss",
        )


def refuse_other_predictions(name: str, batch: Batch) -> None:
    """BadData where a document has not the same number of predictions in both models."""
    if not torch.equal(batch.predict_valid_BN, batch.teacher_predict_valid_BM):
        raise BadData(
            f"loss {name}: one of the rows {', '.join(map(str, batch.rows))} has responses of different length in "
            "the student's and the teacher's table, though both have one tokenizer",
            next="use dskd_cma or dskd_v2 in --loss",
        )

"""Predictions paired by shift: the n-th of the student with the n-th of the teacher, as ULD and its successors do.

Two tokenizers drift apart inside a response, and a document with several responses is paired as if they were one; this
is what those papers compare. What the longer side has more is in no pair.

Shape legend: see batch.py; P pairs of the longest document, N all pairs of the batch, d the student's width.
"""

from torch import Tensor

from xkd_trainer.data.batch import Batch, gather_rows
from xkd_trainer.losses.declaration import StudentPass
from xkd_trainer.losses.ops.head_sums import LazyLogits


def paired(batch: Batch) -> Tensor:
    """Bool [B, P]: both models have an n-th prediction."""
    most = min(batch.predict_valid_BN.shape[1], batch.teacher_predict_valid_BM.shape[1])
    return batch.predict_valid_BN[:, :most] & batch.teacher_predict_valid_BM[:, :most]


def student_logits(student: StudentPass, paired_BP: Tensor) -> LazyLogits:
    """The student's logits at all pairs, states [N, d]."""
    own = student.logits
    hidden_BPd = own.hidden[:, : paired_BP.shape[1]]
    return LazyLogits(hidden=hidden_BPd, weight=own.weight, bias=own.bias).at(paired_BP)


def teacher_hidden(batch: Batch, paired_BP: Tensor) -> Tensor:
    """The teacher's states at all pairs, [N, D] float32."""
    assert batch.teacher_hidden_BRD is not None
    index_BP = batch.teacher_predict_BM[:, : paired_BP.shape[1]]
    return gather_rows(batch.teacher_hidden_BRD, index_BP)[paired_BP].float()

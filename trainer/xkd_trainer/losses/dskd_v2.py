"""DSKDv2: exact token alignment, and projections that start from, or are, what makes two heads agree.

arXiv 2504.11426. Student and teacher are compared only where both predict the same piece of text. The projection from
teacher to student starts where the student's head gives the teacher's logits on the classes both vocabularies share;
the one from student to teacher is never trained but solved anew from the student's current head. The terms themselves
are those of `dskd`, over pairs.

Shape legend for this file
    K shared classes    D width of one model    W width of the other    V teacher's vocabulary
"""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from xkd_trainer.losses.dskd import DualSpaceSettings

RANK_TOLERANCE = 1e-6
"""Singular values below this share of the largest count as 0 in `pseudo_inverse`."""


class DskdV2Settings(DualSpaceSettings):
    """Options of DSKDv2. Its code compares with one divergence in both spaces: set both to have another one."""

    agreement: bool = True
    """Compare in the student's space only where the projected teacher predicts the teacher's own label (the code)."""
    t2s_agreement: float = Field(default=1.0, ge=0, le=1)
    """A document where a larger share of labelled pairs agrees is compared at all of them. Code: 1, over a batch."""
    spaces: Literal["both", "student", "teacher"] = "both"
    """student: without `teacher_space` (the code's only_stu_kd). teacher: that term alone (only_tea_kd)."""
    shared_vocab: Literal["mapped", "exact"] = "mapped"
    """mapped: classes are the same if their bytes are, whatever mark the vocabulary writes for a blank (the code maps
    the two common marks). exact: equal token strings."""


def pseudo_inverse(head_KD: Tensor) -> Tensor:
    """Moore-Penrose inverse of a tall matrix, from the eigenvectors of its D x D Gram matrix in float64.

    Faster than a singular value decomposition and without its factor of K rows; as exact while the condition number
    is well below 1 / RANK_TOLERANCE, as that of a head is.

    >>> pseudo_inverse(torch.tensor([[2.0, 0.0], [0.0, 4.0], [0.0, 0.0]]))
    tensor([[0.5000, 0.0000, 0.0000],
            [0.0000, 0.2500, 0.0000]])

    Args:
        head_KD: Rows of a head, any float dtype.

    Returns:
        [D, K], float32, or float64 if the input is; without gradient.
    """
    wide_KD = head_KD.detach().double()
    values_D, vectors_DD = torch.linalg.eigh(wide_KD.T @ wide_KD)
    kept_D = values_D > RANK_TOLERANCE**2 * values_D.amax().clamp_min(0.0)
    inverse_D = torch.where(kept_D, 1.0 / torch.where(kept_D, values_D, 1.0), 0.0)
    inverse_DK: Tensor = (vectors_DD * inverse_D) @ (vectors_DD.T @ wide_KD.T)
    return inverse_DK.to(torch.float64 if head_KD.dtype == torch.float64 else torch.float32)


def equal_logits(inverse_DK: Tensor, other_KW: Tensor) -> Tensor:
    """The linear map from one model's states to another's under which its head gives the first one's logits.

    With states h of width W read by `other`, and a head of which `inverse` is the pseudo-inverse, h' = M h is the
    least-squares solution of head h' = other h on the K shared classes, for every h. Both projections of DSKDv2 are
    it: from teacher to student with the student's inverse (the start of training), and back with the teacher's.

    A head twice as large needs states half as large:

    >>> equal_logits(pseudo_inverse(2.0 * torch.eye(2)), torch.eye(2))
    tensor([[0.5000, 0.0000],
            [0.0000, 0.5000]])

    Args:
        inverse_DK: From `pseudo_inverse`, of the head that will read the mapped states.
        other_KW: Rows of the head whose logits are wanted, for the same classes; brought to the inverse's dtype.

    Returns:
        [D, W], the weight of a linear layer, without gradient.
    """
    return inverse_DK @ other_KW.detach().to(inverse_DK.dtype)


def label_table(student_ids_K: Tensor, teacher_ids_K: Tensor, vocab_size: int) -> Tensor:
    """For each teacher class the student class of the same text, or -1.

    >>> label_table(torch.tensor([4, 7]), torch.tensor([2, 0]), 3)
    tensor([ 7, -1,  4])

    Args:
        student_ids_K: From `vocabulary.shared_vocabulary`, int64.
        teacher_ids_K: The same.
        vocab_size: V, larger than every teacher id.

    Returns:
        [V] int64.
    """
    table_V = torch.full((vocab_size,), -1, dtype=torch.int64)
    table_V[teacher_ids_K] = student_ids_K
    return table_V

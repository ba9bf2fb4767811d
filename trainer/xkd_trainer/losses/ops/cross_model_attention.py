"""Cross-model attention of DSKD: which teacher tokens a student token looks at, and the other way round.

DSKD-CMA (arXiv 2406.17328) projects both models' token embeddings into one space and attends across the two
tokenizations. Inputs hold response tokens only, gathered and padded. Nothing here knows models or projectors.

Shape legend for this file
    B documents    N student predictions    M teacher predictions    K width of the common space, 2 D
"""

import math
from typing import Literal

import torch
from torch import Tensor

from xkd_trainer.losses.ops.term import at_least_float32

MASKED = -1e5
"""Score of a pair in which either side is padding, as in the authors' code; its exponential is exactly 0."""


def align_scores(query_BNK: Tensor, key_BMK: Tensor, student_valid_BN: Tensor, teacher_valid_BM: Tensor) -> Tensor:
    """Q K^T / sqrt(K) where both tokens are valid, MASKED elsewhere.

    >>> query, key = torch.ones(1, 1, 4), torch.ones(1, 2, 4)
    >>> align_scores(query, key, torch.tensor([[True]]), torch.tensor([[True, False]]))
    tensor([[[ 2.0000e+00, -1.0000e+05]]])

    Args:
        query_BNK: Projected [E^S(x_i); E^S(x_i+1)]. DSKD detaches the embeddings before the projector, so that only
            the projector learns from here; that is the caller's business.
        key_BMK: N([E^T(y_j); E^T(y_j+1)]), the teacher's, constant.
        student_valid_BN: Bool.
        teacher_valid_BM: Bool. Vectors of invalid tokens are finite, on either side, and change nothing.

    Returns:
        [B, N, M], float32, or float64 where the inputs are.
    """
    scores_BNM = (
        at_least_float32(query_BNK) @ at_least_float32(key_BMK).transpose(1, 2) / math.sqrt(query_BNK.shape[-1])
    )
    return torch.where(student_valid_BN[:, :, None] & teacher_valid_BM[:, None, :], scores_BNM, MASKED)


def attend(scores_BNM: Tensor, over: Literal["teacher", "student"]) -> Tensor:
    """Attention over one model's tokens, in the layout that multiplies that model's values.

    >>> scores = torch.tensor([[[0.0, MASKED]]])
    >>> attend(scores, "teacher"), attend(scores, "student")
    (tensor([[[1., 0.]]]), tensor([[[1.],
             [1.]]]))

    Args:
        scores_BNM: From `align_scores`.
        over: "teacher": A of h^{t->s} = A v^T, rows sum to 1 over the teacher's tokens. "student": A' of
            h^{s->t} = A' v^S, transposed, rows sum to 1 over the student's tokens.

    Returns:
        [B, N, M] for "teacher", [B, M, N] for "student". A row of a padding token is uniform over all tokens, padding
        included: finite, and to be masked by whoever uses it. Other rows are exactly 0 at padding.
    """
    return scores_BNM.softmax(-1) if over == "teacher" else scores_BNM.transpose(1, 2).softmax(-1)

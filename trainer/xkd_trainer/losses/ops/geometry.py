"""Cosines between paired vectors and disagreement of two cosine matrices, shared by MTA and SRA.

Shape legend for this file
    B documents    K spans (or tokens)    D width
"""

import torch
from torch import Tensor

from xkd_trainer.models.measures import at_least_float32, unit_vectors


def cosine_distance(first_BKD: Tensor, second_BKD: Tensor) -> Tensor:
    """1 - cos of paired vectors, [B, K]; 1, without gradient, where either vector is zero.

    >>> cosine_distance(torch.tensor([[[3.0, 4.0], [0.0, 0.0]]]), torch.tensor([[[8.0, 6.0], [1.0, 0.0]]]))
    tensor([[0.0400, 1.0000]])
    """
    return 1.0 - (unit_vectors(first_BKD) * unit_vectors(second_BKD)).sum(-1)


def pair_weights(omega_BK: Tensor, valid_BK: Tensor) -> Tensor:
    """omega_i omega_j for the pairs i != j of valid spans of one document, 0 for all others, [B, K, K].

    >>> pair_weights(torch.tensor([[0.5, 0.3, 9.0]]), torch.tensor([[True, True, False]]))
    tensor([[[0.0000, 0.1500, 0.0000],
             [0.1500, 0.0000, 0.0000],
             [0.0000, 0.0000, 0.0000]]])
    """
    omega_BK = torch.where(valid_BK, at_least_float32(omega_BK), 0.0)
    same_KK = torch.eye(omega_BK.shape[1], dtype=torch.bool, device=omega_BK.device)
    return (omega_BK.unsqueeze(-1) * omega_BK.unsqueeze(-2)).masked_fill(same_KK, 0.0)


def pair_disagreement(
    student_cosines_BKK: Tensor, teacher_cosines_BKK: Tensor, weights_BKK: Tensor, valid_BK: Tensor
) -> Tensor:
    """sum_ij weights_ij (cos_ij of the student - cos_ij of the teacher)^2 for each document, [B].

    Cosine distances 1 - cos differ by the same amount, so this is the bracket of MTA eq. 11 and of
    SRA's L_Geo. Rows and columns that are not valid add nothing, whatever they hold.
    """
    both_BKK = valid_BK.unsqueeze(-1) & valid_BK.unsqueeze(-2)
    gap_BKK = torch.where(both_BKK, at_least_float32(student_cosines_BKK) - at_least_float32(teacher_cosines_BKK), 0.0)
    return (weights_BKK * gap_BKK * gap_BKK).sum((-2, -1))

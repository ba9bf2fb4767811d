"""DWA-KD: dual-space entropy weighting and time-warped alignment between two tokenizers.

arXiv 2602.21669, on top of DSKD's cross-model attention (`cma`) and its two spaces (`dskd`). All functions are pure
and take response tokens only, gathered by mask and padded.
Deviations from the authors' code, an option of the settings where both make sense:

* soft-DTW reads the response tokens; the code slices the first ones of the whole sequence, which are the prompt;
* weights are scaled after the gate, as the paper's text says; the code scales before it (`student_weight`);
* the student-space divergence is the forward KL of eq. 13; the scripts use skewed reverse or adaptive KL
  (`student_divergence`);
* band positions count from 1, as in the paper; the code counts from 0.

Every term is a sum over tokens, to be divided by the number of the student's response tokens in the whole step.
Call all of it outside an autocast context: costs, softmaxes and weights are meant to be float32 or better.

Shape legend for this file
    B documents    N student predictions    M teacher predictions    D width    V classes
"""

from typing import Literal

import torch
from torch import Tensor

from xkd_trainer.losses.dskd import projected_cross_entropy as projected_cross_entropy
from xkd_trainer.losses.dskd import student_space as student_space
from xkd_trainer.losses.dskd import teacher_space as teacher_space
from xkd_trainer.losses.dwa_settings import DwaSettings as DwaSettings
from xkd_trainer.losses.dwa_settings import anneal as anneal
from xkd_trainer.losses.softdtw import (
    band_penalty,
    cosine_cost,
    cosine_costs,
    expected_alignment,
    hard_band,
    soft_dtw,
    soft_dtw_divergence,
)
from xkd_trainer.losses.term import LossTerm, at_least_float32, term


def student_weights(
    entropy_BN: Tensor, gate_BN: Tensor, valid_BN: Tensor, order: Literal["gate_before", "gate_after"]
) -> Tensor:
    """w_i = H_i g_i (eq. 11-12), scaled within each document.

    Two tokens of equal entropy, gates 0.9 and 0.3; gate_before shares out 2 in that ratio.

    >>> entropy, gate, valid = torch.ones(1, 2), torch.tensor([[0.9, 0.3]]), torch.ones(1, 2, dtype=torch.bool)
    >>> student_weights(entropy, gate, valid, "gate_before"), student_weights(entropy, gate, valid, "gate_after")
    (tensor([[1.5000, 0.5000]]), tensor([[0.9000, 0.3000]]))

    Args:
        entropy_BN: Of the student over its vocabulary, at temperature 1, nats. Ones where entropy weights are off.
        gate_BN: Peak probability of the projected teacher, at temperature 1. Ones where the gate is off.
        valid_BN: Bool.
        order: gate_before: the products sum to the number of valid tokens (the paper's text). gate_after: the
            entropies do, and are then multiplied by the gate (the authors' code).

    Returns:
        [B, N] without gradient, 0 at invalid tokens; all 0 in a document whose entropies (or products) are all 0.
    """
    if order == "gate_before":
        return _shared_out(entropy_BN * gate_BN, valid_BN)
    return _shared_out(entropy_BN, valid_BN) * at_least_float32(gate_BN.detach())


def teacher_weights(entropy_BM: Tensor, vocab_size: int, valid_BM: Tensor) -> Tensor:
    """w_j = 1 - H_j / log V (eq. 14), clamped to [0, 1], scaled to sum to the number of valid tokens of its document.

    One sure token and one uniform one over two classes.

    >>> teacher_weights(torch.tensor([[0.0, 0.6931472]]), 2, torch.ones(1, 2, dtype=torch.bool))
    tensor([[2., 0.]])

    Args:
        entropy_BM: Of the teacher over its vocabulary, at temperature 1, nats.
        vocab_size: V of the teacher, at least 2.
        valid_BM: Bool.

    Returns:
        [B, M] without gradient, 0 at invalid tokens; all 0 in a document whose every token is uniform.
    """
    entropy_BM = at_least_float32(entropy_BM.detach())
    most = torch.tensor(float(vocab_size), dtype=entropy_BM.dtype, device=entropy_BM.device).log()
    return _shared_out((1.0 - entropy_BM / most).clamp(0.0, 1.0), valid_BM)


def band(
    attention_BNM: Tensor, student_lengths_B: Tensor, teacher_lengths_B: Tensor, settings: DwaSettings
) -> Tensor | None:
    """What the settings add to the cross cost, [B, N, M] without gradient; None for no band.

    >>> one, hard = torch.tensor([1]), DwaSettings(band="hard")
    >>> band(torch.ones(1, 1, 1), one, one, hard), band(torch.ones(1, 1, 1), one, one, DwaSettings(band="none"))
    (tensor([[[0.]]]), None)

    Args:
        attention_BNM: Teacher-to-student attention of `cma.attend`, or `alignment`; only its shape is read for the
            hard band.
        student_lengths_B: Integers.
        teacher_lengths_B: Integers.
        settings: Kind of band and its numbers.
    """
    if settings.band == "none":
        return None
    if settings.band == "hard":
        return hard_band(attention_BNM, student_lengths_B, teacher_lengths_B, width=settings.band_width)
    return band_penalty(
        attention_BNM, student_lengths_B, teacher_lengths_B, width=settings.band_width, beta=settings.band_beta,
        centre_mix=settings.band_centre_mix, penalty=settings.band_penalty,
    )  # fmt: skip


def alignment(
    student_BND: Tensor,
    projected_teacher_BMD: Tensor,
    student_lengths_B: Tensor,
    teacher_lengths_B: Tensor,
    *,
    gamma: float,
) -> Tensor:
    """What `band` follows with band_source=sdtw: the expected alignment of two sequences, [B, N, M], no gradient."""
    cost_BNM = cosine_cost(
        _cut(student_BND.detach(), student_lengths_B), _cut(projected_teacher_BMD.detach(), teacher_lengths_B)
    )
    return expected_alignment(cost_BNM, student_lengths_B, teacher_lengths_B, gamma=gamma)


def sequence_term(  # noqa: PLR0913 - two sequences with their lengths, a band, and two numbers
    student_BND: Tensor,
    projected_teacher_BMD: Tensor,
    band_BNM: Tensor | None,
    student_lengths_B: Tensor,
    teacher_lengths_B: Tensor,
    *,
    gamma: float,
    divergence: bool,
) -> LossTerm:
    """Banded soft-DTW between cosine costs, summed over documents (eq. 17-25); used for embeddings and last states.

    One token each and orthogonal: cost 1 across, 0 within.

    >>> x, y, one = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[0.0, 1.0]]]), torch.tensor([1])
    >>> sequence_term(x, y, None, one, one, gamma=2.0, divergence=True)
    LossTerm(total=tensor(1.), count=tensor(1.))

    Args:
        student_BND: Student embeddings of the target tokens, or states; the gradient flows. Padding is not read.
        projected_teacher_BMD: The teacher's through its projector; the gradient flows to the projector.
        band_BNM: From `band`; on the cross cost only. None: no band.
        student_lengths_B: Integers, 0 to N.
        teacher_lengths_B: Integers, 0 to M.
        gamma: Smoothing; see `DwaSettings.gamma_at`.
        divergence: nDTW, not clamped; False: the cross term alone.

    Returns:
        Not divided by lengths: the count is the number of the student's tokens. A document without tokens on
        one side adds 0.
    """
    x_BND = _cut(student_BND, student_lengths_B)
    y_BMD = _cut(projected_teacher_BMD, teacher_lengths_B)
    penalty = 0.0 if band_BNM is None else band_BNM.detach()
    if divergence:
        cross_BNM, student_BNN, teacher_BMM = cosine_costs(x_BND, y_BMD)
        value_B = soft_dtw_divergence(
            cross_BNM + penalty, student_BNN, teacher_BMM, student_lengths_B, teacher_lengths_B, gamma=gamma
        )
    else:
        cross_BNM = cosine_cost(x_BND, y_BMD) + penalty
        value_B = soft_dtw(cross_BNM, student_lengths_B, teacher_lengths_B, gamma=gamma)
    return term(value_B.sum(), student_lengths_B.sum())


def _cut(x_BND: Tensor, lengths_B: Tensor) -> Tensor:
    """Zeros beyond the lengths."""
    inside_BN = torch.arange(x_BND.shape[1], device=x_BND.device) < lengths_B[:, None]
    return torch.where(inside_BN[:, :, None], x_BND, 0.0)


def _shared_out(raw_BN: Tensor, valid_BN: Tensor) -> Tensor:
    """Proportional to `raw` at valid tokens and summing to their number in each document; all 0 where `raw` is."""
    raw_BN = torch.where(valid_BN, at_least_float32(raw_BN.detach()), 0.0)
    sum_B1 = raw_BN.sum(-1, keepdim=True)
    return raw_BN / torch.where(sum_B1 > 0, sum_B1, 1.0) * valid_BN.sum(-1, keepdim=True)

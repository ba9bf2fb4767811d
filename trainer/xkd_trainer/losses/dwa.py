"""DWA-KD (arXiv 2602.21669): dual-space entropy weighting and time-warped alignment between two tokenizers.

On top of DSKD's cross-model attention and its two spaces (`dual_space`). Deviations from the authors' code, an option
of the settings where both make sense:

* soft-DTW reads the response tokens; the code slices the first ones of the whole sequence, which are the prompt;
* weights are scaled after the gate, as the paper's text says; the code scales before it (`student_weight`);
* the student-space divergence is the forward KL of eq. 13; the scripts use skewed reverse or adaptive KL
  (`student_divergence`);
* band positions count from 1, as in the paper; the code counts from 0;
* gamma has gone n / `gamma_steps` of its way at step n, counted from 0; the code has gone (n + 1) / `gamma_steps`, and
  counts micro-batches, as it does in the warm-ups.

Every term is a sum over tokens, to be divided by the number of the student's response tokens in the whole step.

Shape legend: see batch.py; D width of both sequences, d the student's width, V classes.
"""

import math
from collections.abc import Mapping
from functools import partial
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from xkd_schemas.signals import Signal
from xkd_trainer.data.batch import Batch, unwrap
from xkd_trainer.losses.declaration import Context, Declaration, Positive, Projectors, StudentPass, Weight
from xkd_trainer.losses.dual_space import SPACES, CrossModelLoss, DualSpaceSettings, Mixed, at_valid
from xkd_trainer.losses.ops.divergence import Kind
from xkd_trainer.losses.ops.shared_pass import Planned, Weigh, head_divergence
from xkd_trainer.losses.ops.term import LossTerm, term
from xkd_trainer.losses.pairing import share_out
from xkd_trainer.losses.softdtw import Band, cosine_soft_dtw, hard_band, is_long, look_along, soft_band
from xkd_trainer.models.measures import at_least_float32

Steps = Annotated[int, Field(ge=0)]


class DwaSettings(DualSpaceSettings):
    """Options of DWA-KD. The paper prints the band's numbers and the temperature; the rest is from the scripts."""

    kd: Weight = 0.5
    """Weight of the token level, eq. 16: student space, teacher space and projected cross-entropy. Scripts: 0.5."""
    dtw: Weight = 0.2
    """Weight of the sequence level, eq. 17-25: embeddings and last states. Scripts: 0.2."""
    student_divergence: Kind = "forward_kl"
    """Paper eq. 13: forward KL. The code's scripts: skewed_reverse_kl (GPT-2), adaptive_kl (TinyLLaMA, OPT)."""
    entropy_weights: bool = True
    """Weigh tokens by entropy, eq. 12 and 14. Off: 1 for every token, in both spaces."""
    gate: bool = True
    """Multiply the student's weight by the peak of the projected teacher, eq. 11. Off: entropy alone."""
    student_weight: Literal["gate_before", "gate_after"] = "gate_before"
    """gate_before: H g scaled to sum to the number of tokens (paper). gate_after: H scaled, then times g (code)."""
    gate_warmup_steps: Steps = 0
    """Optimiser steps in which the gate rises from next to 0 to itself, and the student's space with it (the code).
    Scripts: 0, full from the start."""
    gamma: Positive = 2.0
    """Smoothing of soft-DTW at step 0, in units of the cosine cost. Scripts: 2; 1 for OPT-2.7B."""
    gamma_end: Positive = 0.8
    """Smoothing after `gamma_steps`. Scripts: 0.8."""
    gamma_steps: Steps = 0
    """Optimiser steps of the linear way from gamma to gamma_end. 0, as in the scripts: stay at gamma."""
    dtw_divergence: bool = True
    """nDTW (paper and code). Off: the cross term alone."""
    dtw_warmup_steps: Steps = 0
    """Optimiser steps of the sequence level's linear way from 0 to `dtw` (the code). Scripts: 0."""
    band: Literal["soft", "hard", "none"] = "soft"
    """soft: adaptive band round `band_source` (paper and code). hard: Sakoe-Chiba. none: all cells free."""
    band_source: Literal["cma", "sdtw"] = "cma"
    """What the soft band follows. cma: the cross-model attention (paper and scripts). sdtw (an option of the code): of
    each pair of sequences the alignment that soft-DTW expects without a band, each row divided by its sum."""
    band_width: Weight = 5.0
    """b of the soft band, or half width of the hard one; teacher tokens. Paper Table 5: 5."""
    band_beta: Weight = 2.0
    """Teacher tokens the soft band widens by for each nat of attention entropy. Paper Table 5: 2."""
    band_centre_mix: Annotated[float, Field(ge=0, le=1)] = 0.7
    """a: share of the attention, against the diagonal, in the soft band's centre. Paper Table 5: 0.7."""
    band_penalty: Weight = 1.0
    """Added to the cost outside the soft band. Paper Table 5: 1."""
    band_warmup_steps: Steps = 0
    """Optimiser steps of the band's linear way from no penalty to `band_penalty` (the code). Scripts: 0."""

    @staticmethod
    def share(step: int, warmup: int) -> float:
        """How much of a warm-up's weight a step has, counted from 0: above 0 and at most 1, as in the code."""
        return min((step + 1) / warmup, 1.0) if warmup else 1.0

    def gamma_at(self, step: int) -> float:
        """Smoothing at an optimiser step, counted from 0: linear to `gamma_end` at step `gamma_steps`, then that.

        >>> [DwaSettings(gamma_steps=4).gamma_at(step) for step in (0, 2, 4, 9)], DwaSettings().gamma_at(9)
        ([2.0, 1.4, 0.8, 0.8], 2.0)
        """
        share = min(step / self.gamma_steps, 1.0) if self.gamma_steps else 0.0
        return (1.0 - share) * self.gamma + share * self.gamma_end


def student_weights(
    entropy_BN: Tensor, gate_BN: Tensor, valid_BN: Tensor, order: Literal["gate_before", "gate_after"]
) -> Tensor:
    """w_i = H_i g_i (eq. 11-12), scaled within each document; [B, N] without gradient, 0 at invalid tokens.

    H is the student's entropy, in nats at temperature 1, g the peak probability of the projected teacher; ones where
    either is off. gate_before: the products sum to the number of valid tokens (the paper's text). gate_after: the
    entropies do, and are then multiplied by the gate (the code). All 0 in a document where what is scaled is 0.

    Two tokens of equal entropy, gates 0.9 and 0.3; gate_before shares out 2 in that ratio.

    >>> entropy, gate, valid = torch.ones(1, 2), torch.tensor([[0.9, 0.3]]), torch.ones(1, 2, dtype=torch.bool)
    >>> student_weights(entropy, gate, valid, "gate_before"), student_weights(entropy, gate, valid, "gate_after")
    (tensor([[1.5000, 0.5000]]), tensor([[0.9000, 0.3000]]))
    """
    before = order == "gate_before"
    scaled_BN = share_out(entropy_BN * gate_BN if before else entropy_BN, valid_BN) * valid_BN.sum(-1, keepdim=True)
    return scaled_BN if before else scaled_BN * at_least_float32(gate_BN)


def teacher_weights(entropy_BM: Tensor, vocab_size: int, valid_BM: Tensor) -> Tensor:
    """w_j = 1 - H_j / log V (eq. 14), clamped to [0, 1], scaled to sum to the number of valid tokens of its document.

    H is the teacher's entropy in nats at temperature 1. Without gradient, 0 at invalid tokens; all 0 in a document
    whose every token is uniform. One sure token and one uniform one over two classes:

    >>> teacher_weights(torch.tensor([[0.0, 0.6931472]]), 2, torch.ones(1, 2, dtype=torch.bool))
    tensor([[2., 0.]])
    """
    sure_BM = (1.0 - at_least_float32(entropy_BM) / math.log(vocab_size)).clamp(0.0, 1.0)
    return share_out(sure_BM, valid_BM) * valid_BM.sum(-1, keepdim=True)


def find_band(
    seen: tuple[Tensor, Tensor], lengths: tuple[Tensor, Tensor], settings: DwaSettings, share: float = 1.0
) -> Band | None:
    """What the settings add to the cross cost; None for no band.

    `seen` is `look_at` of the teacher-to-student attention, or of an expected alignment; the hard band reads its shape
    alone. `share` of the soft band's penalty is added.
    """
    if settings.band == "none":
        return None
    if settings.band == "hard":
        return hard_band(seen[0], lengths, width=settings.band_width)
    return soft_band(
        seen, lengths, width=settings.band_width, beta=settings.band_beta, centre_mix=settings.band_centre_mix,
        penalty=share * settings.band_penalty,
    )  # fmt: skip


def sequence_term(  # noqa: PLR0913 - two sequences with their lengths, a band, and how they are warped
    student_BND: Tensor, projected_teacher_BMD: Tensor, lengths: tuple[Tensor, Tensor], band: Band | None, *,
    gamma: float, divergence: bool, in_blocks: bool = False,
) -> LossTerm:  # fmt: skip
    """Banded soft-DTW between cosine costs, summed over documents (eq. 17-25); used for embeddings and last states.

    The gradient flows to the student's vectors and to the teacher's projector; vectors beyond the lengths are finite
    and change nothing. The band is on the cross cost only. With `divergence` nDTW = s(X, Y) - (s(X, X) + s(Y, Y)) / 2
    (Blondel et al., arXiv 2010.08354), 0 for equal sequences and not clamped; else the cross term alone. Not divided
    by lengths: the count is the number of the student's tokens. A document without tokens on one side adds 0. With
    `in_blocks` nothing has the size of both lengths.

    One token each and orthogonal: cost 1 across, 0 within.

    >>> x, y, one = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[0.0, 1.0]]]), torch.tensor([1])
    >>> sequence_term(x, y, (one, one), None, gamma=2.0, divergence=True)
    LossTerm(total=tensor(1.), count=tensor(1.))
    """
    warp = partial(cosine_soft_dtw, gamma=gamma, in_blocks=in_blocks)
    value_B = warp(student_BND, projected_teacher_BMD, lengths, band=band)
    if divergence:
        sides = zip((student_BND, projected_teacher_BMD), lengths, strict=True)
        student_B, teacher_B = (warp(x_BKD, x_BKD, (size_B, size_B)) for x_BKD, size_B in sides)
        value_B = torch.where((lengths[0] > 0) & (lengths[1] > 0), value_B - 0.5 * (student_B + teacher_B), 0.0)
    return term(value_B.sum(), lengths[0].sum())


# -- wiring to the cache


_DTW = ("dtw_embeddings", "dtw_states")


def needs(settings: DwaSettings, _levels: object) -> tuple[Signal, ...]:
    """Last states and entropies; heads and embeddings are always in the cache."""
    return (Signal("hidden_last"), *((Signal("entropy"),) if settings.entropy_weights else ()))


class Dwa(CrossModelLoss):
    """Terms `projected_ce`, `student_space`, `teacher_space`, `dtw_embeddings` and `dtw_states`.

    All are sums divided by the number of the student's predictions.
    """

    terms = (*SPACES, *_DTW)

    def __init__(self, settings: DwaSettings, context: Context) -> None:
        super().__init__(context, "dwa")
        self.settings = settings
        self.teacher_vocab_size = context.teacher_vocab_size
        self.embed_t2s = nn.Linear(context.teacher_width, context.student_width)

    def weights(self, step: int) -> Mapping[str, float]:
        """Script values, on their way up during a warm-up."""
        s = self.settings
        dtw = s.dtw * s.share(step, s.dtw_warmup_steps)
        gate = s.share(step, s.gate_warmup_steps) if s.gate else 1.0
        return dict.fromkeys(SPACES, s.kd) | {"student_space": s.kd * gate} | dict.fromkeys(_DTW, dtw)

    def forward(self, batch: Batch, student: StudentPass, step: int) -> Mapping[str, LossTerm | Planned]:
        """Eq. 7-25."""
        s, mixed, valid_BM = self.settings, self.mix(batch, student), batch.teacher_predict_valid_BM
        weights_M = None
        if s.entropy_weights:
            entropy_BM = unwrap(batch.teacher_entropy_BM)
            weights_M = teacher_weights(entropy_BM, self.teacher_vocab_size, valid_BM)[valid_BM]
        back, theirs = mixed.back.at(valid_BM), self.head(mixed.hidden_BMD).at(valid_BM)
        terms: dict[str, LossTerm | Planned] = {
            "projected_ce": student.plan.cross_entropy(mixed.projected),
            "student_space": student.plan.divergence(mixed.projected, s.student_space, weigh=self._weigh_student()),
            "teacher_space": term(head_divergence(back, theirs, weights_M, s.teacher_space), batch.num_predictions),
        }
        return terms | self._align(batch, student, mixed, step)

    def _weigh_student(self) -> Weigh | None:
        """Eq. 11-12 for some documents, from the student's entropies and the peaks of the projected teacher."""
        s = self.settings

        def weigh(entropy_BN: Tensor, peak_BN: Tensor, valid_BN: Tensor) -> Tensor:
            gate_BN = peak_BN if s.gate else valid_BN.float()
            weight_BN = entropy_BN if s.entropy_weights else valid_BN.float()
            return student_weights(weight_BN, gate_BN, valid_BN, s.student_weight)

        return weigh if s.gate or s.entropy_weights else None

    def _align(self, batch: Batch, student: StudentPass, mixed: Mixed, step: int) -> dict[str, LossTerm | Planned]:
        s, valid_BN, valid_BM = self.settings, batch.predict_valid_BN, batch.teacher_predict_valid_BM
        lengths = valid_BN.sum(-1), valid_BM.sum(-1)
        gamma, share = s.gamma_at(step), s.share(step, s.band_warmup_steps)
        by_alignment = s.band == "soft" and s.band_source == "sdtw"  # an option that takes memory for all cells
        long = not by_alignment and is_long(valid_BN.numel() * valid_BM.shape[1], valid_BN.device)
        pairs = {
            "dtw_embeddings": (student.target_embeddings_BNd, at_valid(self.embed_t2s, mixed.target_BMD, valid_BM)),
            "dtw_states": (student.predict_hidden_BNd, at_valid(self.t2s, mixed.hidden_BMD, valid_BM)),
        }
        found: dict[str, LossTerm | Planned] = {}
        for name, sides in pairs.items():
            seen = look_along(*sides, lengths, gamma=gamma) if by_alignment else mixed.seen
            wall = find_band(seen, lengths, s, share)
            found[name] = sequence_term(
                *sides, lengths, wall, gamma=gamma, divergence=s.dtw_divergence, in_blocks=long
            )
        return found


DWA = Declaration(
    name="dwa", source="DWA-KD, arXiv 2602.21669, eq. 7-25, on DSKD-CMA, arXiv 2406.17328", settings=DwaSettings,
    needs=needs, build=Dwa, ce_weight=0.5, plug_weight=0.5,
    projectors=Projectors(projector_lr=1e-3, projector_weight_decay=0.01),
)  # fmt: skip

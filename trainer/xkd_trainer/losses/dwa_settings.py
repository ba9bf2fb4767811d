"""The options of DWA-KD (arXiv 2602.21669), each with what the paper prints and what the authors' code does."""

from typing import Annotated, Literal

from pydantic import Field

from xkd_trainer.losses.divergence import Kind
from xkd_trainer.losses.dskd import DualSpaceSettings, Positive

Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
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
        """How much of a warm-up's weight an optimiser step has, counted from 0: above 0 and at most 1, as in the code.

        >>> [DwaSettings.share(step, 4) for step in (0, 1, 3, 9)], DwaSettings.share(0, 0)
        ([0.25, 0.5, 1.0, 1.0], 1.0)
        """
        return min((step + 1) / warmup, 1.0) if warmup else 1.0

    def gamma_at(self, step: int) -> float:
        """Smoothing at an optimiser step, counted from 0."""
        return anneal(step, self.gamma, self.gamma_end, self.gamma_steps)


def anneal(step: int, start: float, end: float, steps: int) -> float:
    """Linear from `start` at step 0 to `end` at step `steps`, then `end`; always `start` where `steps` is 0.

    >>> [anneal(step, 2.0, 0.8, 4) for step in (0, 2, 4, 9)], anneal(9, 2.0, 0.8, 0)
    ([2.0, 1.4, 0.8, 0.8], 2.0)
    """
    if steps == 0:
        return start
    share = min(step / steps, 1.0)
    return (1.0 - share) * start + share * end

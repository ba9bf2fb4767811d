"""ALM, Approximate Likelihood Matching (arXiv 2503.20083): both models should find each piece of text equally likely.

A chunk c is a shortest stretch of the response that starts and ends at a token boundary of both models. Its
log-likelihood is the sum over its tokens, log p(c) for the teacher and log q(c) for the student. Each is made a
distribution over two outcomes, "this chunk" and "anything else", softened by the temperature:
    L(c) = f(p^(1/tau), q^(1/tau)) + f(1 - p^(1/tau), 1 - q^(1/tau))
No vocabulary is compared with the other, and no projector is trained.

Shape legend: see batch.py; in the functions N predictions of one model, K chunks.
"""

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from xkd_schemas.signals import Signal
from xkd_trainer.data.batch import Batch, unwrap
from xkd_trainer.losses.declaration import Context, Declaration, Levels, Loss, Positive, Settings, StudentPass
from xkd_trainer.losses.dual_space import TeacherHead, teacher_states
from xkd_trainer.losses.ops.lazy_logits import LazyLogits, head_log_probabilities
from xkd_trainer.losses.ops.term import LossTerm, term
from xkd_trainer.losses.pieces import find_pieces, sides_of
from xkd_trainer.models.measures import at_least_float32

FLOOR = 1e-6
"""Subtracted from every softened log-likelihood, as the authors' code does: a likelihood of 1 has a finite loss."""


class AlmSettings(Settings):
    """Options of ALM; each docstring names what the authors' code does."""

    divergence: Literal["kl", "reverse_kl", "tv", "kl_limit"] = "kl"
    """f. kl: p log(p / q). reverse_kl: q log(q / p). tv: |p - q| / 2. kl_limit: tau times kl for tau to infinity.

    The authors' cross-entropy is kl plus a constant of the teacher.
    """
    temperature: Positive = 100.0
    """tau. Code: 100. kl_limit does not read it."""
    scaled: bool = True
    """Multiply by tau, so that alm keeps its size against ce when tau changes. Code: False."""
    average: Literal["chunks", "tokens"] = "chunks"
    """chunks: every chunk counts alike (the code's scripts). tokens: a chunk counts as its teacher tokens."""


def chunk_log_likelihoods(
    log_p_BN: Tensor, place_BN: Tensor, predicted_BN: Tensor, range_BK2: Tensor, valid_BK: Tensor
) -> tuple[Tensor, Tensor]:
    """Sum of the tokens' log-probabilities in each chunk, [B, K], and which chunks have all their tokens, bool [B, K].

    Places and ranges are as in `find_pieces`. Sums are 0 where the chunk is not whole.

    Tokens at places 1, 2 and 4; the second chunk lacks place 3, the third is padding:

    >>> log_p, place = torch.tensor([[-1.0, -2.0, -4.0]]), torch.tensor([[1, 2, 4]])
    >>> ranges, valid = torch.tensor([[[1, 3], [3, 5], [0, 0]]]), torch.tensor([[True, True, False]])
    >>> chunk_log_likelihoods(log_p, place, torch.tensor([[True, True, True]]), ranges, valid)
    (tensor([[-3.,  0.,  0.]]), tensor([[ True, False, False]]))
    """
    chunk_BN, inside_BN, whole_BK = find_pieces(place_BN, predicted_BN, range_BK2, valid_BK)
    log_p_BN = torch.where(inside_BN, at_least_float32(log_p_BN), 0.0)
    sum_BK = log_p_BN.new_zeros(valid_BK.shape)
    if valid_BK.numel():
        sum_BK = sum_BK.scatter_add(1, chunk_BN, log_p_BN)
    return torch.where(whole_BK, sum_BK, 0.0), whole_BK


def binarised_divergence(student: Tensor, teacher: Tensor, settings: AlmSettings) -> Tensor:
    """L(c) of each chunk from both log-likelihoods, of their shape.

    p = 3/4 against q = 1/2: 0.75 log 1.5 + 0.25 log 0.5 = 0.1308.

    >>> p, q = torch.tensor([0.75]).log(), torch.tensor([0.5]).log()
    >>> binarised_divergence(q, p, AlmSettings(temperature=1.0))
    tensor([0.1308])

    `student` is log q(c), `teacher` log p(c), both at most 0; the latter is a constant.
    """
    student, teacher = at_least_float32(student), at_least_float32(teacher)
    if settings.divergence == "kl_limit":
        b, a = student - FLOOR, teacher - FLOOR
        return a - b + a * ((-b).log() - (-a).log())
    b, a = student / settings.temperature - FLOOR, teacher / settings.temperature - FLOOR
    factor = settings.temperature if settings.scaled else 1.0
    if settings.divergence == "tv":
        return factor * (a.exp() - b.exp()).abs()
    if settings.divergence == "reverse_kl":
        a, b = b, a
    return factor * (a.exp() * (a - b) - torch.expm1(a) * (log_complement(a) - log_complement(b)))


def log_complement(log_p: Tensor) -> Tensor:
    """log(1 - exp(log_p)) for log_p < 0, without losing digits at either end."""
    half = -math.log(2.0)
    below, above = log_p.clamp_max(half), log_p.clamp_min(half)
    return torch.where(log_p > half, (-torch.expm1(above)).log(), torch.log1p(-below.exp()))


def likelihood_matching(
    student_BK: Tensor, teacher_BK: Tensor, weight_BK: Tensor, whole_BK: Tensor, settings: AlmSettings
) -> LossTerm:
    """Sum over chunks of weight times L(c); the count is the sum of the weights.

    `student` is log q(c), with gradient, `teacher` log p(c); what stands where a chunk is not whole is not read.
    """
    loss_BK = binarised_divergence(
        torch.where(whole_BK, student_BK, -1.0), torch.where(whole_BK, teacher_BK, -1.0), settings
    )
    weight_BK = torch.where(whole_BK, weight_BK.to(loss_BK.dtype), 0.0)
    return term((weight_BK * loss_BK).sum(), weight_BK.sum())


# -- wiring to the cache


def reads_states(levels: Levels) -> bool:
    """Whether the cache is one of earlier versions: it has the teacher's states, not the log-probabilities."""
    return "hidden_last" in levels.stored and "target_logprob" not in levels.stored


def needs(_settings: AlmSettings, levels: Levels) -> tuple[Signal, ...]:
    """One number for each token."""
    return (Signal("hidden_last" if reads_states(levels) else "target_logprob"),)


class Alm(Loss):
    """Term `alm`: a mean over chunks whose tokens both models predict, or over those chunks' teacher tokens."""

    terms = ("alm",)

    def __init__(self, settings: AlmSettings, context: Context) -> None:
        super().__init__()
        self.settings = settings
        self.head = TeacherHead(context, "alm") if reads_states(context.levels) else None

    def counts(self, batch: Batch) -> Mapping[str, Tensor]:
        """Chunks, or their teacher tokens."""
        whole = [chunk_log_likelihoods(torch.zeros_like(side[0]), *side)[1] for side in sides_of(batch)]
        return {"alm": self._weigh(batch)[whole[0] & whole[1]].sum()}

    def forward(self, batch: Batch, student: StudentPass, step: int) -> Mapping[str, LossTerm]:
        """Both sides' chunks, compared."""
        own, theirs = sides_of(batch)
        student_BK, s_whole_BK = chunk_log_likelihoods(_score(student.logits, batch.target_BN, own[1]), *own)
        with torch.no_grad():
            if self.head is None:
                scores_BM = unwrap(batch.teacher_target_logprob_BM)
            else:
                scores_BM = _score(self.head(teacher_states(batch)), batch.teacher_target_BM, theirs[1])
            teacher_BK, t_whole_BK = chunk_log_likelihoods(scores_BM, *theirs)
        whole_BK, weight_BK = s_whole_BK & t_whole_BK, self._weigh(batch)
        return {"alm": likelihood_matching(student_BK, teacher_BK, weight_BK, whole_BK, self.settings)}

    def _weigh(self, batch: Batch) -> Tensor:
        length_BK = batch.span_teacher_BK2[..., 1] - batch.span_teacher_BK2[..., 0]
        return (torch.ones_like(length_BK) if self.settings.average == "chunks" else length_BK).float()


def _score(logits: LazyLogits, target_BN: Tensor, valid_BN: Tensor) -> Tensor:
    """log p of the targets at valid positions, 0 elsewhere, [B, N]."""
    log_p_N = head_log_probabilities(logits.at(valid_BN), target_BN[valid_BN])
    return log_p_N.new_zeros(valid_BN.shape).masked_scatter(valid_BN, log_p_N)


ALM = Declaration(
    name="alm",
    source="ALM, arXiv 2503.20083, without its outcome-chunk debiasing",
    settings=AlmSettings,
    needs=needs,
    build=Alm,
    default_weight=0.5,
    ce_weight=0.5,
)

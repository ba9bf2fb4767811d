"""ALM, Approximate Likelihood Matching (arXiv 2503.20083): both models should find each piece of text equally likely.

A chunk c is a shortest stretch of the response that starts and ends at a token boundary of both models. Its
log-likelihood is the sum over its tokens, log p(c) for the teacher and log q(c) for the student. Each is made a
distribution over two outcomes, "this chunk" and "anything else", softened by the temperature:
    L(c) = f(p^(1/tau), q^(1/tau)) + f(1 - p^(1/tau), 1 - q^(1/tau))
No vocabulary is compared with the other, and no projector is trained.

Shape legend: see batch.py; in the functions N predictions in chunks, of one model, K chunks.
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
from xkd_trainer.losses.ops.lazy_logits import head_log_probabilities
from xkd_trainer.losses.ops.term import LossTerm, term
from xkd_trainer.losses.pieces import Pieces, shared_pieces
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


def binarised_divergence(student: Tensor, teacher: Tensor, settings: AlmSettings) -> Tensor:
    """L(c) of each chunk from both log-likelihoods, [K].

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


def weigh(chunks: Pieces, settings: AlmSettings) -> Tensor:
    """Weights of the chunks, [K]."""
    sizes_K = chunks.teacher.size_G
    return (torch.ones_like(sizes_K) if settings.average == "chunks" else sizes_K).float()


def likelihood_matching(chunks: Pieces, student_N: Tensor, teacher_N: Tensor, settings: AlmSettings) -> LossTerm:
    """Sum over chunks of weight times L(c); the count is the sum of the weights.

    The log-probabilities of all tokens in chunks, the student's with gradient.
    """
    all_chunks, weight_K = slice(0, len(chunks.document_G)), weigh(chunks, settings)
    student_K = chunks.student.sum(at_least_float32(student_N), all_chunks)
    teacher_K = chunks.teacher.sum(at_least_float32(teacher_N), all_chunks)
    return term((weight_K * binarised_divergence(student_K, teacher_K, settings)).sum(), weight_K.sum())


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

    def chunks_of(self, batch: Batch) -> Pieces:
        """Those that both models predict whole."""
        return shared_pieces(batch, end_token=True, longest=math.inf)

    def counts(self, batch: Batch) -> Mapping[str, Tensor]:
        """Chunks, or their teacher tokens."""
        return {"alm": weigh(self.chunks_of(batch), self.settings).sum()}

    def forward(self, batch: Batch, student: StudentPass, step: int) -> Mapping[str, LossTerm]:
        """Both sides' chunks, compared."""
        chunks = self.chunks_of(batch)
        own, theirs = chunks.student, chunks.teacher
        student_N = head_log_probabilities(student.logits.at(own.inside_BN), own.target_N)
        if self.head is None:
            teacher_N = unwrap(batch.teacher_target_logprob_BM)[theirs.inside_BN]
        else:
            with torch.no_grad():
                logits = self.head(teacher_states(batch)[theirs.inside_BN])
                teacher_N = head_log_probabilities(logits, theirs.target_N)
        return {"alm": likelihood_matching(chunks, student_N, teacher_N, self.settings)}


ALM = Declaration(
    name="alm", source="ALM, arXiv 2503.20083, without its outcome-chunk debiasing", settings=AlmSettings,
    needs=needs, build=Alm, default_weight=0.5, ce_weight=0.5,
)  # fmt: skip

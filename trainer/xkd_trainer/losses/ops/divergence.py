"""How far the student's next-token distribution is from the teacher's at each position, and its vectors in a document.

DSKD (arXiv 2406.17328) offers the first six kinds; the skewed ones are DistiLLM's (arXiv 2402.03898), the adaptive one
is AKL (arXiv 2404.02657), ab is ABKD (arXiv 2505.04560), csd Concrete Score Distillation (arXiv 2509.25837). p is the
teacher, q the student, both softened by the temperature. No kind is multiplied by the temperature squared: neither
DSKD, DWA-KD nor SRA does it.

Shape legend for this file
    N positions    V classes    B documents    K spans (or tokens)    D width
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from xkd_trainer.models.measures import at_least_float32, unit_vectors

Kind = Literal[
    "forward_kl", "reverse_kl", "js", "skewed_forward_kl", "skewed_reverse_kl", "adaptive_kl", "tvd", "ab", "csd"
]  # fmt: skip
Share = Annotated[float, Field(gt=0, lt=1)]
Power = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Knobs(BaseModel):
    """The numbers only some kinds read; settings of losses that compare distributions have them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    skew: Share = 0.1
    """Share of the other distribution mixed in by the skewed kinds. DistiLLM and scripts: 0.1."""
    adaptive_alpha: Share = 0.5
    """adaptive_kl: teacher mass below which a class belongs to the tail. Scripts: 0.5."""
    js_share: Share = 0.5
    """js: share of the teacher in the mixture, and weight of its divergence. DSKD: 0.5; MTA's repository: 0.9."""
    ab_alpha: Power = 0.2
    """ab: power of the teacher. ABKD's code: 0.2."""
    ab_beta: Power = 0.7
    """ab: power of the student. ABKD's code: 0.7."""


KNOBS = Knobs()


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Which divergence, with its numbers; see `divergence`."""

    kind: Kind
    temperature: float
    knobs: Knobs = KNOBS


def _kl(log_p_NV: Tensor, log_q_NV: Tensor) -> Tensor:
    return (log_p_NV.exp() * (log_p_NV - log_q_NV)).sum(-1)


def _mixture(log_a_NV: Tensor, log_b_NV: Tensor, share_a: float) -> Tensor:
    return torch.logaddexp(log_a_NV + math.log(share_a), log_b_NV + math.log1p(-share_a))


def _js(log_p_NV: Tensor, log_q_NV: Tensor, knobs: Knobs) -> Tensor:
    log_m_NV = _mixture(log_p_NV, log_q_NV, knobs.js_share)
    return knobs.js_share * _kl(log_p_NV, log_m_NV) + (1.0 - knobs.js_share) * _kl(log_q_NV, log_m_NV)


def _adaptive(log_p_NV: Tensor, log_q_NV: Tensor, knobs: Knobs) -> Tensor:
    """(head KL(p || q) + tail KL(q || p)) / (head + tail), where head and tail are sums of |p - q| without gradient.

    Classes are sorted by ascending p: the tail is those whose running sum of p, themselves included,
    is at most `adaptive_alpha`, the head is the rest. Where p equals q both shares are one half.
    """
    with torch.no_grad():
        sorted_p_NV, order_NV = log_p_NV.exp().sort(-1)
        gap_NV = (sorted_p_NV - log_q_NV.exp().gather(-1, order_NV)).abs()
        in_tail_NV = sorted_p_NV.cumsum(-1) <= knobs.adaptive_alpha
        tail_N = torch.where(in_tail_NV, gap_NV, 0.0).sum(-1)
        all_N = gap_NV.sum(-1)
        share_N = torch.where(all_N > 0, tail_N / torch.where(all_N > 0, all_N, 1.0), 0.5)
    return (1.0 - share_N) * _kl(log_p_NV, log_q_NV) + share_N * _kl(log_q_NV, log_p_NV)


def _ab(log_p_NV: Tensor, log_q_NV: Tensor, knobs: Knobs) -> Tensor:
    """-1/(ab) sum (p^a q^b - a/(a+b) p^(a+b) - b/(a+b) q^(a+b)), a and b the two powers."""
    a, b = knobs.ab_alpha, knobs.ab_beta
    both_NV = (a * log_p_NV + b * log_q_NV).exp()
    alone_NV = (a * ((a + b) * log_p_NV).exp() + b * ((a + b) * log_q_NV).exp()) / (a + b)
    return (alone_NV - both_NV).sum(-1) / (a * b)


def _csd(log_p_NV: Tensor, log_q_NV: Tensor, knobs: Knobs) -> Tensor:
    """sum_xy q(x) p(y) (d(x) - d(y))^2 / 4 of the differences d = log q - log p, its weights q and p constants.

    What is compared are differences of logits between classes, which no softmax flattens. The source lets each weight
    be the student's, the teacher's or uniform; this is student and teacher.
    """
    gap_NV = log_q_NV - log_p_NV
    q_NV, p_NV = log_q_NV.detach().exp(), log_p_NV.detach().exp()
    q_mean_N, p_mean_N = (q_NV * gap_NV).sum(-1), (p_NV * gap_NV).sum(-1)
    return 0.25 * (((q_NV + p_NV) * gap_NV.square()).sum(-1) - 2.0 * q_mean_N * p_mean_N)


DIVERGENCES: Mapping[Kind, Callable[[Tensor, Tensor, Knobs], Tensor]] = {
    "forward_kl": lambda p, q, _knobs: _kl(p, q),
    "reverse_kl": lambda p, q, _knobs: _kl(q, p),
    "js": _js,
    "skewed_forward_kl": lambda p, q, knobs: _kl(p, _mixture(p, q, knobs.skew)),
    "skewed_reverse_kl": lambda p, q, knobs: _kl(q, _mixture(q, p, knobs.skew)),
    "adaptive_kl": _adaptive,
    "tvd": lambda p, q, _knobs: 0.5 * (p.exp() - q.exp()).abs().sum(-1),
    "ab": _ab,
    "csd": _csd,
}
"""Name -> (teacher log-probabilities [N, V], student log-probabilities [N, V], knobs) -> [N]."""


def divergence(
    student_logits_NV: Tensor, teacher_logits_NV: Tensor, kind: Kind, *, temperature: float, knobs: Knobs = KNOBS
) -> Tensor:
    """The divergence of `kind` between teacher and student at each position, [N], in nats.

    Both logits are divided by the temperature, and computed in float32, or float64 if they are. NOT detached here: in
    the projected spaces of DSKD and DWA-KD the gradient may go either way, so the caller decides.

    Uniform student against a teacher that is sure of class 0 to three parts in four:
    0.75 log 1.5 + 0.25 log 0.5 = 0.1308.

    >>> student, teacher = torch.zeros(1, 2), torch.tensor([[math.log(3.0), 0.0]])
    >>> [round(float(divergence(student, teacher, kind, temperature=1.0)), 4) for kind in DIVERGENCES]
    [0.1308, 0.1438, 0.0338, 0.107, 0.1131, 0.1373, 0.25, 0.152, 0.1509]
    """
    log_q_NV = (at_least_float32(student_logits_NV) / temperature).log_softmax(-1)
    log_p_NV = (at_least_float32(teacher_logits_NV) / temperature).log_softmax(-1)
    return DIVERGENCES[kind](log_p_NV, log_q_NV, knobs)


def sorted_distance(student_NV: Tensor, teacher_NW: Tensor) -> Tensor:
    """sum_v | p(v) - q(v) | at each position, both sorted from the largest down, the shorter filled up with 0, [N].

    >>> sorted_distance(torch.tensor([[0.5, 0.5]]), torch.tensor([[0.7, 0.2, 0.1]]))
    tensor([0.6000])
    """
    both = min(student_NV.shape[-1], teacher_NW.shape[-1])
    gap_N = (student_NV[:, :both] - teacher_NW[:, :both]).abs().sum(-1)
    return gap_N + student_NV[:, both:].sum(-1) + teacher_NW[:, both:].sum(-1)


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

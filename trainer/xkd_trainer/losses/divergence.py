"""How far the student's next-token distribution is from the teacher's, at each position.

DSKD (arXiv 2406.17328) offers all six kinds; the skewed ones are DistiLLM's
(arXiv 2402.03898), the adaptive one is AKL (arXiv 2404.02657). p is the teacher, q the student,
both softened by the temperature. No kind is multiplied by the temperature squared: neither DSKD,
DWA-KD nor SRA does it.

Shape legend for this file
    N positions    V classes
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from xkd_schemas.errors import UsageError
from xkd_trainer.losses.term import at_least_float32

Kind = Literal["forward_kl", "reverse_kl", "js", "skewed_forward_kl", "skewed_reverse_kl", "adaptive_kl"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Knobs:
    """The numbers only some kinds read."""

    skew: float
    """Share of the other distribution mixed in by the skewed kinds, in (0, 1)."""
    adaptive_alpha: float
    """Teacher mass below which a class belongs to the tail, in (0, 1)."""


def _kl(log_p_NV: Tensor, log_q_NV: Tensor) -> Tensor:
    """KL(p || q) at each position, [N]."""
    return (log_p_NV.exp() * (log_p_NV - log_q_NV)).sum(-1)


def _mixture(log_a_NV: Tensor, log_b_NV: Tensor, share_a: float) -> Tensor:
    """log(share_a * a + (1 - share_a) * b), [N, V], without leaving log space."""
    return torch.logaddexp(log_a_NV + math.log(share_a), log_b_NV + math.log1p(-share_a))


def _forward(log_p_NV: Tensor, log_q_NV: Tensor, knobs: Knobs) -> Tensor:
    """KL(p || q)."""
    return _kl(log_p_NV, log_q_NV)


def _reverse(log_p_NV: Tensor, log_q_NV: Tensor, knobs: Knobs) -> Tensor:
    """KL(q || p)."""
    return _kl(log_q_NV, log_p_NV)


def _js(log_p_NV: Tensor, log_q_NV: Tensor, knobs: Knobs) -> Tensor:
    """(KL(p || m) + KL(q || m)) / 2 with m = (p + q) / 2."""
    log_m_NV = _mixture(log_p_NV, log_q_NV, 0.5)
    return 0.5 * (_kl(log_p_NV, log_m_NV) + _kl(log_q_NV, log_m_NV))


def _skewed_forward(log_p_NV: Tensor, log_q_NV: Tensor, knobs: Knobs) -> Tensor:
    """KL(p || skew p + (1 - skew) q)."""
    return _kl(log_p_NV, _mixture(log_p_NV, log_q_NV, knobs.skew))


def _skewed_reverse(log_p_NV: Tensor, log_q_NV: Tensor, knobs: Knobs) -> Tensor:
    """KL(q || (1 - skew) p + skew q)."""
    return _kl(log_q_NV, _mixture(log_q_NV, log_p_NV, knobs.skew))


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


DIVERGENCES: Mapping[Kind, Callable[[Tensor, Tensor, Knobs], Tensor]] = {
    "forward_kl": _forward,
    "reverse_kl": _reverse,
    "js": _js,
    "skewed_forward_kl": _skewed_forward,
    "skewed_reverse_kl": _skewed_reverse,
    "adaptive_kl": _adaptive,
}
"""Name -> (teacher log-probabilities [N, V], student log-probabilities [N, V], knobs) -> [N]."""


def divergence(
    student_logits_NV: Tensor,
    teacher_logits_NV: Tensor,
    kind: Kind,
    *,
    temperature: float,
    skew: float = 0.1,
    adaptive_alpha: float = 0.5,
) -> Tensor:
    """The divergence of `kind` between teacher and student at each position, in nats.

    Uniform student against a teacher that is sure of class 0 to three parts in four:
    0.75 log 1.5 + 0.25 log 0.5 = 0.1308.

    >>> student, teacher = torch.zeros(1, 2), torch.tensor([[math.log(3.0), 0.0]])
    >>> [round(float(divergence(student, teacher, kind, temperature=1.0)), 4) for kind in DIVERGENCES]
    [0.1308, 0.1438, 0.0338, 0.107, 0.1131, 0.1373]

    Args:
        student_logits_NV: Any float dtype, finite; computed in float32, or float64 if it is.
        teacher_logits_NV: The same shape, finite. NOT detached here: in the projected spaces of DSKD
            and DWA-KD the gradient may go either way, so the caller decides.
        kind: One of DIVERGENCES.
        temperature: Both logits are divided by it; greater than 0.
        skew: Read by the skewed kinds; DistiLLM and DWA-KD use 0.1.
        adaptive_alpha: Read by `adaptive_kl`; DWA-KD uses 0.5.

    Returns:
        [N], at least 0 up to rounding.

    Raises:
        UsageError: `kind` is not known, or a number is out of its range.
    """
    if kind not in DIVERGENCES:
        raise UsageError(f"losses: {kind!r} is not a divergence. Known: {', '.join(DIVERGENCES)}")
    if not temperature > 0:
        raise UsageError(f"losses: temperature is {temperature}", next="set it to a number greater than 0")
    if not (0 < skew < 1 and 0 < adaptive_alpha < 1):
        raise UsageError(
            f"losses: skew is {skew} and adaptive_alpha is {adaptive_alpha}", next="set both between 0 and 1"
        )
    log_q_NV = (at_least_float32(student_logits_NV) / temperature).log_softmax(-1)
    log_p_NV = (at_least_float32(teacher_logits_NV) / temperature).log_softmax(-1)
    return DIVERGENCES[kind](log_p_NV, log_q_NV, Knobs(skew=skew, adaptive_alpha=adaptive_alpha))

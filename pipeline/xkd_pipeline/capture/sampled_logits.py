"""A few classes of each prediction drawn so that they stand for the whole distribution, right on average.

Random-sampling distillation (arXiv 2503.16870) draws classes with replacement and keeps how often each came. Here a
prediction keeps k different classes, drawn by threshold: those so likely that they would be drawn anyway keep their
probability, the others share the rest evenly and are drawn in proportion to theirs. No unbiased draw of k classes has
a smaller expected squared error (arXiv 0803.0473). docs/decisions says what that gains.

Shape legend for this file
    N predictions    V classes    k drawn classes
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from xkd_schemas.codecs import TOTAL, pack_classes
from xkd_schemas.durable_files import xxh3_of
from xkd_schemas.tokens import Int32s
from xkd_trainer.models.measures import at_least_float32

ELEMENTS = 1 << 19  # probabilities worked on at a time


@dataclass(frozen=True, kw_only=True, slots=True)
class Draw:
    """What was drawn, and how far it is from what it stands for."""

    entries_Nk: npt.NDArray[np.int32]  # as `xkd_schemas.codecs` has them
    lost_N: npt.NDArray[np.float64]  # sum over classes of (share / TOTAL - probability) squared
    kept_N: npt.NDArray[np.float64]  # sum over classes of the squared probability


def uniforms(token_ids: Int32s, count: int) -> npt.NDArray[np.float64]:
    """Numbers from 0 to below 1, [count, 2]: a function of the document's tokens and nothing else.

    >>> uniforms(np.array([5, 6], np.int32), 3).tolist() == uniforms(np.array([5, 6], np.int32), 9)[:3].tolist()
    True
    """
    key = int(xxh3_of(np.ascontiguousarray(token_ids, "<i4").tobytes()), 16)
    raw = np.random.Philox(key=key).random_raw(2 * count)
    return np.asarray((raw >> np.uint64(11)) * 2.0**-53).reshape(count, 2)


@torch.no_grad()
def draw_classes(logits_NV: Tensor, uniforms_N2: Tensor, k: int) -> Draw:
    """k classes of each prediction, with the shares that stand for softmax of the logits.

    The likeliest class would be drawn in any case and keeps 0.7; one of the other two stands for the rest.

    >>> logits = torch.tensor([[0.7, 0.2, 0.1]]).log()
    >>> classes, shares = np.divmod(draw_classes(logits, torch.tensor([[0.5, 0.5]]), 2).entries_Nk, TOTAL + 1)
    >>> classes.tolist(), (shares / TOTAL).round(3).tolist()
    ([[0, 1]], [[0.7, 0.3]])

    A logit of -inf is a class that cannot be. Of two uniforms one draws the classes, the other rounds their shares.
    """
    step = max(1, ELEMENTS // logits_NV.shape[-1])
    chunks = zip(torch.split(logits_NV, step), torch.split(uniforms_N2, step), strict=True)
    entries, lost, kept = zip(*(_draw_chunk(*chunk, k) for chunk in chunks), strict=True)
    return Draw(entries_Nk=np.concatenate(entries), lost_N=np.concatenate(lost), kept_N=np.concatenate(kept))


def _draw_chunk(logits_NV: Tensor, uniforms_N2: Tensor, k: int) -> tuple[npt.NDArray[np.int32], Tensor, Tensor]:
    p_NV = at_least_float32(logits_NV).softmax(-1)
    u_N2 = uniforms_N2.to(p_NV.device, torch.float64)
    classes_Nk, weights_Nk = _threshold_sample(p_NV, u_N2[:, :1], k)
    order_Nk = classes_Nk.argsort(-1)
    classes_Nk, weights_Nk = classes_Nk.gather(-1, order_Nk), weights_Nk.gather(-1, order_Nk)
    shares_Nk = _whole_shares(weights_Nk, u_N2[:, 1:])
    kept_N = torch.linalg.vecdot(p_NV, p_NV).double()
    stored_Nk = shares_Nk.double() / TOTAL
    lost_N = kept_N + (stored_Nk.square() - 2 * stored_Nk * p_NV.gather(-1, classes_Nk)).sum(-1)
    return pack_classes(classes_Nk.cpu().numpy(), shares_Nk.cpu().numpy()), lost_N.clamp_min(0.0).cpu(), kept_N.cpu()


def _threshold_sample(p_NV: Tensor, u_N1: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """k classes of each row and their float64 weights, which add up to 1 if the row does.

    The h likeliest are kept; the rest is drawn at k - h even steps along its running sum, from where u says. h is the
    least number for which no step is shorter than a class, so no class is drawn twice.
    """
    top_Nk, likeliest_Nk = p_NV.topk(k, dim=-1)
    rest_NV = p_NV.scatter(-1, likeliest_Nk, 0.0)
    above_Nk = top_Nk.double().flip(-1).cumsum(-1).flip(-1)  # not 1 less a running sum, which would cancel
    rest_Nk = rest_NV.sum(-1, keepdim=True).double() + above_Nk
    place_k = torch.arange(k, device=p_NV.device)
    fits_Nk = (k - place_k) * top_Nk.double() <= rest_Nk
    fits_Nk[:, -1] = True
    h_N1 = fits_Nk.int().argmax(-1, keepdim=True)
    kept_Nk = place_k < h_N1
    rest_NV.scatter_(-1, likeliest_Nk, torch.where(kept_Nk, 0.0, top_Nk))
    tail_NV = rest_NV.cumsum_(-1)
    rest_N1 = tail_NV[:, -1:].contiguous()
    step_N1 = rest_N1.double() / (k - h_N1)
    points_Nk = ((place_k - h_N1 + u_N1) * step_N1).clamp_min(0.0).to(tail_NV.dtype)
    last_N1 = torch.searchsorted(tail_NV, rest_N1)
    found_Nk = torch.minimum(torch.searchsorted(tail_NV, points_Nk, right=True), last_N1)
    classes_Nk = torch.where(kept_Nk | (rest_N1 <= 0), likeliest_Nk, found_Nk)
    return classes_Nk, torch.where(kept_Nk, top_Nk.double(), step_N1)


def _whole_shares(weights_Nk: Tensor, u_N1: Tensor) -> Tensor:
    """Weights that add up to 1 as whole numbers that add up to TOTAL, each right on average over u.

    >>> _whole_shares(torch.tensor([[0.5, 0.5]]), torch.tensor([[0.25]])).tolist()
    [[2047, 2048]]
    """
    sums_Nk = weights_Nk.cumsum(-1) / weights_Nk.sum(-1, keepdim=True) * TOTAL
    sums_Nk[:, -1] = TOTAL
    ends_Nk = (sums_Nk + u_N1).floor().clamp_max(TOTAL).long()
    return ends_Nk.diff(dim=-1, prepend=ends_Nk.new_zeros(len(ends_Nk), 1))

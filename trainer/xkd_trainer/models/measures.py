"""What is measured on a forward pass, by the same lines on the teacher at capture and on the student in training.

Token weights, span vectors, the cosines between them, the entropy of a prediction, the attention
row of the last token. Pure functions of tensors: no model, no cache, no loss. All compute in
float32, or in float64 where the input is; call them outside an autocast context. Whether gradient
flows is up to the caller, except where a docstring says otherwise.

What a padded position holds, NaN included, changes no result and no gradient.

Shape legend for this file
    B documents    L tokens    R some of the L rows    D width    K spans    H heads    N positions    V classes
"""

import functools
from collections.abc import Callable, Mapping
from typing import Final

import torch
from torch import Tensor

from xkd_schemas.errors import BadData

CHUNK_ELEMENTS = 1 << 22
"""Elements of each temporary of `centrality` and `pool_spans`, 16 MB in float32 (64 MB was twice as slow)."""

LONG_CELLS = 1 << 24
"""Pairs of spans and tokens, or of two sequences' tokens, from which on they are worked block by block, and what
gradient needs of a block is made again; below it nothing is made twice. A document of 4,096 tokens has as many."""

SPANS_OF_A_BLOCK = 256

STD_FLOOR = 1e-5  # added to the standard deviation in eq. 5 of MTA, as the authors' code does

SHORTEST = 1e-12  # A vector shorter than this counts as zero: the slope of a length below 1e-13 is beyond float32

CANCELS = 1e-2
"""Share of the mean square below which a variance is not taken as a difference: it would lose two digits."""

LOWEST = {torch.float32: -80.0, torch.float64: -700.0}
"""A class this far below the likeliest counts as this far: exp makes slow denormals, and 0 of -inf, further down."""


def at_least_float32(values: Tensor) -> Tensor:
    """`values` (any float dtype) in float32, or unchanged if it is float64: what signals and losses compute in."""
    return values if values.dtype == torch.float64 else values.float()


def divide(parts: Tensor, whole: Tensor) -> Tensor:
    """parts / whole, and parts themselves where the whole is not above 0."""
    return parts / torch.where(whole > 0, whole, 1.0)


def centrality(hidden_BLD: Tensor, valid_BL: Tensor) -> Tensor:
    """How much the other tokens of a document attend to each token (MTA, arXiv 2605.01374, eq. 5-7), [B, L].

    H_t is divided by its standard deviation over the width (unbiased, plus 1e-5, mean not removed); A_st = H_s . H_t /
    sqrt(D), without s = t and without padded t; w_t is the mean over the document's tokens s of softmax_t(A_st). No
    parameter and no attention map of the model is used. The authors' code lets padded rows s into that mean; here they
    are left out, so that a weight depends on no other document of the batch. Weights sum to 1 over each document with
    a token; 0 where not valid; 1 for a token that is alone. Documents are taken a few at a time: memory beyond the
    result is that of CHUNK_ELEMENTS states and scores, and of all [B, L, L] scores where gradient is asked for.

    Equal tokens share the weight, and two tokens can only look at each other:

    >>> centrality(torch.tensor([[[1.0, 3.0], [1.0, 3.0], [1.0, 3.0], [9.0, 9.0]]]), torch.tensor([[1, 1, 1, 0]]) > 0)
    tensor([[0.3333, 0.3333, 0.3333, 0.0000]])
    """
    num = _documents_at_once(hidden_BLD, hidden_BLD.shape[1])
    blocks = zip(torch.split(hidden_BLD, num), torch.split(valid_BL, num), strict=True)
    return torch.cat([_centrality(hidden, valid) for hidden, valid in blocks])


def _documents_at_once(hidden_BLD: Tensor, columns: int) -> int:
    """Documents whose states, and whose [L, columns] numbers, are at most CHUNK_ELEMENTS; one at least.

    Copies of that size are made in memory that is warm already; a copy of a large batch costs as much as its products.
    """
    return max(1, CHUNK_ELEMENTS // max(1, hidden_BLD.shape[1] * max(columns, hidden_BLD.shape[2])))


def _centrality(hidden_BLD: Tensor, valid_BL: Tensor) -> Tensor:
    hidden_BLD = at_least_float32(hidden_BLD)
    batch, length, width = hidden_BLD.shape
    mean_BL = hidden_BLD.mean(-1)
    if not _all_finite(mean_BL):  # of padding, it may be
        hidden_BLD = torch.where(valid_BL.unsqueeze(-1), hidden_BLD, 0.0)
        mean_BL = hidden_BLD.mean(-1)
    std_BL1 = _std(hidden_BLD, mean_BL)
    scale_BL1 = 1.0 / ((std_BL1 + STD_FLOOR) * width**0.25)  # for scores: they are smaller than states
    alone_B11 = (valid_BL.sum(-1) <= 1)[:, None, None]  # no other token to look at: softmax over nothing
    position_L = torch.arange(length, device=hidden_BLD.device)
    weights_BL = torch.zeros_like(valid_BL, dtype=hidden_BLD.dtype)
    step = max(1, CHUNK_ELEMENTS // max(1, batch * length))
    for first in range(0, length, step):
        row_R = position_L[first : first + step]
        itself_RL = position_L == row_R[:, None]
        products_BRL = hidden_BLD[:, first : first + step] @ hidden_BLD.mT
        scores_BRL = products_BRL * scale_BL1[:, first : first + step] * scale_BL1.mT
        masked_BRL = (itself_RL | ~valid_BL[:, None, :]) & ~alone_B11
        attended_BRL = scores_BRL.masked_fill(masked_BRL, -torch.inf).softmax(-1)
        looks_BR = (valid_BL[:, first : first + step] & ~alone_B11[:, 0]).to(attended_BRL.dtype)
        weights_BL = weights_BL + (looks_BR[:, None, :] @ attended_BRL).squeeze(1)
    weights_BL = weights_BL / valid_BL.sum(-1, keepdim=True).clamp_min(1)
    return torch.where(alone_B11[:, 0], valid_BL.to(weights_BL.dtype), weights_BL)


def _all_finite(values: Tensor) -> bool:
    """Whether what was made of the states says that they are: no number hides one that is none."""
    return bool(values.detach().sum().isfinite())


def _std(hidden_BLD: Tensor, mean_BL: Tensor) -> Tensor:
    """Unbiased standard deviation over the width, [B, L, 1]; its gradient is 0, not NaN, where it is 0.

    Mean square less squared mean, without a copy of the states; where that would cancel, the mean is taken off first.
    """
    width = hidden_BLD.shape[-1]
    square_BL = torch.linalg.vecdot(hidden_BLD, hidden_BLD) / width
    variance_BL: Tensor = (square_BL - mean_BL.square()) * (width / (width - 1))
    cancels_BL = variance_BL < CANCELS * square_BL
    if bool(cancels_BL.any()):
        centred_ND = hidden_BLD[cancels_BL] - mean_BL[cancels_BL].unsqueeze(-1)
        square_N = torch.linalg.vecdot(centred_ND, centred_ND)
        variance_BL = variance_BL.masked_scatter(cancels_BL, square_N / (width - 1))
    varies_BL = variance_BL > 0
    return torch.where(varies_BL, torch.where(varies_BL, variance_BL, 1.0).sqrt(), 0.0).unsqueeze(-1)


def pool_spans(hidden_BLD: Tensor, weights_BL: Tensor, spans_BK2: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted mean of each span's tokens, and its weight (MTA eq. 8-9; C_k and m_k of SRA, arXiv 2605.01205).

    Ranges are half-open, (0, 0) for padding, and may overlap; token weights are at least 0, ones for the plain mean.
    The vector, [B, K, D], is zero where the span is empty or its mass, [B, K], is 0. SRA's code divides by max(mass,
    1e-5); here a span of small mass keeps the length of its vector.

    >>> hidden = torch.tensor([[[2.0, 0.0], [0.0, 4.0], [8.0, 8.0]]])
    >>> pool_spans(hidden, torch.tensor([[0.75, 0.25, 0.0]]), torch.tensor([[[0, 2], [0, 0]]]))
    (tensor([[[1.5000, 1.0000],
             [0.0000, 0.0000]]]), tensor([[1., 0.]]))
    """
    num = _documents_at_once(hidden_BLD, spans_BK2.shape[1])
    blocks = zip(*(torch.split(t, num) for t in (hidden_BLD, weights_BL, spans_BK2)), strict=True)
    vectors, masses = zip(*(_pool_spans(*block) for block in blocks), strict=True)
    return torch.cat(vectors), torch.cat(masses)


def _pool_spans(hidden_BLD: Tensor, weights_BL: Tensor, spans_BK2: Tensor) -> tuple[Tensor, Tensor]:
    step = max(1, LONG_CELLS // max(1, len(spans_BK2) * hidden_BLD.shape[1]))
    if step >= spans_BK2.shape[1]:
        return _pool_block(hidden_BLD, weights_BL, spans_BK2)
    vectors, masses = [], []
    for block_BK2 in torch.split(spans_BK2, min(step, SPANS_OF_A_BLOCK), dim=1):  # neighbours: they lie in few tokens
        full_BK = block_BK2[..., 1] > block_BK2[..., 0]
        first = int(block_BK2[..., 0][full_BK].min()) if full_BK.any() else 0
        end = max(int(block_BK2[..., 1].max()), first + 1)
        at_BK2 = torch.where(full_BK.unsqueeze(-1), block_BK2 - first, 0)
        found_BKD, mass_BK = _pool_block(hidden_BLD[:, first:end], weights_BL[:, first:end], at_BK2)
        vectors.append(found_BKD)
        masses.append(mass_BK)
    return torch.cat(vectors, 1), torch.cat(masses, 1)


def _pool_block(hidden_BLD: Tensor, weights_BL: Tensor, spans_BK2: Tensor) -> tuple[Tensor, Tensor]:
    position_L = torch.arange(hidden_BLD.shape[1], device=hidden_BLD.device)
    member_BKL = (position_L >= spans_BK2[..., :1]) & (position_L < spans_BK2[..., 1:])
    hidden_BLD = at_least_float32(hidden_BLD)
    weights_BKL = torch.where(member_BKL, weights_BL.to(hidden_BLD.dtype)[:, None, :], 0.0)
    mass_BK = weights_BKL.sum(-1)
    shares_BKL = divide(weights_BKL, mass_BK.unsqueeze(-1))
    vectors_BKD = shares_BKL @ hidden_BLD
    if not _all_finite(vectors_BKD):  # 0 times what a token that no span has is not 0 then
        vectors_BKD = shares_BKL @ torch.where(member_BKL.any(1).unsqueeze(-1), hidden_BLD, 0.0)
    return vectors_BKD, mass_BK


def cosine_matrix(vectors_BKD: Tensor) -> Tensor:
    """Cosines between all span vectors of a document, [B, K, K].

    The diagonal is exactly 1 and has no gradient. A zero vector has cosine 0 and gradient 0 with all others.

    >>> cosine_matrix(torch.tensor([[[3.0, 4.0], [8.0, 6.0], [0.0, 0.0]]]))
    tensor([[[1.0000, 0.9600, 0.0000],
             [0.9600, 1.0000, 0.0000],
             [0.0000, 0.0000, 1.0000]]])
    """
    unit_BKD = unit_vectors(vectors_BKD)
    same_KK = torch.eye(unit_BKD.shape[1], dtype=torch.bool, device=unit_BKD.device)
    return torch.where(same_KK, 1.0, unit_BKD @ unit_BKD.mT)


def unit_vectors(vectors_BKD: Tensor) -> Tensor:
    """Each vector divided by its length; one shorter than SHORTEST becomes 0, with gradient 0. Any leading shape."""
    vectors_BKD = at_least_float32(vectors_BKD)
    square_BK1 = vectors_BKD.square().sum(-1, keepdim=True)
    nonzero_BK1 = square_BK1 > SHORTEST**2
    scale_BK1 = torch.where(nonzero_BK1, torch.where(nonzero_BK1, square_BK1, 1.0).rsqrt(), 0.0)
    return vectors_BKD * scale_BK1


def pack_triangle(cosines_KK: Tensor) -> Tensor:
    """The entries above the diagonal, row by row: [K (K - 1) / 2]. The rest of the matrix follows from them.

    >>> pack_triangle(torch.tensor([[1.0, 0.1, 0.2], [0.1, 1.0, 0.3], [0.2, 0.3, 1.0]]))
    tensor([0.1000, 0.2000, 0.3000])
    """
    rows, columns = torch.triu_indices(len(cosines_KK), len(cosines_KK), offset=1, device=cosines_KK.device)
    return cosines_KK[rows, columns]


def unpack_triangle(packed: Tensor, K: int) -> Tensor:
    """The symmetric [K, K] matrix with ones on the diagonal whose `pack_triangle` is `packed`; BadData where none is.

    >>> unpack_triangle(torch.tensor([0.5]), 2)
    tensor([[1.0000, 0.5000],
            [0.5000, 1.0000]])
    """
    if packed.shape != (K * (K - 1) // 2,):
        raise BadData(
            f"span geometry: {tuple(packed.shape)} cosines do not fit {K} spans, which need {K * (K - 1) // 2}",
            fix="delete the teacher's table, then run xkd-cache teacher and align again",
        )
    above_KK = torch.ones(K, K, dtype=torch.bool, device=packed.device).triu_(1)
    upper_KK = torch.zeros(K, K, dtype=packed.dtype, device=packed.device).masked_scatter_(above_KK, packed)
    return (upper_KK + upper_KK.mT).fill_diagonal_(1)


@torch.no_grad()
def prediction_stats(logits_NV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """How sure a model is at each position, and of what: entropy [N] in nats, class [N], logsumexp [N].

    The class of the largest logit, int64, is the first of equals. -inf is a class that cannot be; +inf and NaN give
    NaN, and a class that means nothing. Never has gradient. A compiled kernel works it on a CPU, but for float64.

    >>> logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [-torch.inf, -torch.inf, 5.0, -torch.inf]])
    >>> entropy, argmax, logsumexp = prediction_stats(logits)
    >>> entropy.round(decimals=4), argmax, logsumexp
    (tensor([1.3863, 0.0000]), tensor([0, 2]), tensor([1.3863, 5.0000]))
    """
    if logits_NV.device.type != "cpu" or logits_NV.dtype == torch.float64 or not has_cpu_kernels():
        return _prediction_stats(logits_NV)
    from xkd_trainer.cpu_kernels.softmax_rows import statistics

    found = statistics(logits_NV.detach().float().contiguous().numpy(), torch.get_num_threads())
    entropy_N, argmax_N, logsumexp_N = map(torch.from_numpy, found)
    return entropy_N, argmax_N, logsumexp_N


@functools.cache
def has_cpu_kernels() -> bool:
    """Whether numba and `xkd_trainer.cpu_kernels` are there; without them torch does the same, slower."""
    try:
        import xkd_trainer.cpu_kernels.compiled  # noqa: F401
    except ModuleNotFoundError:
        return False
    return True


def _prediction_stats(logits_NV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`prediction_stats` on any device and in any float dtype, in chunks of CHUNK_ELEMENTS."""
    entropy_N = logits_NV.new_empty(len(logits_NV), dtype=at_least_float32(logits_NV[:0]).dtype)
    argmax_N = logits_NV.new_empty(len(logits_NV), dtype=torch.int64)
    logsumexp_N = torch.empty_like(entropy_N)
    step = max(1, CHUNK_ELEMENTS // logits_NV.shape[-1])
    for first in range(0, len(logits_NV), step):
        rows = slice(first, first + step)
        chunk_NV = at_least_float32(logits_NV[rows])
        top_N1, best_N1 = chunk_NV.max(-1, keepdim=True)  # the first of equals; argmax is three times slower
        below_NV = (chunk_NV - top_N1).clamp_min_(LOWEST[chunk_NV.dtype])
        odds_NV = below_NV.exp()
        sum_N = odds_NV.sum(-1)
        argmax_N[rows] = best_N1.squeeze(-1)
        logsumexp_N[rows] = top_N1.squeeze(-1) + sum_N.log()
        entropy_N[rows] = sum_N.log() - torch.linalg.vecdot(odds_NV, below_NV) / sum_N
    return entropy_N, argmax_N, logsumexp_N


def target_log_probability(logits_NV: Tensor, target_N: Tensor) -> Tensor:
    """log p of the token that follows each position, [N] in nats, never above 0.

    >>> target_log_probability(torch.zeros(1, 4), torch.tensor([3]))
    tensor([-1.3863])
    """
    return -torch.nn.functional.cross_entropy(at_least_float32(logits_NV), target_N, reduction="none")


def normalise_row(attention_row_BHL: Tensor, valid_BL: Tensor) -> Tensor:
    """Token weights [B, L] from one attention row: heads summed, divided by the sum over the document (SRA, a_t).

    0 where not valid; all 0 for a document without a token or without any attention.

    >>> normalise_row(torch.tensor([[[0.5, 0.5, 9.0], [0.1, 0.9, 9.0]]]), torch.tensor([[True, True, False]]))
    tensor([[0.3000, 0.7000, 0.0000]])
    """
    weights_BL = torch.where(valid_BL, at_least_float32(attention_row_BHL).sum(1), 0.0)
    return divide(weights_BL, weights_BL.sum(-1, keepdim=True))


OF_STATES: Final[Mapping[str, Callable[[Tensor, Tensor], Tensor]]] = {"centrality": centrality}
"""Signals of the tokens of a layer: states [B, L, D], valid [B, L] -> [B, L] or [B, L, D]."""

OF_LOGITS: Final[Mapping[tuple[str, ...], Callable[[Tensor], tuple[Tensor, ...]]]] = {
    ("entropy", "argmax", "logsumexp"): prediction_stats
}
"""Signals of predictions: logits [N, V] -> [N] for each name."""

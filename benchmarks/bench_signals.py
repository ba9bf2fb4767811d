"""Token weights, span vectors and span geometry of one layer, against the matrix products they are made of.

Shape legend for this file
    B documents    L tokens    D width    K spans
"""

import torch
from torch import Tensor

from benchmarks.measure import Options, Result, cost, interleaved
from xkd_trainer.models.measures import centrality, cosine_matrix, pool_spans

SPANS_PER_TOKEN = 0.31
"""Noun and verb phrases of English text (0.21 and 0.10 a token)."""


def run(options: Options) -> list[Result]:
    """64 documents of 512 tokens, width 2048."""
    batch, length, width = options.size(64, 2), options.size(512, 64), options.size(2048, 64)
    hidden_BLD, valid_BL, spans_BK2 = inputs(batch, length, width)
    seconds = interleaved(
        {
            "signals": lambda: signals(hidden_BLD, valid_BL, spans_BK2),
            "products": lambda: products(hidden_BLD, spans_BK2.shape[1]),
        },
        2 if options.quick else 4,
    )
    what = f"centrality + pooling + geometry of {batch} x {length} tokens / their matrix products"
    return [cost(what, seconds["signals"], seconds["products"], bar=1.5)]


def inputs(batch: int, length: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random states, all positions valid, and spans of three tokens."""
    hidden_BLD = torch.randn(batch, length, width, generator=torch.Generator().manual_seed(0))
    first_K = torch.linspace(0, length - 3, max(2, int(SPANS_PER_TOKEN * length))).long()
    spans_BK2 = torch.stack([first_K, first_K + 3], dim=-1).expand(batch, -1, -1)
    return hidden_BLD, torch.ones(batch, length, dtype=torch.bool), spans_BK2


@torch.no_grad()
def signals(hidden_BLD: Tensor, valid_BL: Tensor, spans_BK2: Tensor) -> Tensor:
    """What capture does at one layer."""
    vectors_BKD, _ = pool_spans(hidden_BLD, centrality(hidden_BLD, valid_BL), spans_BK2)
    return cosine_matrix(vectors_BKD)


@torch.no_grad()
def products(hidden_BLD: Tensor, num_spans: int) -> Tensor:
    """[L, D] x [D, L], [K, L] x [L, D] and [K, D] x [D, K] for every document, and nothing else."""
    scores_BLL = hidden_BLD @ hidden_BLD.mT
    vectors_BKD = scores_BLL[:, :num_spans] @ hidden_BLD
    return vectors_BKD @ vectors_BKD.mT

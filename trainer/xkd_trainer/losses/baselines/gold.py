"""GOLD (TRL's cross-tokenizer ULD loss), off-policy: distributions over pieces of text, matched classes by name.

A piece is a shortest stretch of the response that starts and ends at a token boundary of both models. Of its tokens
y_1 ... y_n each model gets one distribution over its own classes, whose sum is the probability of the other tokens:

    observed   P(v) = p(v | before y_1) p(y_2 | y_1) ... p(y_n | ...)
    bayesian   P(v) = p(y_1) ... p(y_n-1 | ...) p(v | y_1 ... y_n-1)

With m the classes that both vocabularies have, and Q the student's,

    matched    sum over m of beta P log(P / M) + (1 - beta) Q log(Q / M),  M = beta P + (1 - beta) Q
    unmatched  sum over ranks of | P - Q | of the other classes, sorted from the largest down
    L = w_m matched + w_u unmatched, a mean over pieces

Probabilities below 1e-8 count as 1e-8 in `matched` and in the products. What the student learns from are the responses
of the corpus (TRL's lmbda = 0).

Shape legend: see batch.py and pieces.py; K matched classes.
"""

import math
from typing import Final, Literal

import torch
from pydantic import model_validator
from torch import Tensor, nn

from xkd_trainer.losses.declaration import Context, Declaration, Weight
from xkd_trainer.losses.ops.divergence import Kind, sorted_distance
from xkd_trainer.losses.ops.vocabulary import shared_vocabulary
from xkd_trainer.losses.pieces import PieceLoss, Pieces, PieceSettings, PieceSide, columns

LEAST: Final = math.log(1e-8)
"""Logarithm of the smallest probability, as in TRL."""


class GoldSettings(PieceSettings):
    """Options of GOLD; "code" is TRL's."""

    classes: Literal["hybrid", "sorted"] = "hybrid"
    """hybrid: matched classes by name, the others by rank (code: uld_use_hybrid_loss). sorted: all by rank (code: its
    default)."""
    divergence: Kind = "js"
    """Of the matched classes; beta is js_share. Code: js with beta 0.5; its beta 0 is forward_kl, 1 reverse_kl."""
    merge: Literal["observed", "bayesian"] = "observed"
    """Which token of a piece gives the distribution: the first or the last. Code: observed."""
    matched_weight: Weight | None = None
    """w_m. None, as in the code: the share of the teacher's classes that are matched."""
    unmatched_weight: Weight | None = None
    """w_u. None, as in the code: 1 less that share."""
    shared_vocab: Literal["mapped", "exact"] = "mapped"
    """mapped: classes are the same if their bytes are. exact: equal token strings (code)."""
    mean: Literal["pieces", "documents"] = "pieces"
    """pieces: all alike. documents: a mean in each document, then over documents (code, over a batch)."""

    @model_validator(mode="after")
    def _require_both_weights(self) -> "GoldSettings":
        if (self.matched_weight is None) != (self.unmatched_weight is None):
            raise ValueError("matched_weight and unmatched_weight are set together")
        return self


def merge(log_p_CV: Tensor, side: PieceSide, pieces: slice, how: Literal["observed", "bayesian"]) -> Tensor:
    """log P of some pieces, [g, V], from the log-probabilities of all their tokens, [C, V].

    A piece of two tokens, of two classes:

    >>> log_p, yes = torch.tensor([[0.9, 0.1], [0.2, 0.8]]).log(), torch.ones(1, 2) > 0
    >>> side = PieceSide(inside_BN=yes, target_N=torch.tensor([0, 1]), size_G=torch.tensor([2]), ends=[0, 2])
    >>> merge(log_p, side, slice(0, 1), "observed").exp(), merge(log_p, side, slice(0, 1), "bayesian").exp()
    (tensor([[0.7200, 0.0800]]), tensor([[0.1800, 0.7200]]))
    """
    first_g, last_g = side.bounds(pieces)
    base_g = first_g if how == "observed" else last_g
    scores_C = log_p_CV.gather(-1, side.target_N[side.rows(pieces), None])[:, 0].clamp_min(LEAST)
    return log_p_CV.index_select(0, base_g) + side.sum(scores_C.index_fill(0, base_g, 0.0), pieces)[:, None]


# -- wiring to the cache


class Gold(PieceLoss):
    """Term `gold`, and shown with weight 0 its two parts and `covered`."""

    def __init__(self, settings: GoldSettings, context: Context) -> None:
        super().__init__(settings, context, "gold", "matched", "unmatched")
        self.settings = settings
        ids = [torch.zeros(0, dtype=torch.int64)] * 2
        if settings.classes == "hybrid":
            ids = list(shared_vocabulary(context.student_vocab, context.teacher_vocab, settings.shared_vocab))
        sizes = len(context.student_head().weight_VD), len(self.head.weight_VD)
        others = [torch.ones(n, dtype=torch.bool).index_fill(0, i, False) for n, i in zip(sizes, ids, strict=True)]
        self.ids_K, self.teacher_ids_K = (nn.Buffer(side, persistent=False) for side in ids)
        self.other_V, self.teacher_other_W = (nn.Buffer(side, persistent=False) for side in others)
        share = len(ids[0]) / sizes[1]
        w_m, w_u = settings.matched_weight, settings.unmatched_weight
        self.parts = (share, 1.0 - share) if w_m is None or w_u is None or not share else (w_m, w_u)
        """w_m and w_u."""

    def weigh(self, pieces: Pieces) -> Tensor:
        """All alike, or adding up to 1 in a document."""
        if self.settings.mean == "pieces":
            return super().weigh(pieces)
        return 1.0 / pieces.document_G.bincount()[pieces.document_G]

    def compare(self, logits_CV: Tensor, logits_CW: Tensor, pieces: Pieces, some: slice) -> Tensor:
        """The weighted sum of both parts, and the parts."""
        log_q_gV = merge(logits_CV.log_softmax(-1), pieces.student, some, self.settings.merge)
        log_p_gW = merge(logits_CW.log_softmax(-1), pieces.teacher, some, self.settings.merge)
        p_gK, q_gK = columns(log_p_gW, self.teacher_ids_K), columns(log_q_gV, self.ids_K)
        matched_g = self.divergence(p_gK.clamp_min(LEAST), q_gK.clamp_min(LEAST))
        sides = log_q_gV[:, self.other_V], log_p_gW[:, self.teacher_other_W]
        unmatched_g = sorted_distance(*(side.exp().sort(-1, descending=True).values for side in sides))
        w_m, w_u = self.parts
        return torch.stack([w_m * matched_g + w_u * unmatched_g, matched_g, unmatched_g], dim=-1)


GOLD = Declaration(
    name="gold", source="TRL's GOLD, off-policy: ULDLoss of trl.experimental.gold 1.16", settings=GoldSettings,
    build=Gold, ce_weight=0,
)  # fmt: skip

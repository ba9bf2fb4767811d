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

Shape legend: see batch.py and pairing.py; V student classes, W teacher classes, K matched classes.
"""

import math
from collections.abc import Mapping
from typing import Final, Literal

import torch
from pydantic import model_validator
from torch import Tensor, nn

from xkd_trainer.data.batch import Batch
from xkd_trainer.losses.declaration import Context, Declaration, Loss, Positive, StudentPass, Weight
from xkd_trainer.losses.dual_space import TeacherHead, last_states, teacher_states
from xkd_trainer.losses.ops.divergence import DIVERGENCES, Kind, Knobs, sorted_distance
from xkd_trainer.losses.ops.lazy_logits import LazyLogits, grouped_sum
from xkd_trainer.losses.ops.term import LossTerm, term
from xkd_trainer.losses.ops.vocabulary import shared_vocabulary
from xkd_trainer.losses.pairing import Pieces, PieceSide, shared_pieces
from xkd_trainer.models.measures import at_least_float32

LEAST: Final = math.log(1e-8)
"""Logarithm of the smallest probability, as in TRL."""


class GoldSettings(Knobs):
    """Options of GOLD; "code" is TRL's."""

    classes: Literal["hybrid", "sorted"] = "hybrid"
    """hybrid: matched classes by name, the others by rank (code: uld_use_hybrid_loss). sorted: all by rank (code: its
    default)."""
    divergence: Kind = "js"
    """Of the matched classes; beta is js_share. Code: js with beta 0.5; its beta 0 is forward_kl, 1 reverse_kl."""
    temperature: Positive = 1.0
    """Divides both logits. Code: 1, one for each model."""
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
    end_token: Literal["exclude", "include"] = "exclude"
    """Whether the two end tokens are a piece. Code: exclude."""

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
    return log_p_CV[base_g] + side.sum(scores_C.index_fill(0, base_g, 0.0), pieces)[:, None]


# -- wiring to the cache


class Gold(Loss):
    """Term `gold`. Shown besides, with weight 0: its two parts, and the share of predictions that are in pieces."""

    terms = ("gold", "matched", "unmatched", "covered")

    def __init__(self, settings: GoldSettings, context: Context) -> None:
        super().__init__()
        self.settings = settings
        self.head = TeacherHead(context, "gold")
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

    def weights(self, step: int) -> Mapping[str, float]:
        """The parts have their weights inside `gold`."""
        return dict.fromkeys(self.terms, 0.0) | {"gold": 1.0}

    def counts(self, batch: Batch) -> Mapping[str, Tensor]:
        """Pieces or documents with one, and predictions."""
        return self._count(batch, self._weigh(shared_pieces(batch, end_token=self.settings.end_token == "include")))

    def _count(self, batch: Batch, weights_G: Tensor) -> dict[str, Tensor]:
        return dict.fromkeys(self.terms, weights_G.sum().round()) | {"covered": batch.num_predictions}

    def _weigh(self, pieces: Pieces) -> Tensor:
        document_G = pieces.document_G
        if self.settings.mean == "pieces":
            return torch.ones_like(document_G).float()
        return 1.0 / document_G.bincount()[document_G]

    def forward(self, batch: Batch, student: StudentPass, step: int) -> Mapping[str, LossTerm]:
        """All pieces, some at a time."""
        pieces = shared_pieces(batch, end_token=self.settings.end_token == "include")
        own = student.logits.at(pieces.student.inside_BN)
        theirs = self.head(teacher_states(batch)[pieces.teacher.inside_BN])
        weights_G = self._weigh(pieces)
        counts, sums = self._count(batch, weights_G), self.sums(own, theirs, pieces, weights_G)
        covered = pieces.student.size_G.sum().to(sums[0].dtype)
        return {name: term(value, counts[name]) for name, value in zip(self.terms, (*sums, covered), strict=True)}

    def sums(self, own: LazyLogits, theirs: LazyLogits, pieces: Pieces, weights_G: Tensor) -> list[Tensor]:
        """The first three terms, from the logits at all predictions inside pieces; the first has gradient."""
        tau, how = self.settings.temperature, self.settings.merge

        def compare(some: slice, logits_CV: Tensor) -> Tensor:
            log_q_gV = merge((at_least_float32(logits_CV) / tau).log_softmax(-1), pieces.student, some, how)
            with torch.no_grad():
                logits_CW = theirs.at(pieces.teacher.rows(some)).dense()
                log_p_gW = merge((logits_CW / tau).log_softmax(-1), pieces.teacher, some, how)
            return self._compare(log_q_gV, log_p_gW.to(log_q_gV.dtype))

        total, sums_3 = grouped_sum(compare, own, weights_G, pieces.parts(own, theirs))
        return [total, *sums_3[1:]]

    def _compare(self, log_q_gV: Tensor, log_p_gW: Tensor) -> Tensor:
        """Both parts of each piece and their weighted sum in front, [g, 3]."""
        q_gK, p_gK = log_q_gV[:, self.ids_K], log_p_gW[:, self.teacher_ids_K]
        kind = DIVERGENCES[self.settings.divergence]
        matched_g = kind(p_gK.clamp_min(LEAST), q_gK.clamp_min(LEAST), self.settings)
        sides = log_q_gV[:, self.other_V], log_p_gW[:, self.teacher_other_W]
        unmatched_g = sorted_distance(*(side.exp().sort(-1, descending=True).values for side in sides))
        w_m, w_u = self.parts
        return torch.stack([w_m * matched_g + w_u * unmatched_g, matched_g, unmatched_g], dim=-1)


GOLD = Declaration(
    name="gold",
    source="TRL's GOLD, off-policy: ULDLoss of trl.experimental.gold 1.16",
    settings=GoldSettings,
    needs=last_states,
    build=Gold,
    ce_weight=0,
)

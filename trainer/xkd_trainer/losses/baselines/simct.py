"""SimCT (arXiv 2605.07711), off-policy: shared tokens, and beside them the piece of text that comes next.

At the start of each piece both models have a distribution over the K classes that both vocabularies share and, where
the piece is no such class, one more for the piece itself, scored by the mean of its tokens' logits:

    z = [ z(v | before the piece) for shared v ;  (1/n) sum_k z(y_k | before y_k) ]
    L = sum over pieces of Dist(softmax(z^T / tau), softmax(z^S / tau)) / response tokens of the student

The paper's Dist is the reverse KL, and its responses are the student's own; here they are those of the corpus. The
teacher's likelihood of the text alone (signal target_logprob) does not say how it shares the rest among the classes.

Shape legend: see batch.py and pieces.py; K shared classes.
"""

from collections.abc import Mapping
from typing import Final, Literal

import torch
from torch import Tensor, nn

from xkd_trainer.data.batch import Batch
from xkd_trainer.losses.declaration import Context, Declaration
from xkd_trainer.losses.ops.divergence import Kind
from xkd_trainer.losses.ops.vocabulary import shared_vocabulary
from xkd_trainer.losses.pieces import PieceLoss, Pieces, PieceSettings, PieceSide, columns

ABSENT: Final = -1e9
"""Logit of the further class where the piece is a shared class, as in the code; its exponential is exactly 0."""


class SimctSettings(PieceSettings):
    """Options of SimCT; "code" is the authors'."""

    divergence: Kind = "reverse_kl"
    """Code: reverse_kl."""
    end_token: Literal["exclude", "include"] = "include"
    """Code: include."""
    shared_vocab: Literal["mapped", "exact"] = "mapped"
    """mapped: classes are the same if their bytes are (code, of the mark of a blank). exact: equal token strings."""


def score_pieces(logits_CV: Tensor, ids_K: Tensor, side: PieceSide, some: slice, extra_g: Tensor) -> Tensor:
    """log softmax z of some pieces, [g, K + 1]; `extra` says which have a class of their own.

    A piece of two tokens, with logits 1 and 3, beside one shared class with logit 2 at its start:

    >>> both, ids = torch.ones(1, 2) > 0, torch.tensor([0, 1])
    >>> side = PieceSide(inside_BN=both, target_N=ids, size_G=torch.tensor([2]), ends=[0, 2])
    >>> logits = torch.tensor([[1.0, 2.0], [0.0, 3.0]])
    >>> score_pieces(logits, ids[1:], side, slice(0, 1), torch.tensor([True])).exp()
    tensor([[0.5000, 0.5000]])
    """
    first_g, _ = side.bounds(some)
    scores_C = logits_CV.gather(-1, side.target_N[side.rows(some), None])[:, 0]
    piece_g = torch.where(extra_g, side.mean(scores_C, some), ABSENT)
    return torch.cat([columns(logits_CV.index_select(0, first_g), ids_K), piece_g[:, None]], dim=-1).log_softmax(-1)


# -- wiring to the cache


class Simct(PieceLoss):
    """Term `simct`, divided by the student's predictions, and with weight 0 `covered`."""

    def __init__(self, settings: SimctSettings, context: Context) -> None:
        super().__init__(settings, context, "simct")
        ids = shared_vocabulary(context.student_vocab, context.teacher_vocab, settings.shared_vocab)
        same_V = torch.full((len(context.student_head().weight_VD),), -1).index_copy(0, *ids)
        self.ids_K, self.teacher_ids_K, self.same_V = (nn.Buffer(x, persistent=False) for x in (*ids, same_V))

    def counts(self, batch: Batch) -> Mapping[str, Tensor]:
        """The student's predictions."""
        return dict.fromkeys(self.terms, batch.num_predictions)

    def compare(self, logits_CV: Tensor, logits_CW: Tensor, pieces: Pieces, some: slice) -> Tensor:
        """The divergence."""
        student, teacher = pieces.student, pieces.teacher
        first, t_first = (side.target_N[side.rows(some)][side.bounds(some)[0]] for side in (student, teacher))
        one_g = (student.size_G[some] == 1) & (teacher.size_G[some] == 1)
        extra_g = ~(one_g & (self.same_V[first] == t_first))
        q_gK = score_pieces(logits_CV, self.ids_K, student, some, extra_g)
        p_gK = score_pieces(logits_CW, self.teacher_ids_K, teacher, some, extra_g)
        return self.divergence(p_gK, q_gK)[:, None]


SIMCT = Declaration(
    name="simct", source="SimCT, arXiv 2605.07711, and its code, off-policy", settings=SimctSettings, build=Simct,
    ce_weight=0,
)  # fmt: skip

"""X-Token (arXiv 2605.21699): a sparse matrix W says which teacher classes a student class stands for.

A row of W adds up to 1. A student class with the text of a teacher class has that one alone. The text of any other is
cut into teacher tokens, and that of each teacher class into student tokens; the i-th token of a cut (from 0, four at
most) gets a weight proportional to 0.1^i. Of each row the largest are kept. Between the pieces of text of both models,
with averages over the tokens of a piece:

    P-KL (eq. 2)     KL(mean log p || log mean W^T q), over the teacher classes likeliest somewhere in the response;
                     p is normalised over those at each token, W^T q over those in each piece
    H-KL (eq. 3, 4)  KL(mean log p || mean log q) over matched classes, whose largest weight is at least 0.6, plus
                     sum over ranks of | exp(mean log p) - exp(mean log q) | of the others, each side sorted

each times tau^2, a mean over pieces. Equations as NVIDIA's code (NeMo-RL) and TRL's note on it number them.

Shape legend: see batch.py and pieces.py; E entries of W, K matched classes.
"""

from collections import defaultdict
from collections.abc import Mapping
from typing import Annotated, Final, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from xkd_trainer.data.batch import unwrap
from xkd_trainer.losses.declaration import Context, Declaration
from xkd_trainer.losses.ops.divergence import Share
from xkd_trainer.losses.ops.lazy_logits import LazyLogits, chunks
from xkd_trainer.losses.ops.vocabulary import cut_greedily, ids_by_bytes, shared_vocabulary, token_bytes
from xkd_trainer.losses.pieces import PieceLoss, Pieces, PieceSettings, columns

CUT: Final = 4  # tokens of a cut that get a weight, as in the code
LEAST: Final = 1e-10
"""Added to probabilities before the logarithm, as in the code."""
ABSENT: Final = -1e9  # log-probability of a class that takes no part; its exponential is exactly 0

Some = Annotated[int, Field(ge=1)]


class XtokenSettings(PieceSettings):
    """Options of both losses; "code" is NVIDIA's."""

    shared_vocab: Literal["mapped", "exact"] = "mapped"
    """Which classes have the same text. mapped: equal bytes. exact: equal token strings (code)."""
    targets: Some = 4
    """Teacher classes that a student class may stand for. Code: 4, of 32 that it stores."""


class XtokenPSettings(XtokenSettings):
    """Options of P-KL."""

    teacher_classes: Some = 8192
    """Classes of the teacher that are compared: those with the largest logits in a document. Code: in a batch."""


class XtokenHSettings(XtokenSettings):
    """Options of H-KL."""

    threshold: Share = 0.6
    """Least weight of a matched class. Code: 0.6."""
    ranks: Some = 8192
    """Ranks of the other classes that are compared. Code: 8192."""


Entries = tuple[Tensor, Tensor, Tensor]
"""Student ids, teacher ids, weights, [E] each, by student id and from the largest weight of a row down."""


def project_vocabulary(
    student_vocab: Mapping[str, int], teacher_vocab: Mapping[str, int], settings: XtokenSettings
) -> Entries:
    """The entries of W.

    The student's 201 becomes three tokens of the teacher:

    >>> student, teacher = {"201": 0, "2": 1}, {"2": 0, "0": 1, "1": 2}
    >>> project_vocabulary(student, teacher, XtokenSettings(targets=2))
    (tensor([0, 0, 1]), tensor([0, 1, 0]), tensor([0.9091, 0.0909, 1.0000]))
    """
    ids = shared_vocabulary(student_vocab, teacher_vocab, settings.shared_vocab)
    same = dict(zip(*(side.tolist() for side in ids), strict=True))
    rows: dict[int, dict[int, float]] = defaultdict(lambda: defaultdict(float))
    for own, other, forth in ((student_vocab, teacher_vocab, True), (teacher_vocab, student_vocab, False)):
        known = ids_by_bytes(other)
        for number, text in sorted(token_bytes(own).items()):
            cut = cut_greedily(text, known, CUT)
            for place, piece in enumerate(cut):
                row, column = (number, piece) if forth else (piece, number)
                rows[row][column] += 0.1**place / sum(0.1**k for k in range(len(cut)))
    rows |= {row: {column: 1.0} for row, column in same.items()}
    entries = []
    for row in sorted(rows):
        kept = sorted(rows[row].items(), key=lambda entry: (-entry[1], entry[0]))[: settings.targets]
        entries += [(row, column, weight / sum(w for _, w in kept)) for column, weight in kept]
    student_E, teacher_E, weight_E = zip(*entries, strict=True)
    return torch.tensor(student_E), torch.tensor(teacher_E), torch.tensor(weight_E, dtype=torch.float32)


def match_classes(entries: Entries, threshold: float) -> tuple[Tensor, Tensor]:
    """Student and teacher ids [K] of the matched classes, no id twice: of several students of one teacher class the
    one with the largest weight, then the lowest id.

    >>> entries = torch.tensor([0, 0, 1, 2]), torch.tensor([5, 6, 5, 6]), torch.tensor([0.7, 0.3, 1.0, 0.5])
    >>> match_classes(entries, 0.6)
    (tensor([1]), tensor([5]))
    """
    best: dict[int, tuple[float, int]] = {}
    for row, column, weight in zip(*(values.tolist() for values in entries), strict=True):
        if weight >= threshold:
            best[column] = min(best.get(column, (0.0, row)), (-weight, row))
    pairs = sorted((row, column) for column, (_, row) in best.items())
    ids_K2 = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2)
    return ids_K2[:, 0].contiguous(), ids_K2[:, 1].contiguous()


# -- wiring to the cache


class XtokenP(PieceLoss):
    """Term `xtoken_p`, and with weight 0 `covered`."""

    def __init__(self, settings: XtokenPSettings, context: Context) -> None:
        super().__init__(settings, context, "xtoken_p")
        self.most = settings.teacher_classes
        entries = project_vocabulary(context.student_vocab, context.teacher_vocab, settings)
        order_E = torch.argsort(entries[1], stable=True)  # by teacher id, then by student id
        place_2E, weight_E = torch.stack([entries[1], entries[0]])[:, order_E], entries[2][order_E]
        self.place_2E, self.weight_E = (nn.Buffer(values, persistent=False) for values in (place_2E, weight_E))

    @torch.no_grad()
    def choose_classes(self, theirs: LazyLogits, pieces: Pieces) -> Tensor:
        """The teacher classes that are compared in each document, bool [B, W]."""
        document_N = pieces.document_G.repeat_interleave(pieces.teacher.size_G)
        documents, classes = len(pieces.teacher.inside_BN), len(theirs.weight)
        if self.most >= classes:
            return torch.ones(documents, classes, dtype=torch.bool, device=document_N.device)
        best_BW = theirs.wide.new_full((documents, classes), -torch.inf)
        for rows in chunks(theirs):
            logits_CW = theirs.at(rows).dense()
            best_BW.scatter_reduce_(0, document_N[rows, None].expand_as(logits_CW), logits_CW, "amax")
        ids_Bk = best_BW.sort(dim=-1, descending=True, stable=True).indices[:, : self.most]
        return torch.zeros_like(best_BW, dtype=torch.bool).scatter(1, ids_Bk, True)

    def compare(self, logits_CV: Tensor, logits_CW: Tensor, pieces: Pieces, some: slice) -> Tensor:
        """The divergence."""
        known_gW, size_g = unwrap(pieces.classes_BW)[pieces.document_G[some]], pieces.teacher.size_G[some]
        logits_CW = logits_CW.masked_fill(~known_gW.repeat_interleave(size_g, 0), ABSENT)
        log_p_gW = pieces.teacher.mean(logits_CW.log_softmax(-1), some)
        w_WV = torch.sparse_coo_tensor(
            self.place_2E, self.weight_E.to(logits_CV.dtype), (logits_CW.shape[1], logits_CV.shape[1]),
            is_coalesced=True, check_invariants=False,
        )  # fmt: skip
        projected_gW = torch.sparse.mm(w_WV, pieces.student.mean(logits_CV.softmax(-1), some).T).T
        q_gW = torch.where(known_gW, projected_gW, 0.0)
        log_q_gW = (q_gW / (q_gW.sum(-1, keepdim=True) + LEAST) + LEAST).log()
        sides = (torch.where(known_gW, side, ABSENT) for side in (log_p_gW, log_q_gW))
        return self.how.temperature**2 * self.divergence(*sides)[:, None]


class XtokenH(PieceLoss):
    """Term `xtoken_h`, and with weight 0 its two parts and `covered`."""

    def __init__(self, settings: XtokenHSettings, context: Context) -> None:
        super().__init__(settings, context, "xtoken_h", "matched", "unmatched")
        self.ranks = settings.ranks
        entries = project_vocabulary(context.student_vocab, context.teacher_vocab, settings)
        ids = match_classes(entries, settings.threshold)
        sizes = len(context.student_head().weight_VD), len(self.head.weight_VD)
        others = [torch.ones(n, dtype=torch.bool).index_fill(0, i, False) for n, i in zip(sizes, ids, strict=True)]
        self.ids_K, self.teacher_ids_K = (nn.Buffer(side, persistent=False) for side in ids)
        self.other_V, self.teacher_other_W = (nn.Buffer(side, persistent=False) for side in others)

    def compare(self, logits_CV: Tensor, logits_CW: Tensor, pieces: Pieces, some: slice) -> Tensor:
        """The sum of both parts, and the parts."""
        log_q_gV = pieces.student.mean(logits_CV.log_softmax(-1), some)
        log_p_gW = pieces.teacher.mean(logits_CW.log_softmax(-1), some)
        matched_g = self.divergence(columns(log_p_gW, self.teacher_ids_K), columns(log_q_gV, self.ids_K))
        sides = log_q_gV[:, self.other_V], log_p_gW[:, self.teacher_other_W]
        ranks = min(self.ranks, *(side.shape[-1] for side in sides))
        q_gR, p_gR = (side.topk(ranks).values.exp() for side in sides)
        parts = [self.how.temperature**2 * part_g for part_g in (matched_g, (q_gR - p_gR).abs().sum(-1))]
        return torch.stack([parts[0] + parts[1], *parts], dim=-1)


XTOKEN_P = Declaration(
    name="xtoken_p", source="X-Token's P-KL, arXiv 2605.21699 eq. 2; NeMo-RL", settings=XtokenPSettings, build=XtokenP,
)  # fmt: skip
XTOKEN_H = Declaration(
    name="xtoken_h", source="X-Token's H-KL, arXiv 2605.21699 eq. 3 and 4; NeMo-RL", settings=XtokenHSettings,
    build=XtokenH,
)  # fmt: skip

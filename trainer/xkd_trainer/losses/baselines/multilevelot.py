"""MultiLevelOT (arXiv 2412.14528): the likeliest classes of a whole response compared in one common order.

ULD sorts every position by itself, so a class may stand in another place at each. Here classes are ordered once, by
their probability summed over a response, and the first k of each model are paired by rank (or greedily, by distance).
On these p^S, p^T [n, k] of the n positions paired by shift,

    L = (1/n) sum_n || p^S_n - p^T_n ||_1  -  0.1 (1/n) sum_n softmax(p^T_n) . log softmax(p^S_n)  +  0.0001 <P, W>

where W_ij = || softmax(p^S_i / 2) - softmax(p^T_j / 2) ||_1 and P is exp(-W / 0.1) after ten Sinkhorn rounds. Logits
are divided by their standard deviation over the classes first, so that two models' scales agree.

The total of the official code is CE + 1.5 L: `--loss multilevelot`.

Shape legend: see batch.py; P pairs of the longest document, N all pairs of the batch, C those of one chunk, V classes,
    k chosen classes.
"""

from collections.abc import Mapping
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from xkd_schemas.signals import draw_spans
from xkd_trainer.data.batch import Batch, gather_rows
from xkd_trainer.losses.declaration import Context, Declaration, Loss, Positive, Settings, StudentPass, Weight
from xkd_trainer.losses.dual_space import TeacherHead
from xkd_trainer.losses.ops.lazy_logits import LazyLogits, chunked, chunks
from xkd_trainer.losses.ops.term import LossTerm, term
from xkd_trainer.losses.pairing import find_pairs, student_at_pairs, teacher_at_pairs
from xkd_trainer.models.measures import at_least_float32, divide

STD_FLOOR = 1e-4  # added to the standard deviation of the logits, as in the official code


class MultiLevelOtSettings(Settings):
    """Options of MultiLevelOT; official is the authors' code, port another group's copy of it."""

    temperature: Positive = 1.0
    """Divides the scaled logits of both models. Official: 1, port: 2."""
    classes: Annotated[int, Field(ge=1)] = 50
    """k, the classes of each model that are compared. Official: 50."""
    order: Literal["document", "batch"] = "document"
    """Over what probabilities are summed to order the classes. Official: the batch, and then a document's loss depends
    on the other documents of its micro-batch, so that micro-batches no longer add up. Ours: each document."""
    match: Literal["rank", "greedy"] = "rank"
    """rank: the n-th class of one with the n-th of the other (official, f = 1). greedy (f = 2): each class of the
    teacher, in order, takes the nearest of all classes of the student that is left."""
    l1: Weight = 1.0
    """Weight of the distance at each position. Official: 1."""
    word: Weight = 0.1
    """Weight of the cross-entropy. Official: 0.1."""
    word_target: Literal["teacher", "student"] = "teacher"
    """Who gives the weights of the cross-entropy: teacher, as its signature says, or student, as the official code
    calls it, with the two arguments exchanged."""
    sequence: Weight = 1e-4
    """Weight of the Sinkhorn distance. Official: 0.1 times 0.001, summed over the batch; ours: a mean."""
    epsilon: Positive = 0.1
    """Divides the cost W in the exponent. Official: 0.1."""
    rounds: Annotated[int, Field(ge=1)] = 10
    """Sinkhorn rounds, rows and then columns. Official: 10."""
    max_positions: Annotated[int, Field(ge=1)] = 1024
    """Pairs of a document that the Sinkhorn distance is of; of more so many are drawn, and the others are counted in
    the term `left_out`. Official: all, which takes memory by the square of the response."""


def scale_logits(logits_NV: Tensor, temperature: float) -> Tensor:
    """Logits over their standard deviation (unbiased, plus 1e-4, mean not removed) and the temperature.

    Equal logits have standard deviation 0, whose gradient is taken as 0.
    """
    logits_NV = at_least_float32(logits_NV)
    centred_NV = logits_NV - logits_NV.mean(-1, keepdim=True)
    variance_N1 = centred_NV.square().sum(-1, keepdim=True) / max(1, logits_NV.shape[-1] - 1)
    varies_N1 = variance_N1 > 0
    std_N1 = torch.where(varies_N1, torch.where(varies_N1, variance_N1, 1.0).sqrt(), 0.0)
    return logits_NV / (std_N1 + STD_FLOOR) / temperature


@torch.no_grad()
def likeliest_classes(logits: LazyLogits, valid_BP: Tensor, settings: MultiLevelOtSettings) -> Tensor:
    """The `classes` likeliest classes of each document (or all, if fewer), the likeliest first, ties by number.

    By their probability, of `scale_logits`, summed over the positions of the document, or of the batch; [B, k] int64.
    The logits are those at the valid positions.

    >>> logits = LazyLogits(hidden=torch.tensor([[0.1, 0.5, 0.4], [0.9, 0.0, 0.1]]), weight=torch.eye(3))
    >>> likeliest_classes(logits, torch.tensor([[True], [True]]), MultiLevelOtSettings(classes=2)).tolist()
    [[1, 2], [0, 2]]
    """
    document_N, num_documents = valid_BP.nonzero()[:, 0], len(valid_BP)
    mass_BV = at_least_float32(logits.weight).new_zeros(num_documents, logits.weight.shape[0])
    for rows in chunks(logits):
        member_BC = F.one_hot(document_N[rows], num_documents).T.to(mass_BV.dtype)
        mass_BV += member_BC @ scale_logits(logits.at(rows).dense(), settings.temperature).softmax(-1)
    if settings.order == "batch":
        mass_BV = mass_BV.sum(0, keepdim=True).expand_as(mass_BV)
    return torch.sort(mass_BV, dim=-1, descending=True, stable=True).indices[:, : settings.classes]


def chosen_probabilities(logits: LazyLogits, ids_Nk: Tensor, temperature: float) -> Tensor:
    """Probabilities of some classes at each position, [N, k], of `scale_logits` over all classes.

    Logits are made in chunks, and made again in the backward pass: none are kept. 0 for a class that is not there.
    """

    def probabilities(rows: slice, logits_CV: Tensor) -> Tensor:
        probabilities_CV = scale_logits(logits_CV, temperature).softmax(-1)
        num_classes, ids_Ck = probabilities_CV.shape[-1], ids_Nk[rows]
        return torch.where(ids_Ck < num_classes, probabilities_CV.gather(-1, ids_Ck.clamp_max(num_classes - 1)), 0.0)

    return chunked(probabilities, logits)


@torch.no_grad()
def greedy_classes(student: LazyLogits, teacher_Nk: Tensor, sizes_B: Tensor, temperature: float) -> Tensor:
    """Classes of the student beside the teacher's k, [B, k] int64: each of those takes the nearest that is left.

    Distances are sums over a document's positions of | p^S - p^T |, to every class of the student; equal ones go to
    the lowest number. A student of fewer than k classes is given more, numbered from V on, of probability 0. Positions
    of a document stand side by side, `sizes` says how many; `teacher` holds the probabilities of its chosen classes.
    """
    found, first, k = [], 0, teacher_Nk.shape[-1]
    for size in sizes_B.tolist():
        own, theirs_Pk = student.at(slice(first, first + size)), teacher_Nk[first : first + size]
        spare_k1 = theirs_Pk.sum(0)[:, None]
        distance_kV = spare_k1.repeat(1, max(k, own.weight.shape[0]))  # what a class of probability 0 is away
        distance_kV[:, : own.weight.shape[0]] = 0.0
        for rows in chunks(own):
            probabilities_CV = scale_logits(own.at(rows).dense(), temperature).softmax(-1)
            distance_kV[:, : own.weight.shape[0]] += torch.cdist(theirs_Pk[rows].T, probabilities_CV.T, p=1.0)
        chosen: list[Tensor] = []
        for place in range(k):
            chosen.append(distance_kV[place].argmin())
            distance_kV[:, chosen[-1]] = torch.inf
        found.append(torch.stack(chosen))
        first += size
    return torch.stack(found)


def position_distance(student_BPk: Tensor, teacher_BPk: Tensor, valid_BP: Tensor) -> LossTerm:
    """(1/n) sum_n || p^S_n - p^T_n ||_1 of each document, summed; the count is the number of documents with a pair.

    >>> position_distance(torch.tensor([[[0.5, 0.5]]]), torch.tensor([[[0.7, 0.3]]]), torch.tensor([[True]]))
    LossTerm(total=tensor(0.4000), count=tensor(1.))
    """
    gap_BP = torch.where(valid_BP, (student_BPk - teacher_BPk).abs().sum(-1), 0.0)
    return term((gap_BP.sum(-1) / valid_BP.sum(-1).clamp_min(1)).sum(), valid_BP.any(-1).sum())


def word_cross_entropy(
    student_BPk: Tensor, teacher_BPk: Tensor, valid_BP: Tensor, target: Literal["teacher", "student"]
) -> LossTerm:
    """- sum softmax(p^T) log softmax(p^S) over the k classes, or with the two exchanged; a sum over pairs.

    Not 0 where both are equal: it is at least the entropy of softmax(p^T).
    """
    weights, scored = teacher_BPk, student_BPk
    if target == "student":
        weights, scored = scored, weights
    entropy_BP = -torch.linalg.vecdot(weights.softmax(-1), scored.log_softmax(-1))
    return term(torch.where(valid_BP, entropy_BP, 0.0).sum(), valid_BP.sum())


def draw_positions(valid_BP: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """At most so many of the valid positions of each document, ascending, and which of the places are filled, [B, Q].

    Drawn by a seed of their number, so that a document's are the same in every batch.

    >>> draw_positions(torch.tensor([[True, True, True], [True, False, False]]), 2)
    (tensor([[1, 2],
            [0, 0]]), tensor([[ True,  True],
            [ True, False]]))
    """
    chosen = []
    for valid_P in valid_BP:
        at_N, drawn = valid_P.nonzero()[:, 0], draw_spans(int(valid_P.sum()), most)
        chosen.append(at_N if drawn is None else at_N[torch.from_numpy(drawn).to(at_N.device)])
    kept = [torch.ones_like(at_Q, dtype=torch.bool) for at_Q in chosen]
    return pad_sequence(chosen, batch_first=True), pad_sequence(kept, batch_first=True)


def sequence_distance(
    student_BPk: Tensor, teacher_BPk: Tensor, valid_BP: Tensor, epsilon: float, rounds: int
) -> LossTerm:
    """<P, W> between the positions of a document, summed; the count is the number of documents with a pair.

    P is blurred by epsilon, so this is not 0 where both sequences are equal, unless there is one position.
    """
    cost_BPP = torch.cdist((student_BPk / 2).softmax(-1), (teacher_BPk / 2).softmax(-1), p=1.0)
    both_BPP = valid_BP[:, :, None] & valid_BP[:, None, :]
    plan_BPP = torch.where(both_BPP, (-cost_BPP / epsilon).exp(), 0.0)
    for _ in range(rounds):
        for axis in (2, 1):
            plan_BPP = divide(plan_BPP, plan_BPP.sum(axis, keepdim=True))
    return term((plan_BPP * torch.where(both_BPP, cost_BPP, 0.0)).sum(), valid_BP.any(-1).sum())


# -- wiring to the cache


class MultiLevelOt(Loss):
    """Terms `l1` and `sequence`, means over documents with a pair, and `word`, a mean over pairs.

    `left_out`, which weighs nothing, is the number of pairs of a document that `sequence` does not compare.
    """

    def __init__(self, settings: MultiLevelOtSettings, context: Context) -> None:
        super().__init__()
        self.settings = settings
        self.terms = {"l1": settings.l1, "word": settings.word, "sequence": settings.sequence, "left_out": 0.0}
        self.head = TeacherHead(context, "multilevelot")

    def counts(self, batch: Batch) -> Mapping[str, Tensor]:
        """Pairs, and documents with one."""
        paired_BP = find_pairs(batch)
        documents = paired_BP.any(-1).sum()
        return {"l1": documents, "word": paired_BP.sum(), "sequence": documents, "left_out": documents}

    def forward(self, batch: Batch, student: StudentPass, step: int) -> Mapping[str, LossTerm]:
        """The three levels."""
        valid_BP = find_pairs(batch)
        teacher = self.head(teacher_at_pairs(batch, valid_BP))
        return self.levels(student_at_pairs(student, valid_BP), teacher, valid_BP)

    def levels(self, student: LazyLogits, teacher: LazyLogits, valid_BP: Tensor) -> dict[str, LossTerm]:
        """The terms of the logits at all pairs, [N] positions each; the teacher's are a constant."""
        s = self.settings
        document_N = valid_BP.nonzero()[:, 0]
        ids_Nk = likeliest_classes(teacher, valid_BP, s)[document_N]
        teacher_Nk = chosen_probabilities(teacher, ids_Nk, s.temperature)
        if s.match == "greedy":
            ids_Bk = greedy_classes(student, teacher_Nk, valid_BP.sum(-1), s.temperature)
        else:
            ids_Bk = likeliest_classes(student, valid_BP, s)
        student_Nk = chosen_probabilities(student, ids_Bk[document_N], s.temperature)
        k = max(student_Nk.shape[-1], teacher_Nk.shape[-1])  # a vocabulary of fewer classes is filled up with 0
        student_BPk, teacher_BPk = (
            p.new_zeros(*valid_BP.shape, k).index_put((valid_BP,), F.pad(p, (0, k - p.shape[-1])))
            for p in (student_Nk, teacher_Nk)
        )
        drawn_BQ, kept_BQ = draw_positions(valid_BP, s.max_positions)
        own_BQk, theirs_BQk = (gather_rows(side_BPk, drawn_BQ) for side_BPk in (student_BPk, teacher_BPk))
        return {
            "l1": position_distance(student_BPk, teacher_BPk, valid_BP),
            "word": word_cross_entropy(student_BPk, teacher_BPk, valid_BP, s.word_target),
            "sequence": sequence_distance(own_BQk, theirs_BQk, kept_BQ, s.epsilon, s.rounds),
            "left_out": term((valid_BP.sum() - kept_BQ.sum()).float(), valid_BP.any(-1).sum()),
        }


MULTILEVELOT = Declaration(
    name="multilevelot", source="MultiLevelOT, arXiv 2412.14528, and its official code", settings=MultiLevelOtSettings,
    build=MultiLevelOt, default_weight=1.5,
)  # fmt: skip

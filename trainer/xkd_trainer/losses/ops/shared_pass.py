"""One pass over the student's logits for all losses of a step that read them, and the sums of a single loss.

Each loss says what it wants: the cross-entropy of the student's logits, that of other logits at the same positions, a
divergence between the two. The pass makes the logits once and returns one scalar, so every request comes with the
factor it has in the step. A loss that knows nothing of this file does as it did.

The order of work: documents, chunks of their positions, parts of a chunk, products. For a chunk, the logits of the
student and of each other side are made in memory that is used again. Small parts of it, in a CPU's cache, become
gradients where the logits were; then each side has one product with its head, and the student's head one with the
states. Weights may be scaled within a document, so its statistics come first. Documents are taken a few at a time, as
many as fit a chunk, and their logits are made once. A document that fits no chunk is read twice: its logits are made
chunk by chunk for the statistics, and again for the gradients.

Shape legend for this file
    B documents    N positions of a document    M valid positions of all documents    C positions of a chunk
    P positions of a part    D width    V classes    K sums
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from xkd_schemas.ragged import pieces_of
from xkd_trainer.losses.ops.divergence import Comparison
from xkd_trainer.losses.ops.lazy_logits import HeadSlopes, LazyLogits, Made, make_at_once, rows_at_once
from xkd_trainer.losses.ops.softmax_rows import cross_entropy_rows, divergence_rows, parts, scratch_for, slices
from xkd_trainer.models.measures import prediction_stats

PASS_BYTES = 96 << 20
"""Size of one chunk of the student's logits; products of fewer positions are slower: each reads the head once."""

Weigh = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(entropy of the student [B, N], peak of the other side [B, N], valid [B, N]) of some documents -> weights [B, N].

Both at temperature 1, without gradient, 0 where not valid. A document's weights may depend on that document alone.
"""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Planned:
    """What a loss returns instead of a `LossTerm`: the same two scalars, the first of them made when it is asked for.

    It is one sum over the valid positions. Whoever runs several at once calls `HeadPlan.run` instead.
    """

    plan: "HeadPlan"
    other: LazyLogits | None = None  # logits at the same positions; None: the sum is of the student's own alone
    how: Comparison | None = None  # the divergence of the student from `other`; None: a cross-entropy
    weigh: Weigh | None = None
    weights_M1: Tensor | None = None  # constants instead of `weigh`, [M, 1]; without both, 1
    classes: int | None = None

    @property
    def total(self) -> Tensor:
        """The sum, with gradient; a pass of its own."""
        return self.plan.run([self], [torch.ones(())])[0]

    @property
    def count(self) -> Tensor:
        """Number of valid positions, scalar without gradient in the dtype of `total`."""
        return self.plan.valid_BN.sum().to(self.plan.own.wide.dtype)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class HeadPlan:
    """The student's logits of one batch, and where they are to be read.

    Two classes alike, one of two positions valid; the step wants three times the cross-entropy:

    >>> own = LazyLogits(hidden=torch.zeros(1, 2, 3), weight=torch.zeros(2, 3))
    >>> plan = HeadPlan(own=own, target_BN=torch.tensor([[1, 1]]), valid_BN=torch.tensor([[True, False]]))
    >>> wanted = plan.cross_entropy()
    >>> wanted.total, wanted.count, plan.run([wanted], [torch.tensor(3.0)])
    (tensor(0.6931), tensor(1.), (tensor(2.0794), [tensor(0.6931)]))
    """

    own: LazyLogits  # states [B, N, D]; states and head learn unless they are constants
    target_BN: Tensor  # int64 classes; any value where not valid
    valid_BN: Tensor  # bool; states elsewhere are not read, here and in `other`

    def cross_entropy(self, other: LazyLogits | None = None) -> Planned:
        """Sum of -log p(target) under the student's own logits, or under other ones.

        `other` has states [B, N, E], which learn, and a head of the student's classes, which does not.
        """
        return Planned(plan=self, other=other)

    def divergence(
        self, other: LazyLogits, how: Comparison, *, weigh: Weigh | None = None, classes: int | None = None
    ) -> Planned:
        """Sum of weight times divergence of the student from other logits, [B, N, E], which get no gradient.

        The same object as in `cross_entropy` shares its logits. `weigh` gives the weights of the positions of some
        documents; None: 1 everywhere. The first `classes` classes, which both heads have, are compared; None: all, and
        they are the same.
        """
        return Planned(plan=self, other=other, how=how, weigh=weigh, classes=classes)

    def run(
        self, wanted: Sequence[Planned], factors: Sequence[Tensor], size: int | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """The sum of factor times total, with gradient; and the totals, without.

        `wanted` are of this plan, in any order; for each a factor, a scalar without gradient. `size` is the positions
        of a chunk, given where all positions are valid.
        """
        if not wanted:
            return self.own.wide.new_zeros(()), []
        others = {id(p.other): p.other for p in wanted if p.other is not None}
        place_of = {number: place for place, number in enumerate(others, 1)}  # one object has one place
        placed = [(place_of.get(id(p.other), 0), p) for p in wanted]
        chosen = slice(None) if size else self.valid_BN
        own, *beside = (logits.at(chosen) for logits in (self.own, *others.values()))
        factors_K = torch.stack([factor.detach() for factor in factors])
        positions = size or max(1, PASS_BYTES // max(1, own.row_bytes))

        def make(learns: Sequence[bool], inputs: Sequence[Any]) -> Made:
            given = LazyLogits(hidden=inputs[0], weight=inputs[1], bias=inputs[2])
            fixed = [replace(other.detach(), hidden=hidden) for other, hidden in zip(beside, inputs[3:], strict=True)]
            work = _Pass([given, *fixed], self.target_BN[chosen], placed, factors_K, learns)
            return work.run(self.valid_BN, positions)

        total, sums_K = make_at_once(make, own.hidden, own.weight, own.bias, *(other.hidden for other in beside))
        return total, list(sums_K)


def head_cross_entropy(logits: LazyLogits, target_N: Tensor) -> Tensor:
    """Sum over positions [N, D] of -log p(target), with gradient by states, weight and bias; 0 where N is 0.

    >>> head_cross_entropy(LazyLogits(hidden=torch.zeros(2, 3), weight=torch.zeros(4, 3)), torch.tensor([0, 3]))
    tensor(2.7726)
    """
    return _run_alone(logits, target_N)


def head_divergence(student: LazyLogits, teacher: LazyLogits, weights_N: Tensor | None, how: Comparison) -> Tensor:
    """Sum over positions of weight times divergence between teacher and student; 0 where there are none.

    States are [N, D] and [N, E], heads have the same V classes. The teacher and the weights are constants, detached
    here; None weighs 1 everywhere. It has gradient by the student's states, and by its head where that requires one.

    A student that is uniform over two classes against a teacher sure of one to three parts in four, weight 2:
    2 (0.75 log 1.5 + 0.25 log 0.5) = 0.2616.

    >>> one = torch.ones(1, 1)
    >>> student = LazyLogits(hidden=one, weight=torch.zeros(2, 1))
    >>> teacher = LazyLogits(hidden=one, weight=torch.tensor([[1.0986123], [0.0]]))
    >>> head_divergence(student, teacher, torch.tensor([2.0]), Comparison(kind="forward_kl", temperature=1.0))
    tensor(0.2616)
    """
    weights_N1 = None if weights_N is None else weights_N.detach()[:, None]
    nowhere_N = torch.zeros(student.hidden.shape[0], dtype=torch.int64, device=student.hidden.device)
    return _run_alone(student, nowhere_N, other=teacher.detach(), how=how, weights_M1=weights_N1)


def _run_alone(own: LazyLogits, target_N: Tensor, **wanted: Any) -> Tensor:
    plan = HeadPlan(own=own, target_BN=target_N, valid_BN=torch.ones_like(target_N, dtype=torch.bool))
    return plan.run([Planned(plan=plan, **wanted)], [own.wide.new_ones(())], rows_at_once(own))[0]


def batches(lengths: Sequence[int], size: int) -> Iterator[tuple[slice, list[slice]]]:
    """Documents whose statistics are taken together, at most `size` positions or one document; and those in chunks.

    >>> list(batches([2, 0, 1, 5], 3))
    [(slice(0, 3, None), [slice(0, 3, None)]), (slice(3, 4, None), [slice(3, 6, None), slice(6, 8, None)])]
    """
    ends = [0, *accumulate(lengths)]
    for first, last in pieces_of(lengths, size):
        if chunks := list(slices(ends[first], ends[last], size)):
            yield slice(first, last), chunks


class _Pass:
    """The work of one call. Place 0 is the student's own logits, the others follow."""

    def __init__(
        self, logits: Sequence[LazyLogits], target_M: Tensor, placed: Sequence[tuple[int, Planned]], factors_K: Tensor,
        learns: Sequence[bool],
    ) -> None:  # fmt: skip
        self.logits, self.target_M = logits, target_M
        self.cross_entropies = [
            [k for k, (at, wanted) in enumerate(placed) if at == place and wanted.how is None]
            for place in range(len(logits))
        ]
        self.compared = [(k, at, wanted, wanted.how) for k, (at, wanted) in enumerate(placed) if wanted.how]
        self.weighed = [(k, at, wanted.weigh) for k, at, wanted, _ in self.compared if wanted.weigh]
        own, self.scratch = logits[0], scratch_for(logits[0].weight)
        self.needs_own = bool(self.cross_entropies[0] or self.compared)
        whole = {wanted.classes for _, _, wanted, _ in self.compared} <= {None, len(own.weight)}
        self.in_place = not self.cross_entropies[0] and len(self.compared) == 1 and whole
        self.factors_K = factors_K.to(own.wide)
        self.sums_K = torch.zeros_like(self.factors_K)
        ones_M1 = own.wide.new_ones(len(target_M), 1)
        given = {k: wanted.weights_M1 for k, _, wanted, _ in self.compared}
        self.weights = {k: ones_M1 if weights is None else weights.to(own.wide) for k, weights in given.items()}
        self.weights |= {k: torch.empty_like(ones_M1) for k, _, _ in self.weighed}
        self.slopes = [HeadSlopes(own, learns[:3] if self.needs_own else (False,) * 3)]
        for other, learn, numbers in zip(logits[1:], learns[3:], self.cross_entropies[1:], strict=True):
            self.slopes.append(HeadSlopes(other, (learn and bool(numbers), False, False)))

    def run(self, valid_BN: Tensor, size: int) -> Made:
        lengths = valid_BN.sum(-1).tolist() if self.weighed else [len(self.target_M)]
        plan = list(batches(lengths, size))
        self.most = max((chunk.stop - chunk.start for _, chunks in plan for chunk in chunks), default=0)
        for documents, chunks in plan:
            made: list[Tensor] = []
            if self.weighed:
                found = []
                for chunk in chunks:
                    made = self._make(chunk)
                    found.append(self._measure(made))
                self._weigh(slice(chunks[0].start, chunks[-1].stop), valid_BN[documents], torch.cat(found, dim=-1))
            for chunk in chunks:
                if not self.weighed or len(chunks) > 1:
                    made = self._make(chunk)
                for part in parts(made[-1]):
                    rows = slice(chunk.start + part.start, chunk.start + part.stop)
                    self._turn_into_slopes(rows, [m[part] for m in made])
                for slopes, slope_CV in zip(self.slopes, made, strict=True):
                    slopes.add(chunk, slope_CV)
        by_input = [*self.slopes[0].by_input(), *(slopes.hidden_ND for slopes in self.slopes[1:])]
        return self.factors_K @ self.sums_K, self.sums_K, by_input

    def _make(self, chunk: slice) -> list[Tensor]:
        """Logits of every place, [C, V] each; of the student none if nobody reads them."""
        rows = [chunk if self.needs_own else slice(0, 0), *[chunk] * (len(self.logits) - 1)]
        sides = enumerate(zip(self.logits, rows, strict=True))
        return [logits.at(r).make_in(self.scratch, self.most, number) for number, (logits, r) in sides]

    def _measure(self, made: Sequence[Tensor]) -> Tensor:
        """[places, C]: entropies of the student, and peaks of the others, 0 where no weights read them."""
        seen = made[0].new_zeros(len(made), len(made[0]))
        for part in parts(made[0]):
            seen[0, part] = prediction_stats(made[0][part])[0].clamp_min(0.0)
            for place in {place for _, place, _ in self.weighed}:
                _, best_P, logsumexp_P = prediction_stats(made[place][part])
                best_P1 = made[place][part].gather(-1, best_P[:, None])
                seen[place, part] = (best_P1[:, 0] - logsumexp_P).exp()
        return seen

    def _weigh(self, rows: slice, valid_BN: Tensor, seen: Tensor) -> None:
        by_document = [values_C.new_zeros(valid_BN.shape).masked_scatter(valid_BN, values_C) for values_C in seen]
        for k, place, weigh in self.weighed:
            weights_BN = weigh(by_document[0], by_document[place], valid_BN)
            self.weights[k][rows, 0] = weights_BN[valid_BN].to(self.factors_K.dtype)

    def _turn_into_slopes(self, rows: slice, made: Sequence[Tensor]) -> None:
        """Add a part to the sums; its logits become their factor times the gradient."""
        own_PV, slopes = made[0], list[Tensor]()
        for k, place, wanted, how in self.compared:
            student_PV, teacher_PV = own_PV[:, : wanted.classes], made[place][:, : wanted.classes]
            into_PV = own_PV if self.in_place else self.scratch.of(3 + len(slopes), student_PV.shape, student_PV)
            weights_P1 = self.weights[k][rows]
            factor_P1 = weights_P1 * self.factors_K[k]
            loss_P = divergence_rows(student_PV, teacher_PV, factor_P1, how, self.scratch, into_PV)
            self.sums_K[k] += loss_P @ weights_P1[:, 0]
            slopes.append(into_PV)
        for logits_PV, numbers in zip(made, self.cross_entropies, strict=True):
            if numbers:
                factor = self.factors_K[numbers].sum()
                self.sums_K[numbers] += cross_entropy_rows(logits_PV, self.target_M[rows], factor).sum()
        if self.in_place:
            return
        if not self.cross_entropies[0]:
            own_PV.zero_()
        for slope_PV in slopes:
            own_PV[:, : slope_PV.shape[1]] += slope_PV

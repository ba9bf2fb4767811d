"""One pass over the student's logits for all losses of a step that read them.

Each loss says what it wants: the cross-entropy of the student's logits, that of other logits at the same positions, a
divergence between the two. The pass makes the logits once, adds the gradients by them, and takes one product for the
states and one for the head. It returns one scalar, so every wish comes with the factor it has in the step.

A divergence may weigh positions by what a whole document's logits say; `head_pass` has the order of work. Nothing here
knows models, batches or papers, and a loss that knows nothing of this file does as it did.

Shape legend for this file
    B documents    N positions    D width of the student's states    V classes    K wishes
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from xkd_trainer.losses.head_pass import Weigh, Wish, joint_sum
from xkd_trainer.losses.head_rows import Comparison
from xkd_trainer.losses.lazy_logits import LazyLogits
from xkd_trainer.losses.term import at_least_float32

PASS_BYTES = 96 << 20
"""Size of one chunk of the student's logits; products of fewer positions are slower: each reads the head once."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Planned:
    """What a loss returns instead of a `LossTerm`: the same two scalars, the first of them made when it is asked for.

    Whoever runs several at once calls `HeadPlan.run` instead.
    """

    plan: "HeadPlan"
    wish: Wish

    @property
    def total(self) -> Tensor:
        """The sum, with gradient; a pass of its own."""
        return self.plan.run([self], [torch.ones(())])[0]

    @property
    def count(self) -> Tensor:
        """Number of valid positions, scalar without gradient in the dtype of `total`."""
        return self.plan.valid_BN.sum().to(at_least_float32(self.plan.own.weight.detach()[:0]).dtype)


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

    own: LazyLogits
    """States [B, N, D]; states and head learn unless they are constants."""
    target_BN: Tensor
    """int64 classes; any value where not valid."""
    valid_BN: Tensor
    """Bool; states elsewhere are not read, here and in `other`."""

    def cross_entropy(self, other: LazyLogits | None = None) -> Planned:
        """Sum of -log p(target) under the student's own logits, or under other ones.

        Args:
            other: States [B, N, E], which learn, and a head of the student's classes, which does not.
        """
        return Planned(plan=self, wish=Wish(other=other))

    def divergence(
        self, other: LazyLogits, how: Comparison, *, weigh: Weigh | None = None, classes: int | None = None
    ) -> Planned:
        """Sum of weight times divergence of the student from other logits, which get no gradient.

        Args:
            other: States [B, N, E] and a head. The same object as in `cross_entropy` shares its logits.
            how: Kind and numbers.
            weigh: Weights of the positions of some documents; None: 1 everywhere. See `head_pass.Weigh`.
            classes: Compare the first so many classes, which both heads have; None: all, and they are the same.
        """
        return Planned(plan=self, wish=Wish(other=other, how=how, weigh=weigh, classes=classes))

    def run(self, wanted: Sequence[Planned], factors: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """All at once.

        Args:
            wanted: Of this plan, in any order.
            factors: Scalars without gradient, one for each.

        Returns:
            The sum of factor times total, with gradient; and the totals, without.
        """
        if not wanted:
            return at_least_float32(self.own.weight.detach()[:0]).new_zeros(()), []
        at_valid: dict[int, LazyLogits] = {}
        wishes = []
        for wish in (planned.wish for planned in wanted):
            if wish.other is not None:  # one object stays one object
                wish = replace(wish, other=at_valid.setdefault(id(wish.other), wish.other.at(self.valid_BN)))
            wishes.append(wish)
        own, factors_K = self.own.at(self.valid_BN), torch.stack([factor.detach() for factor in factors])
        size = max(1, PASS_BYTES // max(1, self.own.row_bytes))
        total, sums_K = joint_sum(own, self.target_BN[self.valid_BN], self.valid_BN, wishes, factors_K, size)
        return total, list(sums_K)

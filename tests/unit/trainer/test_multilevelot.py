"""MultiLevelOT against loops over single documents, its gradients, and some steps of it from a cache."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import one_tokenizer as one
import slow_ot
from slow_losses import generator, mask, padded
from xkd_trainer.data.collate import batch_of
from xkd_trainer.losses.baselines.multilevelot import (
    MultiLevelOt,
    MultiLevelOtSettings,
    chosen_probabilities,
    scale_logits,
)
from xkd_trainer.losses.ops import lazy_logits
from xkd_trainer.losses.ops.lazy_logits import LazyLogits
from xkd_trainer.losses.ops.term import LossTerm

TERMS = ("l1", "word", "sequence")


class Fake:
    """A built loss on float64 heads, with ragged documents of random states: what `forward` reads and no more."""

    def __init__(
        self, seed: int, sizes: Sequence[tuple[int, int]], vocabularies: tuple[int, int], **settings: Any
    ) -> None:
        g = generator(seed)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g, dtype=torch.float64)

        self.student = [random(n, 3) for n, _ in sizes]
        self.teacher = [random(m, 3) for _, m in sizes]
        self.student_head, self.teacher_head = 2 * random(vocabularies[0], 3), 2 * random(vocabularies[1], 3)
        self.loss = MultiLevelOt.__new__(MultiLevelOt)
        nn.Module.__init__(self.loss)
        self.loss.settings = MultiLevelOtSettings(**settings)
        self.sizes = sizes

    def expected(self, **settings: Any) -> dict[str, list[float]]:
        documents = [
            ((s @ self.student_head.T).tolist(), (t @ self.teacher_head.T).tolist())
            for s, t in zip(self.student, self.teacher, strict=True)
        ]
        return slow_ot.multilevelot(documents, **settings)

    def terms(self, hidden_BPD: Tensor | None = None, weight_VD: Tensor | None = None) -> dict[str, LossTerm]:
        """The wiring of `MultiLevelOt.forward` on these states."""
        valid_BP = mask([min(n, m) for n, m in self.sizes])
        most = valid_BP.shape[1]
        own = padded([s[:most] for s in self.student], math.nan, most) if hidden_BPD is None else hidden_BPD
        theirs = padded([t[:most] for t in self.teacher], math.nan, most)
        head = self.student_head if weight_VD is None else weight_VD
        return self.loss.levels(
            LazyLogits(hidden=own[valid_BP], weight=head),
            LazyLogits(hidden=theirs[valid_BP], weight=self.teacher_head),
            valid_BP,
        )


documents = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=4)
choices = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from((1.0, 2.0)),
        "classes": st.integers(1, 12),
        "order": st.sampled_from(("document", "batch")),
        "match": st.sampled_from(("rank", "greedy")),
        "word_target": st.sampled_from(("teacher", "student")),
        "epsilon": st.sampled_from((0.1, 0.5)),
        "rounds": st.integers(1, 4),
        "max_positions": st.sampled_from((2, 1024)),
    }
)


@given(st.integers(0, 2**31), documents, st.integers(2, 9), st.integers(2, 9), choices)
def test_ragged_batches_are_the_loops_over_single_documents(
    seed: int, sizes: list[tuple[int, int]], student_classes: int, teacher_classes: int, settings: dict[str, Any]
) -> None:
    fake = Fake(seed, sizes, (student_classes, teacher_classes), **settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lazy_logits, "CHUNK_BYTES", 150)
        found = fake.terms()

    expected = fake.expected(**settings)
    for name, (total, count) in expected.items():
        assert float(found[name].total) == pytest.approx(total, abs=1e-6), name
        assert float(found[name].count) == count, name


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize("match", ["rank", "greedy"])
def test_gradients_by_states_and_head_are_numerically_right(name: str, match: str) -> None:
    fake = Fake(5, [(3, 2), (2, 4)], (6, 5), match=match, classes=4)
    hidden = padded([s[:2] for s in fake.student]).requires_grad_()
    weight = fake.student_head.clone().requires_grad_()

    assert torch.autograd.gradcheck(lambda h, w: fake.terms(h, w)[name].total, (hidden, weight))


def test_equal_logits_are_finite() -> None:
    hidden = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.ones(5, 3, dtype=torch.float64, requires_grad=True)
    logits = LazyLogits(hidden=hidden, weight=weight)

    chosen = chosen_probabilities(logits, torch.tensor([[0, 1], [2, 3]]), 1.0)
    chosen.sum().backward()

    torch.testing.assert_close(chosen, torch.full((2, 2), 0.2, dtype=torch.float64))
    assert bool(torch.isfinite(hidden.grad).all() and torch.isfinite(weight.grad).all())
    assert bool(torch.isfinite(scale_logits(torch.tensor([[1e4, -1e4, 0.0]]), 1.0)).all())


def test_the_terms_are_the_loops_over_predictions_of_single_documents() -> None:
    made, _ = one.ready("multilevelot", table=one.OTHER, classes=20)
    rows = one.ROWS[:2]
    pairs = [tuple(logits.tolist() for logits in one.logits_of(made, row)[:2]) for row in rows]

    found = one.terms_of(made.distiller, batch_of(made.cache, rows, made.wanted))

    for name, (total, count) in slow_ot.multilevelot(pairs, classes=20).items():
        one.assert_term(found[name], total, count, rel=1e-3)

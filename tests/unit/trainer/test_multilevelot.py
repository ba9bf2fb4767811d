"""MultiLevelOT against loops over single documents, its gradients, and some steps of it from a cache."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import one_tokenizer as one
import slow_ot
from slow_losses import generator, mask
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


Sides = list[list[Tensor]]
"""States of each document, of the student and of the teacher."""


def draw(seed: int, sizes: Sequence[tuple[int, int]], vocabularies: tuple[int, int]) -> tuple[Sides, list[Tensor]]:
    """Ragged documents of random states, and two float64 heads."""
    g = generator(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    states = [[random(n, 3) for n in side] for side in zip(*sizes, strict=True)]
    return states, [2 * random(v, 3) for v in vocabularies]


def terms(states: Sides, heads: Sequence[Tensor], **settings: Any) -> dict[str, LossTerm]:
    """The terms of the n-th states of both models, in every document as many as both have."""
    counts = [min(map(len, pair)) for pair in zip(*states, strict=True)]
    logits = [
        LazyLogits(hidden=torch.cat([d[:n] for d, n in zip(side, counts, strict=True)]), weight=head)
        for side, head in zip(states, heads, strict=True)
    ]
    loss: Any = SimpleNamespace(settings=MultiLevelOtSettings(**settings))
    return MultiLevelOt.levels(loss, *logits, mask(counts))


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


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**31), documents, st.integers(2, 9), st.integers(2, 9), choices)
def test_ragged_batches_are_the_loops_over_single_documents(
    seed: int, sizes: list[tuple[int, int]], student_classes: int, teacher_classes: int, how: dict[str, Any]
) -> None:
    states, heads = draw(seed, sizes, (student_classes, teacher_classes))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lazy_logits, "CHUNK_BYTES", 150)
        found = terms(states, heads, **how)

    sides = [[(s @ head.T).tolist() for s in side] for side, head in zip(states, heads, strict=True)]
    expected = slow_ot.multilevelot(list(zip(*sides, strict=True)), **how)
    for name, (total, count) in expected.items():
        assert float(found[name].total) == pytest.approx(total, abs=1e-6), name
        assert float(found[name].count) == count, name


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize("match", ["rank", "greedy"])
def test_gradients_by_states_and_head_are_numerically_right(name: str, match: str) -> None:
    (student, teacher), (weight, other) = draw(5, [(3, 2), (2, 4)], (6, 5))

    def total(weight: Tensor, *student: Tensor) -> Tensor:
        return terms([[*student], teacher], (weight, other), match=match, classes=4)[name].total

    assert torch.autograd.gradcheck(total, [x.requires_grad_() for x in (weight, *student)])


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

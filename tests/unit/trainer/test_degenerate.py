"""Every loss on states that say nothing: loss and gradients stay finite, in value and in every parameter."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from torch import Tensor

import one_tokenizer as one
from one_step import gradients
from xkd_trainer.data.batch import Batch
from xkd_trainer.losses.registry import LOSSES
from xkd_trainer.models.forward import States, run
from xkd_trainer.training import distiller as distiller_module

CASES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("kl", {"ce": 1.0}),
    ("fdd", {}),
    ("mta", {}),
    ("mta", {"hid": "token", "span_weights": "entropy"}),
    ("sra", {"layers": [2, 3]}),
    ("sra", {"weights": "centrality"}),
    ("dwa", {}),
    ("dwa", {"student_weight": "gate_after", "student_divergence": "adaptive_kl"}),
    ("dskd", {}),
    ("dskd_cma", {"correct_only": False}),
    ("dskd_v2", {"agreement": False}),
    ("alm", {}),
    ("mined", {}),
    ("uld", {}),
    ("rskd", {}),
    ("multilevelot", {"match": "greedy"}),
)
Change = Callable[[Tensor], Tensor]
AS_IT_IS: Change = lambda x: x  # noqa: E731
ZERO: Change = lambda x: x * 0.0  # noqa: E731
ALIKE: Change = lambda x: x * 0.0 + x.detach()[:1, :1]  # noqa: E731
TINY: Change = lambda x: x * 1e-20  # noqa: E731
HUGE: Change = lambda x: x * 1e4  # noqa: E731


def of_the_student(states: States, change: Change) -> States:
    layers = {layer: change(kept) for layer, kept in states.layers.items()}
    return replace(states, last_BLD=change(states.last_BLD), layers=layers)


def of_the_teacher(batch: Batch, change: Change) -> Batch:
    """States, span vectors, attention, masses and entropies changed; ranges and masks as they are."""

    def changed(one: Any, *names: str) -> Any:
        given = {name: getattr(one, name) for name in names}
        return replace(one, **{name: change(value) for name, value in given.items() if value is not None})

    levels = tuple(changed(level, "vectors_BUD", "mass_BU", "cosines_BUU") for level in batch.levels)
    states = tuple(changed(kept, "hidden_BTD", "attention_BT", "centrality_BT") for kept in batch.token_states)
    batch = changed(batch, "teacher_hidden_BRD", "teacher_attention_BR", "teacher_entropy_BM")
    return replace(batch, levels=levels, token_states=states)


def fewer(batch: Batch) -> Batch:
    """Nothing to compare in the first document, and one prediction, span, pair, word and phrase in the others."""

    def cut(valid: Tensor) -> Tensor:
        found = valid & (valid.cumsum(-1) == 1)
        found[0] = False
        return found

    names = ("predict_valid_BN", "teacher_predict_valid_BM", "span_valid_BK", "pair_valid_BE")
    masks: dict[str, Any] = {name: cut(getattr(batch, name)) for name in names}
    levels = tuple(replace(level, valid_BU=cut(level.valid_BU)) for level in batch.levels)
    return replace(batch, levels=levels, **masks)


@pytest.mark.parametrize(("loss", "settings"), CASES)
def test_states_that_say_nothing_have_a_finite_loss_and_gradient(
    loss: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, batch = one.ready(loss, **settings)

    for student in (AS_IT_IS, ZERO, ALIKE, TINY, HUGE):
        monkeypatch.setattr(
            distiller_module, "run", lambda *args, by=student, **named: of_the_student(run(*args, **named), by)
        )
        for teacher in (AS_IT_IS, ZERO, ALIKE):
            for given in (batch, fewer(batch)):
                given = of_the_teacher(given, teacher)
                total, slopes = gradients(made.distiller, [given], made.distiller.counts(given))
                assert math.isfinite(total)
                assert all(slope.isfinite().all() for slope in slopes.values())


def test_no_loss_is_forgotten() -> None:
    assert {"ce", *(loss for loss, _ in CASES)} == set(LOSSES)  # ce is beside kl

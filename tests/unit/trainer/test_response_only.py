"""What both models make of prompt and template changes no bit of a loss that reads the response alone."""

from dataclasses import replace
from typing import Any

import pytest
import torch
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
    ("mta", {"spans_over": "response", "student_pooling": "uniform"}),
    ("sra", {}),
    ("sra", {"layers": [2, 3], "spans": "word"}),
    ("sra", {"weights": "uniform", "spans": "phrase"}),
    ("dwa", {}),
    ("dskd", {}),
    ("dskd_cma", {"correct_only": False}),
    ("dskd_v2", {"agreement": False}),
    ("alm", {}),
    ("mined", {}),
    ("uld", {}),
    ("rskd", {}),
    ("multilevelot", {}),
)
"""Centrality is of all tokens of a document, so that mta reads the response alone only with these options."""


def of_the_response(batch: Batch) -> Tensor:
    """Student tokens that are targets or predict one, bool [B, S]."""
    num_BS = torch.zeros_like(batch.student_ids_BS)
    for ahead in (0, 1):
        place_BN = (batch.predict_BN + ahead).clamp_max(num_BS.shape[1] - 1)
        num_BS = num_BS.scatter_add(1, place_BN, batch.predict_valid_BN.long())
    return num_BS > 0


def filled(values: Tensor | None, keep: Tensor, value: float) -> Any:
    """`value` wherever `keep` is False, in states or in one number for each token."""
    if values is None:
        return None
    return torch.where(keep.reshape(*keep.shape, *[1] * (values.ndim - keep.ndim)), values, value)


def of_the_teacher(batch: Batch, value: float) -> Batch:
    """The batch with `value` in the teacher's states and weights of all tokens that are not kept for the response."""
    if batch.teacher_kept_BR is None:
        return batch
    assert batch.teacher_ids_BT is not None
    kept_BT = torch.zeros_like(batch.teacher_ids_BT).scatter_add(
        1, batch.teacher_kept_BR, batch.teacher_valid_BR.long()
    )
    names = ("hidden_BTD", "attention_BT", "centrality_BT")
    states = tuple(
        replace(kept, **{name: filled(getattr(kept, name), kept_BT > 0, value) for name in names})
        for kept in batch.token_states
    )
    return replace(batch, token_states=states)


def of_the_student(states: States, keep_BS: Tensor, value: float) -> States:
    """The states and attention rows with `value` at all tokens but those of the response."""
    return replace(
        states,
        last_BLD=filled(states.last_BLD, keep_BS, value),
        layers={layer: filled(kept, keep_BS, value) for layer, kept in states.layers.items()},
        attention_BL=filled(states.attention_BL, keep_BS, value),
        attention_layers={layer: filled(row, keep_BS, value) for layer, row in states.attention_layers.items()},
    )


def step(monkeypatch: pytest.MonkeyPatch, loss: str, settings: dict[str, Any], value: float) -> Any:
    """Loss and gradients of one step with `value` outside the response, in both models."""
    made, batch = one.ready(loss, table=one.FRAMED, **settings)
    keep_BS = of_the_response(batch)
    assert (batch.student_valid_BS & ~keep_BS).sum() > keep_BS.sum()
    monkeypatch.setattr(
        distiller_module, "run", lambda *args, **named: of_the_student(run(*args, **named), keep_BS, value)
    )
    return gradients(made.distiller, [of_the_teacher(batch, value)], made.distiller.counts(batch))


@pytest.mark.parametrize(("loss", "settings"), CASES)
def test_prompt_and_template_change_no_bit_of_loss_or_gradient(
    loss: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    (total, slopes), (other, others) = (step(monkeypatch, loss, settings, value) for value in (3.0, -2.0))

    assert total == other != 0
    assert any(slope.any() for slope in slopes.values())
    for name, slope in slopes.items():
        assert torch.equal(slope, others[name]), name


def test_it_would_be_seen_where_a_loss_reads_the_whole_text(monkeypatch: pytest.MonkeyPatch) -> None:
    (total, _), (other, _) = (step(monkeypatch, "mta", {}, value) for value in (3.0, -2.0))

    assert total != other


def test_no_loss_is_forgotten() -> None:
    assert {"ce", *(loss for loss, _ in CASES)} == set(LOSSES)  # ce is beside kl

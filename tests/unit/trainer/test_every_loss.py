"""What holds for every loss: counts, padding, micro-batches, blank batches, what learns, and settings that matter."""

import functools
import math
from typing import Any

import pytest
import torch

import one_tokenizer as one
from one_step import assert_padding_and_cuts_change_nothing, gradients
from poison import poisoned
from xkd_schemas.errors import UsageError
from xkd_trainer.data.batch import blank
from xkd_trainer.data.collate import batch_of
from xkd_trainer.losses.declaration import describe_loss
from xkd_trainer.losses.registry import LOSSES
from xkd_trainer.training.distiller import Distiller

SAME: dict[str, Any] = {"table": one.SAME}
EVERYWHERE: dict[str, dict[str, Any]] = {"dskd_cma": {"correct_only": False}, "dskd_v2": {"agreement": False}}
"""Settings without a mask on the student's space: a random student is never right."""
CASES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("kl", {**SAME, "ce": 1.0}),
    ("kl", {**SAME, "divergence": "adaptive_kl"}),
    ("fdd", SAME),
    ("dskd", SAME),
    ("mta", {}),
    ("mta", {**SAME, "hid": "token", "span_weights": "entropy"}),
    ("mta", {**SAME, "hid": "token", "span_weights": "uniform", "spans_over": "response"}),
    ("mta", {**SAME, "student_pooling": "teacher", "word_spans": "in_phrases"}),
    ("mta", {"dsa_vectors": "projected", "student_pooling": "uniform"}),
    ("sra", {}),
    ("sra", {"layers": [2, 3], "beta": [1, 2, 5], "spans": "phrase"}),
    ("sra", {"layers": [1, 4], "student_layers": [3], "weights": "centrality"}),
    ("sra", {"layers": [3], "weights": "uniform", "weighted_pooling": False, "weighted_loss": False, "spans": "word"}),
    ("sra", {"layers": [3], "end_token": "include"}),
    ("dwa", {}),
    ("dwa", {"student_weight": "gate_after", "student_divergence": "adaptive_kl", "band_source": "sdtw"}),
    ("dskd_cma", EVERYWHERE["dskd_cma"]),
    ("dskd_v2", {}),
    ("alm", {}),
    ("alm", {"average": "tokens", "divergence": "tv"}),
    ("mined", {}),
    ("uld", {}),
    ("uld", {"mean": "documents"}),
    ("uld", {"teacher": "topk"}),
    ("multilevelot", {}),
    ("multilevelot", {"match": "greedy"}),
    ("rskd", SAME),
)


def ready(loss: str, **settings: Any) -> Any:
    return one.ready(loss, **{"table": one.OTHER, **settings})


def test_no_loss_is_forgotten() -> None:
    assert {"ce", *(loss for loss, _ in CASES)} == set(LOSSES)  # ce is beside kl


@pytest.mark.parametrize(("loss", "settings"), CASES)
def test_counts_are_of_the_batch_and_padding_cuts_and_blank_batches_change_nothing(
    loss: str, settings: dict[str, Any]
) -> None:
    made, whole = ready(loss, **settings)
    for valid in (whole.student_valid_BS, whole.predict_valid_BN, whole.teacher_predict_valid_BM):
        assert not valid.all()
    counts, terms = made.distiller.counts(whole), one.every_term_of(made.distiller, whole)

    assert sorted(counts) == sorted(terms)
    assert set(made.distiller.loss(loss).weights(0)) == {
        n.partition(".")[2] for n in terms if n.startswith(f"{loss}.")
    }
    for name, term in terms.items():
        torch.testing.assert_close(counts[name].double(), term.count.double(), msg=name)
        assert float(term.count) > 0 or loss == "dskd_v2", name
    assert counts == made.distiller.counts(poisoned(whole))
    assert not any(made.distiller.counts(blank(whole)).values())
    parts = [batch_of(made.cache, one.ROWS[i : i + 2], made.wanted) for i in (0, 2)]
    assert_padding_and_cuts_change_nothing(made.distiller, whole, parts, counts)
    assert gradients(made.distiller, [blank(whole)], made.distiller.counts(blank(whole)))[0] == 0.0
    assert set(made.distiller.losses.state_dict()) == {n for n, _ in made.distiller.losses.named_parameters()}


def test_losses_together_have_the_gradient_of_each_alone() -> None:
    weights = {"ce": 0.7, "mta": 1.0, "sra": 0.5, "dwa": 1.5}
    made, batch = ready("mta", ce=0.7, more="+sra+dwa")
    made.distiller.weights = weights
    counts = made.distiller.counts(batch)
    expected, together = gradients(made.distiller, [batch], counts)
    together = {name: slope.clone() for name, slope in together.items()}

    total, alone = 0.0, {name: torch.zeros_like(g) for name, g in together.items()}
    for name in weights:
        made.distiller.weights = dict.fromkeys(weights, 0.0) | {name: weights[name]}
        value, found = gradients(made.distiller, [batch], counts)
        total += value
        alone = {key: alone[key] + g for key, g in found.items()}

    assert total == pytest.approx(expected, rel=1e-5)
    for key, g in together.items():
        scale = max(1.0, float(g.abs().max()))
        torch.testing.assert_close(alone[key] / scale, g / scale, rtol=1e-4, atol=1e-5, msg=key)


# What learns

REACHES = {
    "mta.dsa@2:word": {"body", "embeddings"},
    "mta.hid@2:word": {"body", "embeddings", "mta.projectors.2:word"},
    "mta.dsa@4:phrase": {"body", "embeddings"},
    "mta.hid@4:phrase": {"body", "embeddings", "mta.projectors.4:phrase"},
    "sra.cos": {"body", "embeddings", "sra.projector"},
    "sra.geo": {"body", "embeddings"},
    "sra.kd": {"body", "head", "embeddings"},
    "dwa.projected_ce": {"dwa.t2s", "dwa.query"},
    "dwa.student_space": {"body", "head", "embeddings"},
    "dwa.teacher_space": {"body", "embeddings", "dwa.s2t", "dwa.query"},
    "dwa.dtw_embeddings": {"embeddings", "dwa.embed_t2s"},
    "dwa.dtw_states": {"body", "embeddings", "dwa.t2s"},
    "dskd.projected_ce": {"dskd.t2s"},
    "dskd.student_space": {"body", "head", "embeddings"},
    "dskd.teacher_space": {"body", "embeddings", "dskd.s2t"},
    "dskd_cma.projected_ce": {"dskd_cma.t2s", "dskd_cma.query"},
    "dskd_cma.student_space": {"body", "head", "embeddings"},
    "dskd_cma.teacher_space": {"body", "embeddings", "dskd_cma.s2t", "dskd_cma.query"},
    "dskd_v2.projected_ce": {"dskd_v2.t2s"},
    "dskd_v2.student_space": {"body", "head", "embeddings"},
    "dskd_v2.teacher_space": {"body", "embeddings"},
    "alm.alm": {"body", "head", "embeddings"},
    "mined.mined": {"body", "head", "embeddings"},
    "uld.l1": {"body", "head", "embeddings"},
}
"""What learns from each term: METHODS 1.5, 2.3, 3.4 and 4."""


def reached(distiller: Distiller) -> set[str]:
    """Groups of parameters with a gradient that is not 0."""
    found = set()
    for name, parameter in distiller.named_parameters():
        if parameter.grad is not None and parameter.grad.any():
            group = "head" if "lm_head" in name else "embeddings" if "embed_tokens" in name else "body"
            found.add(name.removeprefix("losses.").rpartition(".")[0] if name.startswith("losses.") else group)
    return found


@functools.cache
def slopes_of(loss: str) -> dict[str, set[str]]:
    """Term -> what it teaches."""
    made, batch = ready(loss, **(SAME if loss == "dskd" else {}), **EVERYWHERE.get(loss, {}))
    found = {}
    for name in one.terms_of(made.distiller, batch):
        made.distiller.zero_grad(set_to_none=True)
        term = one.terms_of(made.distiller, batch)[name].total
        if term.requires_grad:
            term.backward()
        found[name] = reached(made.distiller)
    return found


@pytest.mark.parametrize("name", REACHES)
def test_each_term_teaches_what_the_paper_lets_it_teach_and_nothing_else(name: str) -> None:
    loss, _, term = name.partition(".")

    assert slopes_of(loss)[term] == REACHES[name]


d, D = 16, 32
"""Widths of the tiny student and teacher."""
LINEAR = {
    "mta": {f"projectors.{level}": (D, d, True) for level in ("2:word", "3:phrase", "4:phrase")},
    "sra": {"projector": (D, d, False)},
    "dwa": {"t2s": (d, D, True), "s2t": (D, d, True), "query": (2 * D, 2 * d, True), "embed_t2s": (d, D, True)},
    "dskd_cma": {"t2s": (d, D, True), "s2t": (D, d, True), "query": (2 * D, 2 * d, True)},
    "dskd_v2": {"t2s": (d, D, False)},
    "alm": {},
    "mined": {},
}
"""Width out, width in, bias: METHODS 1.5, 2.3, 3.5, 4.2 and 4.3."""


@pytest.mark.parametrize("loss", LINEAR)
def test_projectors_are_single_linear_layers_of_the_papers_shapes(loss: str) -> None:
    module = ready(loss)[0].distiller.losses[loss]

    expected = {f"{name}.weight": (out, into) for name, (out, into, _) in LINEAR[loss].items()}
    expected |= {f"{name}.bias": (out,) for name, (out, _, bias) in LINEAR[loss].items() if bias}
    assert {name: tuple(p.shape) for name, p in module.named_parameters()} == expected


# Settings


@torch.no_grad()
def value(loss: str, **settings: Any) -> float:
    made, batch = ready(loss, **settings)
    return float(made.distiller(batch, made.distiller.counts(batch), 0)[0])


default = functools.cache(value)


@pytest.mark.parametrize(
    ("loss", "settings"),
    [
        ("mta", {"student_pooling": "uniform"}),
        ("mta", {"word_spans": "in_phrases"}),
        ("mta", {"spans_over": "response"}),
        ("mta", {"span_weights": "uniform"}),
        ("mta", {"hid_layers": "sum"}),
        ("mta", {"lambda_dsa": 1.0}),
        ("mta", {"student_layers": [1, 1, 2]}),
        ("sra", {"weights": "uniform"}),
        ("sra", {"kd": "mean"}),
        ("sra", {"weighted_pooling": False}),
        ("sra", {"weighted_loss": False}),
        ("sra", {"shared_vocab": "exact"}),
        ("sra", {"tau": 4.0}),
        ("sra", {"p": 2.0}),
        ("sra", {"geo": 10.0}),
        ("sra", {"spans": "word"}),
        ("sra", {"spans": "phrase"}),
        ("dwa", {"entropy_weights": False}),
        ("dwa", {"gate": False}),
        ("dwa", {"student_weight": "gate_after"}),
        ("dwa", {"student_divergence": "reverse_kl"}),
        ("dwa", {"teacher_divergence": "js"}),
        ("dwa", {"temperature": 1.0}),
        ("dwa", {"gamma": 1.0}),
        ("dwa", {"dtw_divergence": False}),
        ("dwa", {"band": "none"}),
        ("dwa", {"band": "hard", "band_width": 1.0}),
        ("dwa", {"band_source": "sdtw"}),
        ("dwa", {"band_warmup_steps": 3}),
        ("dwa", {"gate_warmup_steps": 3}),
        ("dwa", {"dtw_warmup_steps": 3}),
        ("dwa", {"kd": 1.0}),
        ("alm", {"divergence": "reverse_kl"}),
        ("alm", {"divergence": "tv"}),
        ("alm", {"divergence": "kl_limit"}),
        ("alm", {"temperature": 1.0}),
        ("alm", {"scaled": False}),
        ("alm", {"average": "tokens"}),
        ("mined", {"temperature": 1.0}),
        ("mined", {"vocabulary": "exact"}),
    ],
)
def test_every_setting_changes_something(loss: str, settings: dict[str, Any]) -> None:
    found = value(loss, **settings)

    assert found != default(loss)
    assert math.isfinite(found)


@pytest.mark.parametrize("loss", LOSSES)
def test_no_number_of_the_settings_may_be_infinite_or_none_at_all(loss: str) -> None:
    defaults = LOSSES[loss].parse({})
    numbers = [name for name, value in defaults if isinstance(value, float)]
    for name in numbers:
        for wrong in (math.inf, -math.inf, math.nan):
            with pytest.raises(UsageError, match=name):
                LOSSES[loss].parse({name: wrong})
    assert numbers or loss in ("ce", "rskd", "uld")


def test_described_needs_are_the_declared_ones() -> None:
    described = {name: describe_loss(declaration) for name, declaration in LOSSES.items()}

    assert described["ce"]["needs"] == []
    assert described["mta"]["needs"] == ["span_geometry@LAYER:UNIT", "span_mass@LAYER:UNIT", "span_vectors@LAYER:UNIT"]
    assert described["sra"]["needs"] == ["attention_text@LAYER", "hidden_last"]
    assert described["dwa"]["needs"] == ["entropy", "hidden_last"]
    assert described["dwa"]["settings"]["gamma"] == 2.0


def test_a_loss_that_is_off_has_no_term_no_projector_and_asks_for_no_signal() -> None:
    made, batch = ready("mta", lambda_hid=0.0)

    assert not any("hid" in name for name in one.terms_of(made.distiller, batch))
    assert list(made.distiller.losses.parameters()) == []
    wanted = {
        ("mta", "lambda_hid", 0.0): {"span_mass", "span_geometry"},
        ("mta", "hid", "off"): {"span_mass", "span_geometry"},
        ("mta", "lambda_dsa", 0.0): {"span_mass", "span_vectors"},
        ("sra", "weights", "uniform"): {"hidden_last"},
        ("dwa", "entropy_weights", False): {"hidden_last"},
    }
    for (loss, name, given), signals in wanted.items():
        assert {s.name for s in ready(loss, **{name: given})[0].wanted} == signals, (loss, name)
    assert {s.column for s in ready("sra", spans="phrase")[0].wanted} == {
        "attention_text@4", "hidden_last", "span_mass@3:phrase",
    }  # fmt: skip

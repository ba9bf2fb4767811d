"""What holds for every loss: counts, padding, micro-batches, packing, blank batches, states that say nothing, states
of the prompt, what learns, what one tokenizer means, and settings that matter."""

import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import one_tokenizer as one
from one_step import assert_padding_and_cuts_change_nothing, assert_same_step, gradients, widen
from poison import poisoned
from xkd_schemas.errors import BadData, UsageError
from xkd_trainer.data.batch import Batch, blank
from xkd_trainer.data.cache import Cache
from xkd_trainer.data.collate import batch_of
from xkd_trainer.losses.registry import LOSSES, loss_named
from xkd_trainer.models.forward import run
from xkd_trainer.training import distiller as distiller_module
from xkd_trainer.training.distiller import Distiller

SAME: dict[str, Any] = {"table": one.SAME}
EVERYWHERE: dict[str, dict[str, Any]] = {
    "dskd_cma": {"correct_only": False}, "dskd_cma_ga": {"correct_only": False}, "dskd_v2": {"agreement": False},
}  # fmt: skip
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
    ("mta", {"dsa_vectors": "projected", "student_pooling": "uniform", "spans_over": "response"}),
    ("sra", {}),
    ("sra", {"layers": [2, 3], "beta": [1, 2, 5], "spans": "phrase"}),
    ("sra", {"layers": [1, 4], "student_layers": [3], "weights": "centrality"}),
    ("sra", {"layers": [3], "weights": "uniform", "weighted_pooling": False, "weighted_loss": False, "spans": "word"}),
    ("sra", {"layers": [3], "end_token": "include"}),
    ("dwa", {}),
    ("dwa", {"student_weight": "gate_after", "student_divergence": "adaptive_kl", "band_source": "sdtw"}),
    ("dskd_cma", EVERYWHERE["dskd_cma"]),
    ("dskd_cma_ga", {**EVERYWHERE["dskd_cma_ga"], "kq_rate": 1.0}),
    ("dskd_v2", {}),
    ("alm", {}),
    ("alm", {"average": "tokens", "divergence": "tv"}),
    ("mined", {}),
    ("uld", {}),
    ("uld", {"mean": "documents"}),
    ("uld", {"teacher": "topk"}),
    ("multilevelot", {}),
    ("multilevelot", {"match": "greedy"}),
    ("gold", {}),
    ("gold", {"merge": "bayesian", "mean": "documents", "end_token": "include", "matched_weight": 1.0,
              "unmatched_weight": 0.5}),
    ("simct", {}),
    ("xtoken_p", {"teacher_classes": 40}),
    ("xtoken_h", {}),
    ("rskd", SAME),
)  # fmt: skip


def ready(loss: str, **settings: Any) -> Any:
    """As `one_tokenizer.ready`, made once for several tests."""
    key = json.dumps([loss, settings], default=str)
    if key not in _made:
        _made[key] = one.ready(loss, **{"table": one.OTHER, **settings})
    return _made[key]


_made: dict[str, Any] = {}


def test_no_loss_is_forgotten() -> None:
    assert {"ce", *(loss for loss, _ in CASES)} == set(LOSSES)  # ce is beside kl


@pytest.mark.parametrize(("loss", "settings"), CASES)
def test_counts_are_of_the_batch_and_padding_cuts_packing_and_blank_batches_change_nothing(
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


def test_a_term_is_divided_by_its_count_and_is_0_without_any() -> None:
    made, batch = ready("kl", **SAME)
    (term,) = (value for name, value in one.every_term_of(made.distiller, batch).items() if name == "kl.kl")
    total = float(term.total.detach())
    for count, expected in ((0.0, 0.0), (1.0, total), (4.0, total / 4)):
        counts = dict.fromkeys(made.distiller.counts(batch), torch.tensor(count))
        assert float(made.distiller(batch, counts, 0)[1]["kl.kl"]) == pytest.approx(expected, rel=1e-6)


def test_losses_together_have_the_gradient_of_each_alone() -> None:
    weights = {"ce": 0.7, "mta": 1.0, "sra": 0.5, "dwa": 1.5}
    made, batch = one.ready("mta", table=one.OTHER, ce=0.7, more="+sra+dwa")
    made.distiller.weights = weights
    counts = made.distiller.counts(batch)
    together = gradients(made.distiller, [batch], counts)

    steps = []
    for name in weights:
        made.distiller.weights = dict.fromkeys(weights, 0.0) | {name: weights[name]}
        steps.append(gradients(made.distiller, [batch], counts))

    alone = {key: torch.stack([slopes[key] for _, slopes in steps]).sum(0) for key in together[1]}
    assert_same_step((sum(total for total, _ in steps), alone), together)


# States that say nothing, and states of the prompt

Change = Callable[[Tensor], Tensor]
AS_IT_IS: Change = lambda x: x  # noqa: E731
ZERO: Change = lambda x: x * 0.0  # noqa: E731
ALIKE: Change = lambda x: x * 0.0 + x.detach()[:1, :1]  # noqa: E731
STUDENT = ("last_BLD", "layers")
OF_TOKENS = ("hidden_BTD", "attention_BT", "attention_text_BT", "centrality_BT")


def changed(one: Any, change: Change, *names: str) -> Any:
    """The dataclass with some fields changed: tensors, dictionaries of them, or None."""

    def apply(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: change(tensor) for key, tensor in value.items()}
        return None if value is None else change(value)

    return replace(one, **{name: apply(getattr(one, name)) for name in names})


def by_document(changes: Sequence[Change]) -> Change:
    """The first change for the first document of the batch, and so on."""
    return lambda x: torch.cat([change(x[i : i + 1]) for i, change in enumerate(changes)])


def change_student(monkeypatch: pytest.MonkeyPatch, change: Change, *names: str) -> None:
    monkeypatch.setattr(distiller_module, "run", lambda *args, **named: changed(run(*args, **named), change, *names))


def change_teacher(batch: Batch, change: Change) -> Batch:
    """States, span vectors, attention, masses and entropies; ranges and masks as they are."""
    levels = tuple(changed(level, change, "vectors_BUD", "mass_BU", "cosines_BUU") for level in batch.levels)
    states = tuple(changed(kept, change, *OF_TOKENS) for kept in batch.token_states)
    batch = changed(batch, change, "teacher_hidden_BRD", "teacher_attention_BR", "teacher_entropy_BM")
    return replace(batch, levels=levels, token_states=states)


def fewer(batch: Batch) -> Batch:
    """Nothing to compare in the first document, and one prediction, span, pair, word and phrase in the others."""

    def cut(valid: Tensor) -> Tensor:
        found = valid & (valid.cumsum(-1) == 1)
        found[0] = False
        return found

    levels = tuple(changed(level, cut, "valid_BU") for level in batch.levels)
    names = ("predict_valid_BN", "teacher_predict_valid_BM", "span_valid_BK", "pair_valid_BE")
    return replace(changed(batch, cut, *names), levels=levels)


@pytest.mark.parametrize(("loss", "settings"), CASES)
def test_states_that_say_nothing_have_a_finite_loss_and_gradient(
    loss: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, batch = ready(loss, **settings)
    students = (AS_IT_IS, ZERO, ALIKE, lambda x: x * 1e-20, lambda x: x * 1e4)
    pairs = [(student, AS_IT_IS) for student in students]
    pairs += [(student, teacher) for student in students[:2] for teacher in (ZERO, ALIKE)]

    for three in (pairs[:3], pairs[3:6], pairs[6:]):
        student, teacher = (by_document((AS_IT_IS, *side)) for side in zip(*three, strict=True))
        change_student(monkeypatch, student, *STUDENT)
        for given in (batch, fewer(batch)):
            given = change_teacher(given, teacher)
            total, slopes = gradients(made.distiller, [given], made.distiller.counts(given))
            assert math.isfinite(total)
            assert all(slope.isfinite().all() for slope in slopes.values())


def step_with(monkeypatch: pytest.MonkeyPatch, loss: str, settings: dict[str, Any], value: float) -> Any:
    """Loss and gradients of one step with `value` in all states and weights outside the response, in both models."""
    made, batch = ready(loss, **settings | {"table": one.FRAMED})
    keep_BS = torch.zeros_like(batch.student_ids_BS)
    for ahead in (0, 1):  # tokens that predict a target, and targets
        place_BN = (batch.predict_BN + ahead).clamp_max(keep_BS.shape[1] - 1)
        keep_BS = keep_BS.scatter_add(1, place_BN, batch.predict_valid_BN.long())
    assert (batch.student_valid_BS & (keep_BS == 0)).sum() > (keep_BS > 0).sum()

    def fill(keep_BL: Tensor) -> Change:
        return lambda x: torch.where((keep_BL > 0).reshape(*keep_BL.shape, *[1] * (x.ndim - 2)), x, value)

    change_student(monkeypatch, fill(keep_BS), *STUDENT, "attention_BL", "attention_layers", "text_layers")
    if batch.teacher_kept_BR is not None:
        zeros_BT, valid_BR = torch.zeros_like(batch.teacher_ids_BT), batch.teacher_valid_BR.long()
        outside = fill(zeros_BT.scatter_add(1, batch.teacher_kept_BR, valid_BR))
        batch = replace(batch, token_states=tuple(changed(kept, outside, *OF_TOKENS) for kept in batch.token_states))
    return gradients(made.distiller, [batch], made.distiller.counts(batch))


def reads_the_response_alone(loss: str, settings: dict[str, Any]) -> bool:
    """Centrality is of all tokens of a document, and spans lie in the prompt too."""
    if loss == "mta":
        return settings.get("spans_over") == "response" and settings.get("student_pooling") == "uniform"
    return settings.get("weights") != "centrality"


FIRST = {loss: (loss, settings) for loss, settings in reversed(CASES) if reads_the_response_alone(loss, settings)}
SRA = [case for case in CASES if case[0] == "sra" and reads_the_response_alone(*case)]


@pytest.mark.parametrize(("loss", "settings"), [*SRA, *(case for case in FIRST.values() if case not in SRA)])
def test_prompt_and_template_change_no_bit_of_loss_or_gradient(
    loss: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    (total, slopes), (other, others) = (step_with(monkeypatch, loss, settings, value) for value in (3.0, -2.0))

    assert total == other != 0
    assert any(slope.any() for slope in slopes.values())
    for name, slope in slopes.items():
        assert torch.equal(slope, others[name]), name


def test_it_would_be_seen_where_a_loss_reads_the_whole_text(monkeypatch: pytest.MonkeyPatch) -> None:
    (total, _), (other, _) = (step_with(monkeypatch, "mta", {}, value) for value in (3.0, -2.0))

    assert total != other


# One tokenizer

ONE_TOKENIZER = [loss for loss in LOSSES if loss_named(loss).one_tokenizer]


@pytest.mark.parametrize("loss", ONE_TOKENIZER)
def test_another_tokenizer_and_responses_of_other_length_are_refused(loss: str) -> None:
    refusal = rf"^loss {loss} needs one tokenizer .*vocabulary and probe .* differ.*Next: use dskd_cma or dskd_v2"
    with pytest.raises(UsageError, match=refusal):
        ready(loss)
    made, batch = ready(loss, **SAME)
    with pytest.raises(BadData, match=rf"loss {loss}: one of the rows 3, 19, 0, 11 has responses of different length"):
        made.distiller.counts(replace(batch, teacher_predict_valid_BM=~batch.teacher_predict_valid_BM))


@pytest.mark.parametrize("loss", ONE_TOKENIZER)
def test_another_tokenizer_is_refused_before_the_signals_are_asked_for(
    loss: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Cache, "require", lambda *_: pytest.fail("a pass of the teacher was asked for"))

    with pytest.raises(UsageError, match="needs one tokenizer"):
        ready(loss)


@pytest.mark.parametrize(("loss", "settings"), [("kl", {}), ("kl", {"divergence": "csd"}), ("rskd", {}), ("fdd", {})])
@torch.no_grad()
def test_rows_of_a_head_beyond_the_tokenizer_take_no_part(loss: str, settings: dict[str, Any]) -> None:
    made, batch = one.ready(loss, **SAME, **settings)  # not shared: its head is changed
    before = one.means(made, batch)

    widen(made.distiller.student.lm_head, "weight")
    assert one.means(made, batch) == pytest.approx(before, rel=1e-5)
    if loss != "rskd":
        widen(made.distiller.losses[loss].head, "weight_VD")
        assert one.means(made, batch) == pytest.approx(before, rel=1e-5)


# What learns

EVERYTHING = {"body", "head", "embeddings"}
BELOW = {"body", "embeddings"}
DISCRIMINATOR = {f"dskd_cma_ga.discriminator.{part}" for part in ("highway", "inner", "outer")}
REACHES: dict[str, set[str]] = {
    **dict.fromkeys(
        ("sra.kd", "alm.alm", "mined.mined", "uld.l1", "gold.gold", "simct.simct", "xtoken_p.xtoken_p",
         "xtoken_h.xtoken_h", *(f"{name}.student_space" for name in ("dwa", "dskd", "dskd_cma", "dskd_v2"))),
        EVERYTHING,
    ),
    "gold.matched": set(),
    "mta.dsa@2:word": BELOW,
    "mta.hid@2:word": {*BELOW, "mta.projectors.2:word"},
    "mta.dsa@4:phrase": BELOW,
    "mta.hid@4:phrase": {*BELOW, "mta.projectors.4:phrase"},
    "sra.cos": {*BELOW, "sra.projector"},
    "sra.geo": BELOW,
    **{f"{name}.projected_ce": {f"{name}.t2s", f"{name}.query"} for name in ("dwa", "dskd_cma")},
    **{f"{name}.projected_ce": {f"{name}.t2s"} for name in ("dskd", "dskd_v2")},
    **{
        f"{name}.teacher_space": {*BELOW, f"{name}.s2t", f"{name}.query"}
        for name in ("dwa", "dskd_cma", "dskd_cma_ga")
    },
    "dskd.teacher_space": {*BELOW, "dskd.s2t"},
    "dskd_v2.teacher_space": BELOW,
    "dwa.dtw_embeddings": {"embeddings", "dwa.embed_t2s"},
    "dwa.dtw_states": {*BELOW, "dwa.t2s"},
    "dskd_cma_ga.keys": DISCRIMINATOR,
    "dskd_cma_ga.queries": {"dskd_cma_ga.query", *DISCRIMINATOR},
}  # fmt: skip
"""What learns from each term: METHODS 1.5, 2.3, 3.4 and 4."""


def reached(distiller: Distiller) -> set[str]:
    found = set()
    for name, parameter in distiller.named_parameters():
        if parameter.grad is not None and parameter.grad.any():
            group = "head" if "lm_head" in name else "embeddings" if "embed_tokens" in name else "body"
            found.add(name.removeprefix("losses.").rpartition(".")[0] if name.startswith("losses.") else group)
    return found


@functools.cache
def slopes_of(loss: str) -> dict[str, set[str]]:
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


# Settings


@torch.no_grad()
def value(loss: str, **settings: Any) -> float:
    made, batch = ready(loss, **settings)
    return float(made.distiller(batch, made.distiller.counts(batch), 0)[0])


default = functools.cache(value)


CHANGES: list[tuple[str, dict[str, Any]]] = [
    ("dwa", {"kd": 1.0}), ("dskd_cma", {"correct_only": False}), ("dskd_cma_ga", {"correct_only": False}),
    ("dskd_cma_ga", {"kq_rate": 1.0}), ("mined", {"temperature": 1.0}), ("mined", {"vocabulary": "exact"}),
    ("gold", {"divergence": "forward_kl"}), ("simct", {"shared_vocab": "exact"}),
    ("xtoken_p", {"divergence": "reverse_kl"}), ("xtoken_p", {"shared_vocab": "exact"}), ("xtoken_p", {"targets": 1}),
    ("xtoken_p", {"end_token": "include"}), ("xtoken_h", {"divergence": "reverse_kl"}),
]  # fmt: skip
"""Settings with which the losses are not compared with loops over single documents."""


@pytest.mark.parametrize(("loss", "settings"), CHANGES)
def test_a_setting_changes_the_loss(loss: str, settings: dict[str, Any]) -> None:
    found = value(loss, **settings)

    assert found != default(loss)
    assert math.isfinite(found)


@pytest.mark.parametrize("loss", LOSSES)
def test_no_number_of_the_settings_may_be_infinite_or_none_at_all(loss: str) -> None:
    defaults = loss_named(loss).parse({})
    numbers = [name for name, value in defaults if isinstance(value, float)]
    for name in numbers:
        for wrong in (math.inf, -math.inf, math.nan):
            with pytest.raises(UsageError, match=name):
                loss_named(loss).parse({name: wrong})
    assert numbers or loss in ("ce", "rskd", "uld")


def test_a_loss_that_is_off_has_no_term_no_projector_and_asks_for_no_signal() -> None:
    made, batch = ready("mta", lambda_hid=0.0)

    assert not any("hid" in name for name in one.terms_of(made.distiller, batch))
    assert list(made.distiller.losses.parameters()) == []
    assert {s.name for s in made.wanted} == {"span_mass", "span_geometry"}
    assert {s.name for s in ready("dwa", entropy_weights=False)[0].wanted} == {"hidden_last"}

"""ALM: chunks and their losses against loops, gradients, padding, cuts, degenerate input, and the wired loss."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import one_tokenizer as one
import slow_chunks as slow
import slow_losses as tools
from xkd_schemas.tokens import predictors
from xkd_trainer.data.cache import Cache
from xkd_trainer.losses.baselines.alm import AlmSettings, binarised_divergence, log_complement
from xkd_trainer.losses.ops.lazy_logits import LazyLogits, head_log_probabilities

KINDS = ("kl", "reverse_kl", "tv", "kl_limit")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("tau", "scaled"), [(1.0, True), (3.0, False), (100.0, True)])
def test_a_chunk_costs_what_the_equations_say(kind: str, tau: float, scaled: bool) -> None:
    student, teacher = (-values.exp() for values in tools.ragged(1, [9, 9]))
    found = binarised_divergence(student, teacher, AlmSettings(divergence=kind, temperature=tau, scaled=scaled))

    both = zip(student.tolist(), teacher.tolist(), strict=True)
    assert found.tolist() == pytest.approx([slow.binarised(s, t, kind, tau, scaled) for s, t in both], rel=1e-7)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_certain_and_impossible_chunks_have_a_finite_loss_and_gradient(kind: str, dtype: torch.dtype) -> None:
    student, teacher = torch.cartesian_prod(*[torch.tensor([0.0, -1e-8, -1.0, -1e4], dtype=dtype)] * 2).T
    for tau in (0.5, 100.0):
        how = AlmSettings(divergence=kind, temperature=tau)
        assert (binarised_divergence(student, teacher, how) >= -1e-4).all()
        value, gradient = tools.with_gradient(lambda s, how=how: binarised_divergence(s, teacher, how).sum(), student)
        assert value.isfinite()
        assert gradient.isfinite().all()


def test_log_complement_keeps_its_digits_on_both_sides_of_a_half() -> None:
    x = torch.tensor([-1e-12, -1e-3, -0.69, -0.7, -20.0, -300.0], dtype=torch.float64)

    found = log_complement(x).tolist()

    assert found == pytest.approx([math.log(-math.expm1(v)) if v > -30 else -math.exp(v) for v in x.tolist()])


@pytest.mark.parametrize("rows_per_chunk", [1, 2, 100])
@pytest.mark.parametrize("bias", [True, False])
def test_log_probabilities_are_those_of_dense_logits(
    rows_per_chunk: int, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("xkd_trainer.losses.ops.lazy_logits.CHUNK_BYTES", rows_per_chunk * 6 * 8)
    g = tools.generator(1)
    hidden, weight, offset = (torch.randn(*shape, generator=g).double() for shape in ((5, 3), (6, 3), (6,)))
    target = torch.tensor([0, 5, 2, 2, 1])
    inputs = [x.requires_grad_() for x in ((hidden, weight, offset) if bias else (hidden, weight))]

    def found(*given: Tensor) -> Tensor:
        return head_log_probabilities(LazyLogits(hidden=given[0], weight=given[1], bias=(*given, None)[2]), target)

    rows = LazyLogits(hidden=hidden, weight=weight, bias=offset if bias else None).dense().tolist()
    expected = [slow.log_softmax(row)[int(y)] for row, y in zip(rows, target, strict=True)]
    assert found(*inputs).tolist() == pytest.approx(expected, rel=1e-12)
    assert torch.autograd.gradcheck(found, inputs)


@pytest.fixture
def earlier(monkeypatch: pytest.MonkeyPatch) -> None:
    """Caches are as those of earlier versions: without the log-probabilities of targets."""
    found = Cache.signals.func  # type: ignore[attr-defined]
    left = property(lambda cache: tuple(s for s in found(cache) if s.name != "target_logprob"))
    monkeypatch.setattr(Cache, "signals", left)


SETTINGS: tuple[dict[str, Any], ...] = (
    {},
    {"average": "tokens", "divergence": "reverse_kl", "temperature": 3.0},
    {"divergence": "tv", "temperature": 1.0},
    {"average": "tokens", "divergence": "kl_limit"},
    {"scaled": False, "temperature": 3.0},
)


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("reads", ["target_logprob", "hidden_last"])
@torch.no_grad()
def test_the_wired_loss_is_the_loops_over_single_documents(settings: dict[str, Any], reads: str, request: Any) -> None:
    """Of caches of now and of earlier versions, whose last states are rounded as those that the loops read."""
    if reads == "hidden_last":
        request.getfixturevalue("earlier")
    made, batch = one.ready("alm", table=one.OTHER, **settings)
    documents = []
    for row in one.ROWS:
        log_p, student = [], made.cache.students[row]
        for side, logits in zip((student, made.cache.teachers[row]), one.logits_of(made, row)[:2], strict=True):
            places, scores = predictors(side["targets"]) + 1, logits.log_softmax(-1)
            ids = side["token_ids"][places].tolist()
            log_p.append({p: float(z[y]) for p, z, y in zip(places.tolist(), scores, ids, strict=True)})
        spans = ([tuple(r) for r in student[name].tolist()] for name in ("student_spans", "teacher_spans"))
        documents.append((*log_p, *spans))

    how = AlmSettings(**settings)
    total, count = slow.alm(
        documents, divergence=how.divergence, tau=how.temperature, scaled=how.scaled, average=how.average
    )
    assert {signal.name for signal in made.wanted} == {reads}
    assert count > 20
    rel = 2e-4 if reads == "hidden_last" else 1e-2
    one.assert_term(one.terms_of(made.distiller, batch)["alm"], total, count, rel=rel)


@pytest.mark.parametrize("side", ["predict_valid_BN", "teacher_predict_valid_BM"])
def test_a_chunk_that_one_model_does_not_predict_whole_is_not_counted(side: str) -> None:
    made, batch = one.ready("alm", table=one.OTHER)
    valid = getattr(batch, side).clone()
    valid[0, 1] = False
    before = float(made.distiller.counts(batch)["alm.alm"])

    less = replace(batch, **{side: valid})

    counts, found = made.distiller.counts(less), one.terms_of(made.distiller, less)
    assert float(counts["alm.alm"]) == float(found["alm"].count) == before - 1


@torch.no_grad()
def test_log_probabilities_need_no_head_of_the_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Cache, "head", lambda _: pytest.fail("the head was read"))

    made, batch = one.ready("alm", table=one.OTHER)

    assert float(made.distiller(batch, made.distiller.counts(batch), 0)[0]) > 0

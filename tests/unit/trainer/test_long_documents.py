"""Long documents: what is worked in blocks is what is worked at once, and cosines are of a bounded number of spans."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import one_tokenizer as one
from one_step import assert_same_step, gradients
from poison import poisoned
from xkd_pipeline.capture.capture import TeacherSettings, codec_error, encode_signals
from xkd_pipeline.capture.measure import _span_signal
from xkd_pipeline.capture.stage import teacher_spec
from xkd_schemas.cache.manifest import Commit
from xkd_schemas.signals import GEOMETRY_SPANS, Signal, count_pairs, draw_spans
from xkd_trainer.data.collate import _level
from xkd_trainer.losses import dual_space, sra
from xkd_trainer.losses import softdtw as long_soft_dtw
from xkd_trainer.losses.softdtw import cosine_cost, soft_dtw
from xkd_trainer.losses.sra import geometric
from xkd_trainer.models import measures
from xkd_trainer.models.architecture import Head
from xkd_trainer.models.measures import cosine_matrix, pack_triangle, pool_spans

GEOMETRY = Signal("span_geometry", 2, "word")


def same(found: Any, expected: Any, inputs: list[Tensor]) -> None:
    """Equal values, and equal gradients of their sums."""
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    slopes = [torch.autograd.grad(sum(v.sin().sum() for v in side), inputs) for side in (found, expected)]
    for ours, theirs in zip(*slopes, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_spans_pooled_block_by_block_are_those_pooled_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weights = torch.randn(2, 12, 3, requires_grad=True), torch.rand(2, 12, requires_grad=True)
    spans = torch.tensor([
        [[0, 2], [1, 5], [5, 6], [0, 0], [6, 9], [8, 12], [3, 4]],
        [[2, 3], [0, 0], [0, 0], [0, 0], [0, 0], [0, 0], [0, 0]],
    ])  # fmt: skip
    whole = pool_spans(hidden, weights, spans)
    monkeypatch.setattr(measures, "LONG_CELLS", 1)
    monkeypatch.setattr(measures, "SPANS_OF_A_BLOCK", 3)

    same(pool_spans(hidden, weights, spans), whole, [hidden, weights])


def test_pairs_of_spans_compared_block_by_block_are_those_compared_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = torch.randn(3, 9, 4), torch.randn(3, 9, 6)
    student[0, 2] = 0.0  # no cosine with itself, and yet no pair
    student.requires_grad_()
    omega, valid = torch.rand(3, 9), torch.arange(9) < torch.tensor([9, 1, 0])[:, None]
    whole = geometric(student, teacher, omega, valid)
    monkeypatch.setattr(sra, "BLOCK_PAIRS", 3 * 9 * 4)

    found = geometric(student, teacher, omega, valid)

    same([found.total], [whole.total], [student])
    assert found.count == whole.count == 2


@pytest.fixture(scope="module")
def vectors() -> Tensor:
    return torch.randn(GEOMETRY_SPANS + 40, 4, generator=torch.Generator().manual_seed(0))


def test_of_more_spans_than_the_bound_the_cosines_of_drawn_ones_are_kept(vectors: Tensor) -> None:
    drawn, mass = draw_spans(len(vectors)), torch.ones(len(vectors))
    assert len(set(drawn.tolist())) == GEOMETRY_SPANS

    stored = _span_signal(GEOMETRY, vectors, mass)[GEOMETRY.column]

    assert len(stored) == count_pairs(len(vectors))
    assert np.array_equal(stored, _span_signal(GEOMETRY, vectors[drawn], mass)[GEOMETRY.column])
    assert len(_span_signal(GEOMETRY, vectors[:50], mass)[GEOMETRY.column]) == 50 * 49 // 2


def test_what_rounding_lost_of_cosines_is_a_codec_error() -> None:
    sides = [torch.randn(spans, 16, generator=torch.Generator().manual_seed(spans)) + 1.5 for spans in (7, 1, 12)]
    captured = [_span_signal(GEOMETRY, vectors, torch.ones(len(vectors))) for vectors in sides]

    _, sums = encode_signals(captured, [GEOMETRY], "bf16", Head(weight_VD=torch.eye(16)))

    exact = np.concatenate([pack_triangle(cosine_matrix(vectors[None])[0]).double().numpy() for vectors in sides])
    stored = np.concatenate([row[GEOMETRY.column] for row in captured])
    lost = np.linalg.norm(exact - stored) / np.linalg.norm(exact)
    assert stored.dtype == np.float16
    assert codec_error([Commit.model_construct(sums=sums)]) == {GEOMETRY.column: pytest.approx(lost, rel=1e-3)}
    assert 0 < lost < 2**-11


@pytest.mark.parametrize("version", ["now", "earlier"])
def test_a_level_has_the_cosines_of_the_drawn_spans_whether_all_are_stored_or_not(
    vectors: Tensor, version: str
) -> None:
    exact, drawn = cosine_matrix(vectors[None])[0], draw_spans(len(vectors))
    long = pack_triangle(exact if version == "earlier" else exact[drawn][:, drawn]).numpy()
    short = pack_triangle(exact[:3, :3]).numpy()

    def sample(count: int, packed: Any) -> dict[str, Any]:
        found = {name: np.zeros((count, 2), np.int64) for name in ("student", "teacher")}
        found |= {name: np.ones(count, np.bool_) for name in ("seen", "in_phrase", "in_target")}
        found = {f"level word {name}": value for name, value in found.items()}
        return {**found, "level span_mass@2:word": np.ones(count, np.float32), f"level {GEOMETRY.column}": packed}

    level = _level(2, "word", [sample(len(vectors), long), sample(3, short)], frozenset([GEOMETRY]))

    assert level.paired_BP[0].tolist() == drawn.tolist()
    assert level.paired_BP[1, :4].tolist() == [0, 1, 2, -1]
    assert torch.equal(level.cosines_BUU[0], exact[drawn][:, drawn])
    assert torch.equal(level.cosines_BUU[1, :3, :3], exact[:3, :3])


def test_the_plan_names_the_bound_where_a_document_may_have_so_many_spans() -> None:
    small = one.tiny.tiny_cache()
    plans = [
        teacher_spec(
            TeacherSettings(model=str(small.teacher), template="none", dtype="float32", max_tokens=tokens), columns, ""
        )
        for tokens, columns in ((2048, [GEOMETRY.column]), (2049, [GEOMETRY.column]), (2049, ["entropy"]))
    ]

    assert ["geometry_spans" in plan for plan in plans] == [False, True, False]


def test_dsa_compares_max_spans_of_a_document_and_counts_the_others() -> None:
    made, batch = one.ready("mta", table=one.OTHER, max_spans=3)
    loss, counts = made.distiller.loss("mta"), made.distiller.counts(batch)
    (level, *_) = batch.levels
    _, _, valid = loss._pair(level, *loss._choose_spans(batch, level))
    assert valid.sum(1).tolist() == level.valid_BU.sum(1).clamp_max(3).tolist() != level.valid_BU.sum(1).tolist()
    found = one.terms_of(made.distiller, batch)
    assert float(found["unpaired@2:word"].total) == float(level.valid_BU.sum() - valid.sum())
    assert float(counts["mta.dsa@2:word"]) == pytest.approx(float(found["dsa@2:word"].count))
    again = gradients(made.distiller, [batch], counts)[0]
    assert again == gradients(made.distiller, [batch], counts)[0]

    whole, batch = one.ready("mta", table=one.OTHER)
    unbound = one.terms_of(whole.distiller, batch)
    assert float(unbound["unpaired@2:word"].total) == 0
    assert not torch.equal(unbound["dsa@2:word"].total, found["dsa@2:word"].total)


def in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every document counts as long, and blocks have a few rows."""
    monkeypatch.setattr(long_soft_dtw, "LONG_CELLS", 0)
    monkeypatch.setattr(dual_space, "BLOCK_SCORES", 300)
    monkeypatch.setattr(long_soft_dtw, "BLOCK_CELLS", 60)


DWA: list[dict[str, Any]] = [{}, {"band": "hard", "band_width": 2.0, "dtw_divergence": False}, {"band": "none"}]


@pytest.mark.parametrize("loss", ["dwa", "dskd_cma"])
def test_responses_aligned_block_by_block_are_those_aligned_at_once(
    loss: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, batch = one.ready(loss, table=one.OTHER)
    part, counts = made.distiller.loss(loss), made.distiller.counts(batch)
    for settings in DWA if loss == "dwa" else [{"correct_only": False}]:
        part.settings = part.settings.model_copy(update=settings)
        whole = gradients(made.distiller, [batch], counts)
        with monkeypatch.context() as patch:
            in_blocks(patch)

            found = gradients(made.distiller, [poisoned(batch)], counts)

        assert_same_step(found, whole)


def test_a_cost_that_is_no_number_gives_no_number_and_an_empty_side_gives_0() -> None:
    x, y = torch.randn(3, 5, 2, requires_grad=True), torch.randn(3, 4, 2)
    with torch.no_grad():
        x[1, 2, 0] = torch.nan
    lengths = torch.tensor([5, 5, 0]), torch.tensor([4, 3, 4])

    value = long_soft_dtw.cosine_soft_dtw(x, y, lengths, gamma=1.0, in_blocks=True)
    value[[0, 2]].sum().backward()

    expected = soft_dtw(cosine_cost(x[:1], y[:1]), lengths[0][:1], lengths[1][:1], gamma=1.0)
    torch.testing.assert_close(value[:1], expected)
    assert value[1].isnan()
    assert value[2] == 0
    assert x.grad[0].any()
    assert not x.grad[2].any()

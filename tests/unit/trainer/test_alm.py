"""ALM: chunks and their losses against loops, gradients, padding, cuts, degenerate input, and the wired loss."""

import math
import shutil
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import one_tokenizer as one
import slow_chunks as slow
import slow_losses as tools
import tiny_models as tiny
from xkd_pipeline.capture import stage
from xkd_pipeline.capture.capture import TeacherSettings
from xkd_pipeline.stages import align_stage
from xkd_pipeline.workers.contract import Workers
from xkd_schemas.signals import Signal
from xkd_schemas.tokens import predictors
from xkd_trainer.data.cache import Cache
from xkd_trainer.data.collate import batch_of
from xkd_trainer.losses.baselines.alm import AlmSettings, binarised_divergence, likelihood_matching, log_complement
from xkd_trainer.losses.ops.lazy_logits import LazyLogits, head_log_probabilities
from xkd_trainer.losses.pieces import shared_pieces
from xkd_trainer.training.prepare import set_up

KINDS = ("kl", "reverse_kl", "tv", "kl_limit")
SEEDS = st.integers(0, 2**31)


class Side:
    """One model's ragged random side: places with a prediction, their log-probabilities, and chunks of places."""

    def __init__(self, seed: int, chunks: list[int]) -> None:
        g = tools.generator(seed)
        self.places, self.values, self.ranges = [], [], []
        for count in chunks:
            place, ranges = 1, []
            for _ in range(count):
                size, gap = torch.randint(1, 4, (), generator=g).item(), torch.randint(0, 2, (), generator=g).item()
                ranges.append((place + gap, place + gap + size))
                place += gap + size
            kept = [p for p in range(1, place + 1) if torch.rand((), generator=g) > 0.1]
            self.places.append(torch.tensor(kept, dtype=torch.int64))
            self.values.append(-torch.rand(len(kept), generator=g, dtype=torch.float64) * 5)
            self.ranges.append(ranges)

    def log_p_of(self, row: int) -> dict[int, float]:
        return dict(zip(self.places[row].tolist(), self.values[row].tolist(), strict=True))

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        ranges = [torch.tensor(r, dtype=torch.int64).reshape(-1, 2) for r in self.ranges]
        predicted = tools.mask([len(p) for p in self.places])
        return tools.padded(self.values, math.nan), tools.padded(self.places, 2), predicted, tools.padded(ranges, 0)


def compared(student: Side, teacher: Side, **given: Any) -> Any:
    own, place, predicted, ranges = student.tensors()
    theirs, t_place, t_predicted, t_ranges = teacher.tensors()
    batch: Any = SimpleNamespace(
        predict_BN=place - 1, predict_valid_BN=predicted, span_student_BK2=ranges, target_BN=place,
        teacher_predict_BM=t_place - 1, teacher_predict_valid_BM=t_predicted, span_teacher_BK2=t_ranges,
        teacher_target_BM=t_place, span_valid_BK=tools.mask([len(r) for r in student.ranges]),
    )  # fmt: skip
    chunks = shared_pieces(batch, end_token=True, longest=math.inf)
    inside = own[chunks.student.inside_BN], theirs[chunks.teacher.inside_BN]
    return likelihood_matching(chunks, *inside, AlmSettings(**given))


@settings(max_examples=60, deadline=None)
@given(
    seed=SEEDS, kind=st.sampled_from(KINDS), tau=st.sampled_from([1.0, 3.0, 100.0]), scaled=st.booleans(),
    average=st.sampled_from(["chunks", "tokens"]),
)  # fmt: skip
def test_loss_equals_the_loops_over_chunks(seed: int, kind: str, tau: float, scaled: bool, average: str) -> None:
    chunks = tools.lengths(seed)
    student, teacher = Side(seed, chunks), Side(seed + 1, chunks)

    found = compared(student, teacher, divergence=kind, temperature=tau, scaled=scaled, average=average)

    documents = [
        (student.log_p_of(b), teacher.log_p_of(b), student.ranges[b], teacher.ranges[b]) for b in range(len(chunks))
    ]
    total, count = slow.alm(documents, divergence=kind, tau=tau, scaled=scaled, average=average)
    assert float(found.total) == pytest.approx(total, rel=1e-7, abs=1e-10)
    assert float(found.count) == count
    assert not found.count.requires_grad


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


@pytest.mark.usefixtures("earlier")
@pytest.mark.parametrize("average", ["chunks", "tokens"])
@torch.no_grad()
def test_the_wired_loss_of_an_earlier_cache_is_the_loops_over_single_documents(average: str) -> None:
    made, batch = one.ready("alm", table=one.OTHER, average=average)
    documents = []
    for row in one.ROWS:
        log_p, student = [], made.cache.students[row]
        for side, logits in zip((student, made.cache.teachers[row]), one.logits_of(made, row)[:2], strict=True):
            places, scores = predictors(side["targets"]) + 1, logits.log_softmax(-1)
            ids = side["token_ids"][places].tolist()
            log_p.append({p: float(z[y]) for p, z, y in zip(places.tolist(), scores, ids, strict=True)})
        spans = ([tuple(r) for r in student[name].tolist()] for name in ("student_spans", "teacher_spans"))
        documents.append((*log_p, *spans))

    total, count = slow.alm(documents, average=average)
    assert count > 20
    one.assert_term(one.terms_of(made.distiller, batch)["alm"], total, count)


@pytest.mark.parametrize("side", ["predict_valid_BN", "teacher_predict_valid_BM"])
def test_a_chunk_that_one_model_does_not_predict_whole_is_not_counted(side: str) -> None:
    made, batch = one.ready("alm", table=one.OTHER)
    valid = getattr(batch, side).clone()
    valid[0, 1] = False
    before = float(made.distiller.counts(batch)["alm.alm"])

    less = replace(batch, **{side: valid})

    counts, found = made.distiller.counts(less), one.terms_of(made.distiller, less)
    assert float(counts["alm.alm"]) == float(found["alm"].count) == before - 1


@pytest.fixture(scope="module")
def rounded(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The run of a cache whose teacher's last states are bfloat16 numbers, so that nothing is lost of them."""
    root, small = tmp_path_factory.mktemp("rounded"), tiny.tiny_cache()
    shutil.copytree(small.cache / "documents", root / "documents")
    settings = TeacherSettings(model=str(small.teacher), template="none", dtype="float32", batch_tokens=256)
    stage._loaded.clear()
    model = stage.teacher_of(settings)
    handle = model.base_model.norm.register_forward_hook(lambda _m, _i, states: states.bfloat16().float())
    wanted = [Signal("hidden_last"), Signal("target_logprob")]
    stage.make_teacher(root, "teacher", settings, lambda _: wanted, Workers(count=0))
    handle.remove()
    run = small.run(cache=str(root), loss="ce=0+alm", student__model=one.student(one.OTHER), student__name=one.OTHER)
    align_stage(run, Workers(count=0))
    return run


def loss_of(run: Any) -> tuple[set[str], float]:
    """Signals that are read, and the loss of one batch."""
    torch.manual_seed(0)
    made = set_up(run, one.OTHER)
    batch = batch_of(made.cache, one.ROWS, made.wanted)
    return {s.name for s in made.wanted}, float(made.distiller(batch, made.distiller.counts(batch), 0)[0])


@torch.no_grad()
def test_log_probabilities_give_the_loss_of_the_states_to_a_millionth(rounded: Any, request: Any) -> None:
    signals, found = loss_of(rounded)
    request.getfixturevalue("earlier")
    of_states, expected = loss_of(rounded)

    assert (signals, of_states) == ({"target_logprob"}, {"hidden_last"})
    assert found == pytest.approx(expected, rel=1e-6)
    assert expected > 0.01


@torch.no_grad()
def test_log_probabilities_need_no_head_of_the_teacher(rounded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Cache, "head", lambda _: pytest.fail("the head was read"))
    assert loss_of(rounded)[1] > 0

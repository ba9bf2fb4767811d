"""Rows of float32 logits against the equations in float64."""

import runpy
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numba
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from xkd_trainer.cpu_kernels import compiled
from xkd_trainer.losses.ops.divergence import Comparison, Kind, divergence
from xkd_trainer.losses.ops.softmax_rows import (
    PART_ELEMENTS,
    Scratch,
    cross_entropy_rows,
    divergence_rows,
    parts,
    scratch_for,
)
from xkd_trainer.models.measures import _prediction_stats, prediction_stats

T = TypeVar("T")
ROUNDING = 2.0**-23
HOW = Comparison(kind="forward_kl", temperature=2.0)
shapes = st.tuples(
    st.integers(1, 5),
    st.sampled_from([1, 2, 17, 63, 64, 65, 1023, 1024, 1025, 3079]),
    st.sampled_from([0.0, 1.0, 30.0, 1e4]),
)


def drawn(shape: tuple[int, int, float], seed: int) -> Tensor:
    """Float32 logits [P, V] of that spread about a mean that is far from 0."""
    rows, classes, spread = shape
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, classes, generator=generator) * spread + 50.0 * torch.randn(rows, 1, generator=generator)


def compared(
    student_PV: Tensor, teacher_PV: Tensor, how: Comparison = HOW, scratch: Scratch | None = None
) -> tuple[Tensor, Tensor]:
    """Losses [P] and their gradient [P, V]."""
    into_PV = torch.empty_like(student_PV)
    ones_P1 = torch.ones(len(student_PV), 1)
    return divergence_rows(student_PV, teacher_PV, ones_P1, how, scratch or Scratch(), into_PV), into_PV


def on_threads(numbers: Sequence[int], work: Callable[[], T]) -> list[T]:
    """What `work` returns on each number of threads."""
    before, found = torch.get_num_threads(), []
    for number in numbers:
        torch.set_num_threads(number)
        found.append(work())
    torch.set_num_threads(before)
    return found


@settings(max_examples=60, deadline=None)
@given(shape=shapes, seed=st.integers(0, 99), temperature=st.sampled_from([0.7, 1.0, 2.0, 3.0]))
def test_forward_kl_and_its_gradient_are_those_of_double_precision(
    shape: tuple[int, int, float], seed: int, temperature: float
) -> None:
    student_PV, teacher_PV = drawn(shape, seed), drawn(shape, seed + 100)
    factor_P1 = torch.linspace(0.0, 2.0, shape[0])[:, None]
    leaf_PV = student_PV.double().requires_grad_()
    wide_P = divergence(leaf_PV, teacher_PV.double(), "forward_kl", temperature=temperature)
    (wide_PV,) = torch.autograd.grad(wide_P, leaf_PV, grad_outputs=factor_P1[:, 0].double())
    # below the largest logit by this much at most: what a difference of logits is rounded at
    reach = float(max((x.amax(-1) - x.amin(-1)).max() for x in (student_PV, teacher_PV)) / temperature) + 8.0
    kept_PV, into_PV = teacher_PV.clone(), student_PV.clone()

    loss_P = divergence_rows(into_PV, teacher_PV, factor_P1, replace(HOW, temperature=temperature), Scratch(), into_PV)

    assert torch.equal(teacher_PV, kept_PV)
    torch.testing.assert_close(loss_P.double(), wide_P.detach(), rtol=0, atol=8 * ROUNDING * reach)
    torch.testing.assert_close(into_PV.double(), wide_PV, rtol=0, atol=8 * ROUNDING * reach / temperature)


@settings(max_examples=60, deadline=None)
@given(shape=shapes, seed=st.integers(0, 99))
def test_cross_entropy_and_its_gradient_are_those_of_double_precision(
    shape: tuple[int, int, float], seed: int
) -> None:
    logits_PV = drawn(shape, seed)
    target_P = torch.arange(shape[0]) * 7 % shape[1]
    leaf_PV = logits_PV.double().requires_grad_()
    wide_P = torch.nn.functional.cross_entropy(leaf_PV, target_P, reduction="none")
    (wide_PV,) = torch.autograd.grad(3.0 * wide_P.sum(), leaf_PV)
    reach = float((logits_PV.amax(-1) - logits_PV.amin(-1)).max()) + 8.0

    slope_PV = logits_PV.clone()
    loss_P = cross_entropy_rows(slope_PV, target_P, torch.tensor(3.0))

    torch.testing.assert_close(loss_P.double(), wide_P.detach(), rtol=0, atol=8 * ROUNDING * reach)
    torch.testing.assert_close(slope_PV.double(), wide_PV, rtol=0, atol=24 * ROUNDING * 8.0)


@settings(max_examples=60, deadline=None)
@given(shape=shapes, seed=st.integers(0, 99), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_what_a_prediction_says_is_that_of_double_precision(
    shape: tuple[int, int, float], seed: int, dtype: torch.dtype
) -> None:
    logits_PV = drawn(shape, seed).to(dtype)

    entropy_P, argmax_P, logsumexp_P = prediction_stats(logits_PV)

    exact = _prediction_stats(logits_PV.double())
    assert entropy_P.dtype == logsumexp_P.dtype == torch.float32
    torch.testing.assert_close(entropy_P.double(), exact[0], rtol=0, atol=8 * ROUNDING * 8.0)
    torch.testing.assert_close(logsumexp_P.double(), exact[2], rtol=2 * ROUNDING, atol=2 * ROUNDING)
    assert argmax_P.tolist() == [row.index(max(row)) for row in logits_PV.float().tolist()]


def test_zero_of_either_sign_is_the_largest_where_it_stands_first() -> None:
    assert prediction_stats(torch.tensor([[-1.0, -0.0, 0.0], [-1.0, 0.0, -0.0]]))[1].tolist() == [1, 1]


@pytest.mark.parametrize("target", [-1, 3])
def test_a_target_that_is_no_class_is_refused(target: int) -> None:
    with pytest.raises(IndexError, match="not one of the 3 classes"):
        cross_entropy_rows(torch.zeros(1, 3), torch.tensor([target]), torch.tensor(1.0))


@pytest.mark.parametrize("what", ["nan", "-nan", "inf"])
def test_numbers_that_are_none_are_not_hidden(what: str) -> None:
    logits_PV = torch.zeros(2, 3000)
    logits_PV[1, 2000] = float(what)

    entropy_P, _, _ = prediction_stats(logits_PV)
    kl_P, _ = compared(logits_PV, logits_PV.clone())
    loss_P = cross_entropy_rows(logits_PV.clone(), torch.tensor([0, 0]), torch.tensor(1.0))

    for found_P in (entropy_P, kl_P, loss_P):
        assert found_P.isfinite().tolist() == [True, False]


@settings(max_examples=20, deadline=None)
@given(shape=shapes, seed=st.integers(0, 99))
def test_threads_and_memory_used_before_change_no_bit(shape: tuple[int, int, float], seed: int) -> None:
    student_PV, teacher_PV = drawn(shape, seed), drawn(shape, seed + 100)
    scratch = Scratch()

    def work() -> tuple[Tensor, ...]:
        ce_PV = student_PV.clone()
        kl_P, into_PV = compared(student_PV, teacher_PV, scratch=scratch)
        ce_P = cross_entropy_rows(ce_PV, torch.zeros(shape[0], dtype=torch.int64), torch.tensor(1.0))
        compared(torch.ones(7, 2000), torch.zeros(7, 2000), scratch=scratch)
        return kl_P, into_PV, ce_P, ce_PV, *prediction_stats(student_PV)

    first, second = on_threads([1, 2], work)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_threads_at_work_at_the_same_time_have_memory_of_their_own() -> None:
    student_PV, teacher_PV = drawn((8, 200_000, 3.0), 0), drawn((8, 200_000, 3.0), 1)

    alone, *together = on_threads([1, *[4] * 8], lambda: compared(student_PV, teacher_PV))

    assert all(torch.equal(a, b) for other in together for a, b in zip(alone, other, strict=True))


def test_rows_of_a_wider_matrix_are_worked_as_they_lie() -> None:
    wide_PW, teacher_PV = drawn((5, 1030, 1.0), 0), drawn((5, 1025, 1.0), 1)
    student_PV, kept_PW = wide_PW[:, 3:1028], wide_PW.clone()
    whole_P, whole_PV = compared(student_PV.clone(), teacher_PV)

    kl_P = divergence_rows(student_PV, teacher_PV, torch.ones(5, 1), HOW, Scratch(), student_PV)

    assert torch.equal(kl_P, whole_P)
    assert torch.equal(student_PV, whole_PV)
    assert torch.equal(wide_PW[:, :3], kept_PW[:, :3])
    assert torch.equal(wide_PW[:, 1028:], kept_PW[:, 1028:])


@pytest.mark.parametrize("kind", ["reverse_kl", "adaptive_kl"])
def test_a_divergence_taken_in_steps_is_the_whole_one(kind: Kind) -> None:
    student_PV, teacher_PV = drawn((3, 40_000, 1.0), 0), drawn((3, 40_000, 1.0), 1)

    steps, whole = on_threads([1, 2], lambda: compared(student_PV, teacher_PV, replace(HOW, kind=kind)))

    torch.testing.assert_close(steps, whole)


@pytest.mark.parametrize("shape", [(0, 7), (1, 7), (40, 30_000), (3, 2_000_000)])
def test_parts_cover_every_row_once_and_stay_small(shape: tuple[int, int]) -> None:
    ranges = list(parts(torch.empty(shape)))

    assert [row for r in ranges for row in range(r.start, r.stop)] == list(range(shape[0]))
    assert all(r.stop - r.start == 1 or (r.stop - r.start) * shape[1] <= PART_ELEMENTS for r in ranges)
    if shape == (40, 30_000):
        assert len(ranges) == 2


def test_memory_is_used_again_by_a_later_pass_of_the_same_thread_and_no_other() -> None:
    like = torch.empty(0)
    with torch.inference_mode():
        first = scratch_for(like).of("a", (2, 3), like)
    first += 1.0  # memory made in that mode would refuse
    found: list[Tensor] = []
    thread = threading.Thread(target=lambda: found.append(scratch_for(like).of("a", (2, 3), like)))
    thread.start()
    thread.join()

    again = scratch_for(like).of("a", (3, 2), like)
    wide = scratch_for(like).of("a", (3, 2), like.double())

    assert again.data_ptr() == first.data_ptr() != found[0].data_ptr()
    assert wide.dtype == torch.float64


@pytest.mark.parametrize("kept", [True, False])
def test_compiled_kernels_are_kept_only_in_a_folder_that_somebody_names(
    kept: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    if not kept:
        monkeypatch.delenv("NUMBA_CACHE_DIR")
    source = runpy.run_path(compiled.__file__)

    source["series"](np.float32(0.1))

    assert bool([*tmp_path.rglob("*.nbc")]) is kept

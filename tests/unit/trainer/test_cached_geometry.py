"""Cosines from the cache instead of span vectors: what float16 loses, and spans that a student does not have.

Shape legend for this file
    B documents    K spans of the teacher's document    D width
"""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from xkd_pipeline.capture.capture import codec_error, encode_signals
from xkd_pipeline.capture.measure import _span_signal
from xkd_schemas.cache.manifest import Commit
from xkd_schemas.signals import Signal
from xkd_trainer.losses.mta import dsa
from xkd_trainer.losses.pairing import share_out
from xkd_trainer.models.architecture import Head
from xkd_trainer.models.measures import cosine_matrix, unpack_triangle

GEOMETRY = Signal("span_geometry", 3, "phrase")


def vectors_of(spans: int, seed: int, width: int = 16) -> Tensor:
    """Vectors that lean towards each other, as those of a layer do; the second is zero."""
    generator = torch.Generator().manual_seed(seed)
    vectors_KD = torch.randn(spans, width, generator=generator) + 1.5
    if spans > 1:
        vectors_KD[1] = 0.0
    return vectors_KD


def stored(vectors_KD: Tensor) -> Tensor:
    """The cosines after capture and reading, [K, K] float32."""
    packed = _span_signal(GEOMETRY, vectors_KD, torch.ones(len(vectors_KD)))[GEOMETRY.column]
    assert packed.dtype == np.float16
    return unpack_triangle(torch.from_numpy(packed.astype(np.float32)), len(vectors_KD))


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 40), st.integers(0, 10**6))
def test_stored_cosines_are_those_of_the_vectors_to_half_a_step_of_float16(spans: int, seed: int) -> None:
    vectors_KD = vectors_of(spans, seed)

    found_KK = stored(vectors_KD)

    assert found_KK.shape == (spans, spans)
    torch.testing.assert_close(found_KK, cosine_matrix(vectors_KD[None])[0], rtol=2**-11, atol=2**-24)
    assert torch.equal(found_KK, found_KK.mT)


@pytest.mark.parametrize("missing", [(), (0,), (2, 5, 6)])
def test_a_student_without_some_spans_compares_the_rows_and_columns_of_the_others(missing: tuple[int, ...]) -> None:
    teacher_KD, omega_K = vectors_of(9, 0), torch.rand(9, generator=torch.Generator().manual_seed(1))
    student_KD = torch.randn(9, 6, generator=torch.Generator().manual_seed(2))
    valid_K = torch.tensor([k not in missing for k in range(9)])
    chosen = [k for k in range(9) if k not in missing]

    def run(teacher_KK: Tensor, spans: list[int], valid_K: Tensor) -> tuple[Tensor, Tensor]:
        own_KD = student_KD[spans].clone().requires_grad_()
        weights_1K = share_out(omega_K[spans][None], valid_K[None])
        found = dsa(cosine_matrix(own_KD[None]), teacher_KK[None], weights_1K, valid_K[None])
        (found.total / found.count).backward()
        assert own_KD.grad is not None
        return (found.total / found.count).detach(), own_KD.grad

    whole, slope_KD = run(stored(teacher_KD), list(range(9)), valid_K)
    exact_KK = cosine_matrix(teacher_KD[chosen][None])[0]
    alone, slope_alone_KD = run(exact_KK, chosen, torch.ones(len(chosen), dtype=torch.bool))

    torch.testing.assert_close(whole, alone, rtol=2e-3, atol=1e-6)
    torch.testing.assert_close(slope_KD[chosen], slope_alone_KD, rtol=0, atol=2e-3 * float(slope_alone_KD.abs().max()))
    assert slope_KD[list(missing)].abs().sum() == 0


def test_what_rounding_lost_is_a_codec_error() -> None:
    captured: list[dict[str, Any]] = [
        _span_signal(GEOMETRY, vectors_of(spans, spans), torch.ones(spans)) for spans in (7, 1, 12)
    ]
    head = Head(weight_VD=torch.eye(16))

    _, sums = encode_signals(captured, [GEOMETRY], "bf16", head)
    commit = Commit.model_construct(sums=sums)

    lost = kept = 0.0
    for spans in (7, 1, 12):
        exact_KK, found_KK = cosine_matrix(vectors_of(spans, spans)[None])[0], stored(vectors_of(spans, spans))
        above = torch.triu(torch.ones(spans, spans, dtype=torch.bool), 1)
        lost += float((exact_KK - found_KK)[above].double().square().sum())
        kept += float(exact_KK[above].double().square().sum())
    assert codec_error([commit]) == {GEOMETRY.column: pytest.approx((lost / kept) ** 0.5, rel=1e-3)}
    assert 0 < (lost / kept) ** 0.5 < 2**-11

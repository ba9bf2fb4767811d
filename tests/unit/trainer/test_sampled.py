"""Forward KL from drawn classes: the formula, its gradient, and that it is the full one's on average.

Shape legend for this file
    N positions    D width    V classes    k drawn classes
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from xkd_pipeline.capture.measure import draw_classes, uniforms
from xkd_schemas.codecs import unpack_classes
from xkd_trainer.losses.baselines.kl import head_sampled_kl
from xkd_trainer.losses.ops.divergence import Comparison
from xkd_trainer.losses.ops.lazy_logits import LazyLogits
from xkd_trainer.losses.ops.shared_pass import head_divergence


def some(positions: int = 5, classes: int = 9, k: int = 3, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Student logits, ids, weights that add up to 1, entropies; float64."""
    generator = torch.Generator().manual_seed(seed + classes + k)
    logits_NV = torch.randn(positions, classes, generator=generator, dtype=torch.float64)
    ids_Nk = torch.rand(positions, classes, generator=generator).argsort(-1)[:, :k].sort(-1).values
    weights_Nk = torch.rand(positions, k, generator=generator, dtype=torch.float64)
    entropy_N = torch.rand(positions, generator=generator, dtype=torch.float64)
    return logits_NV, ids_Nk, weights_Nk / weights_Nk.sum(-1, keepdim=True), entropy_N


def draws_of(teacher_NV: Tensor, seed: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Drawn classes, their weights, and the entropies of a teacher with these logits."""
    random_N2 = torch.from_numpy(uniforms(np.array([seed], np.int32), len(teacher_NV)))
    ids_Nk, weights_Nk = map(torch.from_numpy, unpack_classes(draw_classes(teacher_NV, random_N2, k).entries_Nk))
    return ids_Nk, weights_Nk, torch.distributions.Categorical(logits=teacher_NV).entropy()


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**31), positions=st.integers(0, 6), classes=st.integers(2, 9), k=st.integers(1, 9)
)  # fmt: skip
def test_it_is_the_sum_over_drawn_classes(seed: int, positions: int, classes: int, k: int) -> None:
    logits_NV, ids_Nk, weights_Nk, entropy_N = some(positions, classes, min(k, classes), seed)

    slow = []
    for logits, ids, weights, entropy in zip(
        logits_NV.tolist(), ids_Nk.tolist(), weights_Nk.tolist(), entropy_N.tolist(), strict=True
    ):
        total = math.fsum(math.exp(z) for z in logits)
        slow.append(-math.fsum(w * math.log(math.exp(logits[i]) / total) for i, w in zip(ids, weights, strict=True)))
        slow[-1] -= entropy

    student = LazyLogits(hidden=logits_NV, weight=torch.eye(classes, dtype=torch.float64))
    summed = head_sampled_kl(student, ids_Nk, weights_Nk, entropy_N)
    assert float(summed) == pytest.approx(math.fsum(slow), rel=1e-10, abs=1e-10)


@pytest.mark.parametrize("k", [1, 4, 12])
def test_value_and_gradient_are_those_of_the_full_kl_on_average(k: int) -> None:
    generator = torch.Generator().manual_seed(k)
    teacher_NV, weight_VD = 2 * torch.randn(6, 40, generator=generator), torch.randn(40, 8, generator=generator)
    hidden_ND = torch.randn(6, 8, generator=generator, requires_grad=True)
    student = LazyLogits(hidden=hidden_ND, weight=weight_VD)
    teacher = LazyLogits(hidden=teacher_NV, weight=torch.eye(40))
    full = head_divergence(student, teacher, None, Comparison(kind="forward_kl", temperature=1.0))
    (expected_ND,) = torch.autograd.grad(full, hidden_ND)

    values, slopes = [], []
    for seed in range(300):
        value = head_sampled_kl(student, *draws_of(teacher_NV, seed, k))
        values.append(value.detach())
        slopes.append(torch.autograd.grad(value, hidden_ND)[0])

    for found, expected in ((torch.stack(values), full.detach()), (torch.stack(slopes), expected_ND)):
        standard_error = found.std(0) / 300**0.5
        assert ((found.mean(0) - expected).abs() < 5 * standard_error + 1e-5).all()
        assert (found.std(0) > 0).all()
    gap, noise = torch.stack(slopes).mean(0) - expected_ND, torch.stack(slopes)[0] - expected_ND
    assert float(gap.norm()) < 0.2 * float(noise.norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_it_computes_in_float32_and_far_classes_stay_finite(dtype: torch.dtype) -> None:
    logits_NV = torch.tensor([[0.0, -300.0, 300.0]], dtype=dtype, requires_grad=True)
    student = LazyLogits(hidden=logits_NV, weight=torch.eye(3, dtype=dtype))

    total = head_sampled_kl(student, torch.tensor([[0, 1]]), torch.tensor([[0.5, 0.5]]), torch.tensor([0.1]))
    total.backward()

    assert total.dtype == torch.float32
    assert float(total.detach()) == pytest.approx(450 - 0.1, rel=1e-2)
    assert logits_NV.grad is not None
    assert logits_NV.grad.tolist() == [[-0.5, -0.5, 1.0]]

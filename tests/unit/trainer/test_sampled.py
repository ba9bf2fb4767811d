"""Forward KL from drawn classes: the formula, its gradient, and that it is the full one's on average.

Shape legend for this file
    N positions    D width    V classes    k drawn classes
"""

import numpy as np
import pytest
import torch
from torch import Tensor

from xkd_pipeline.capture.measure import draw_classes, uniforms
from xkd_schemas.codecs import unpack_classes
from xkd_trainer.losses.baselines.kl import head_sampled_kl
from xkd_trainer.losses.ops.divergence import Comparison
from xkd_trainer.losses.ops.lazy_logits import LazyLogits
from xkd_trainer.losses.ops.shared_pass import head_divergence


def draws_of(teacher_NV: Tensor, seed: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Drawn classes, their weights, and the entropies of a teacher with these logits."""
    random_N2 = torch.from_numpy(uniforms(np.array([seed], np.int32), len(teacher_NV)))
    ids_Nk, weights_Nk = map(torch.from_numpy, unpack_classes(draw_classes(teacher_NV, random_N2, k).entries_Nk))
    return ids_Nk, weights_Nk, torch.distributions.Categorical(logits=teacher_NV).entropy()


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

"""One optimizer step's loss and gradients, of as many micro-batches as it is cut into."""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from poison import poisoned
from xkd_trainer.data.batch import Batch, blank
from xkd_trainer.models.padding import plan_rows
from xkd_trainer.training.distiller import Distiller

Step = tuple[float, Mapping[str, Tensor]]
"""Loss, and the gradient of each parameter."""


def gradients(
    distiller: Distiller, batches: Sequence[Batch], counts: Mapping[str, Tensor]
) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients at step 0, summed over micro-batches; zeros for a parameter that nothing reaches."""
    distiller.zero_grad(set_to_none=True)
    total = 0.0
    for batch in batches:
        loss, _ = distiller(batch, counts, 0)
        loss.backward()
        total += float(loss.detach())
    return total, {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in distiller.named_parameters()}


def gradients_of_packed(
    distiller: Distiller, batch: Batch, counts: Mapping[str, Tensor]
) -> tuple[float, dict[str, Tensor]]:
    """The same where the student reads several documents in one row."""
    distiller._reads["packing"] = True
    try:
        assert plan_rows(batch.student_valid_BS) is not None
        return gradients(distiller, [batch], counts)
    finally:
        distiller._reads["packing"] = False


@torch.no_grad()
def widen(owner: Any, name: str) -> None:
    """Five more rows, of large numbers, below the weight [V, D] of that name: classes that no token is."""
    weight_VD = getattr(owner, name)
    rows = 9.0 * torch.randn(5, weight_VD.shape[1], generator=torch.Generator().manual_seed(0)).to(weight_VD)
    wider = torch.cat([weight_VD, rows])
    setattr(owner, name, torch.nn.Parameter(wider) if isinstance(weight_VD, torch.nn.Parameter) else wider)


def assert_same_step(found: Step, expected: Step, least: float = 1.0) -> None:
    """Within rounding of each gradient's largest number, or of `least`."""
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert found[1].keys() == expected[1].keys()
    for name, slope in expected[1].items():
        scale = max(least, float(slope.abs().max()))
        torch.testing.assert_close(found[1][name] / scale, slope / scale, rtol=1e-4, atol=1e-5, msg=name)


def assert_padding_and_cuts_change_nothing(
    distiller: Distiller, whole: Batch, parts: Sequence[Batch], counts: Mapping[str, Tensor]
) -> None:
    """What stands in padding changes no bit; `parts` of the batch, and one without documents, add up to it."""
    clean, slopes = gradients(distiller, [whole], counts)
    assert sum(float(slope.abs().sum()) for slope in slopes.values()) > 0

    dirty, others = gradients(distiller, [poisoned(whole)], counts)
    assert dirty == clean
    for name, slope in slopes.items():
        assert torch.equal(slope, others[name]), name

    assert_same_step(gradients(distiller, [*parts, blank(whole)], counts), (clean, slopes))
    assert_same_step(gradients_of_packed(distiller, whole, counts), (clean, slopes))

    nothing, none = gradients(distiller, [blank(whole)], counts)
    assert nothing == 0.0
    assert all(float(slope.abs().max()) == 0.0 for slope in none.values())

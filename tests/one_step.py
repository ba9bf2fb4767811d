"""One optimizer step's loss and gradients, of as many micro-batches as it is cut into."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from xkd_trainer.batch import Batch
from xkd_trainer.distiller import Distiller


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

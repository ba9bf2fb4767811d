"""Cross-entropy with the text's own next token: plain fine-tuning, and a part of most distillation losses.

Shape legend for this file
    N positions    V classes
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from xkd_trainer.losses.term import LossTerm, at_least_float32, term

IGNORED = -100


def cross_entropy(logits_NV: Tensor, target_N: Tensor, valid_N: Tensor) -> LossTerm:
    """-log p(target), in nats, summed over the valid positions; the count is their number.

    Four classes alike cost log 4:

    >>> cross_entropy(torch.zeros(2, 4), torch.tensor([3, -100]), torch.tensor([True, False]))
    LossTerm(total=tensor(1.3863), count=tensor(1.))

    Args:
        logits_NV: Any float dtype; row n predicts target n (the caller has shifted them).
        target_N: int64; read only where valid.
        valid_N: Bool.

    Raises:
        IndexError: a valid target is not in [0, V) (on a GPU: a device assertion).
    """
    logits_NV = torch.where(valid_N.unsqueeze(-1), at_least_float32(logits_NV), 0.0)
    target_N = torch.where(valid_N, target_N, IGNORED)
    total = F.cross_entropy(logits_NV, target_N, ignore_index=IGNORED, reduction="sum")
    return term(total, valid_N.sum())

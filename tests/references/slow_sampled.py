"""The estimate of `head_sampled_kl` at each position, from all logits at once.

Shape legend for this file
    N positions    V classes    k drawn classes
"""

from torch import Tensor

from xkd_trainer.models.measures import at_least_float32


def sampled_kl(student_logits_NV: Tensor, ids_Nk: Tensor, weights_Nk: Tensor, entropy_N: Tensor) -> Tensor:
    """An unbiased estimate of KL(p || q) at each position, in nats.

    A uniform student over four classes and a teacher of entropy 0.6 of which classes 0 and 2 were drawn:
    log 4 - 0.6 = 0.7863.

    >>> import torch
    >>> ids, weights = torch.tensor([[0, 2]]), torch.tensor([[0.8, 0.2]])
    >>> sampled_kl(torch.zeros(1, 4), ids, weights, torch.tensor([0.6]))
    tensor([0.7863])

    Args:
        student_logits_NV: Any float dtype, finite; computed in float32, or float64 if it is.
        ids_Nk: int64 classes from 0 to V - 1.
        weights_Nk: What each stands for, adding up to 1 at a position; constants.
        entropy_N: The teacher's entropy in nats; a constant.

    Returns:
        [N]; below 0 where the drawn classes suit the student better than all of them do.
    """
    log_q_NV = at_least_float32(student_logits_NV).log_softmax(-1)
    weights_Nk = weights_Nk.detach().to(log_q_NV.dtype)
    return -(weights_Nk * log_q_NV.gather(-1, ids_Nk)).sum(-1) - entropy_N.detach().to(log_q_NV.dtype)

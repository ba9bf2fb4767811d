"""Forward KL from a few drawn classes of the teacher, whose gradient is that of the full one on average.

KL(p || q) = sum p log p - sum p log q. Of the teacher p the second sum, and all of the gradient by the student q, need
nothing but an unbiased estimate of p: sum of w over drawn classes instead of p (random-sampling distillation, arXiv
2503.16870). The first sum is the teacher's entropy with its sign turned, which is stored exactly.

Shape legend for this file
    N positions    D width of the states    V classes    k drawn classes    C positions of one chunk
"""

from torch import Tensor

from xkd_trainer.losses.chunked import chunked_sum
from xkd_trainer.losses.lazy_logits import LazyLogits
from xkd_trainer.losses.term import at_least_float32


def head_sampled_kl(student: LazyLogits, ids_Nk: Tensor, weights_Nk: Tensor, entropy_N: Tensor) -> Tensor:
    """Sum over positions of an unbiased estimate of KL(p || q), in nats, chunk by chunk.

    A uniform student over four classes and a teacher of entropy 0.6 of which classes 0 and 2 were drawn:
    log 4 - 0.6 = 0.7863.

    >>> import torch
    >>> student = LazyLogits(hidden=torch.ones(1, 1), weight=torch.zeros(4, 1))
    >>> head_sampled_kl(student, torch.tensor([[0, 2]]), torch.tensor([[0.8, 0.2]]), torch.tensor([0.6]))
    tensor(0.7863)

    Args:
        student: States [N, D].
        ids_Nk: int64 classes from 0 to V - 1.
        weights_Nk: What each stands for, adding up to 1 at a position; constants.
        entropy_N: The teacher's entropy in nats; a constant.

    Returns:
        Scalar with gradient by the student's states, and by its head where that requires one. 0 where N is 0;
        below 0 where the drawn classes suit the student better than all of them do.
    """
    constant_Nk = at_least_float32(weights_Nk.detach())

    def sampled(rows: slice, logits_CV: Tensor) -> Tensor:
        log_q_Ck = logits_CV.log_softmax(-1).gather(-1, ids_Nk[rows])
        return -(constant_Nk[rows] * log_q_Ck).sum(-1) - entropy_N[rows].detach()

    return chunked_sum(sampled, student)

"""Sums over tokens of losses between full-vocabulary logits, without holding the logits.

A vocabulary of 152,000 classes is 600 KB of logits a token. Here the caller hands over states and heads; logits are
made for a few tokens at a time, and the gradient of that chunk is taken at once, in the forward pass. So memory does
not grow with the number of tokens, and nothing is computed twice. Nothing here knows models, batches or papers.

Shape legend for this file
    N positions    D width of the states    V classes    C positions of one chunk
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from xkd_trainer.losses.ops.chunked import chunked
from xkd_trainer.losses.ops.lazy_logits import LazyLogits as LazyLogits
from xkd_trainer.losses.ops.lazy_logits import rows_at_once
from xkd_trainer.losses.ops.shared_pass import PassRequest, joint_sum
from xkd_trainer.losses.ops.softmax_rows import Comparison as Comparison
from xkd_trainer.losses.ops.term import at_least_float32


def head_argmax(logits: LazyLogits, valid: Tensor) -> Tensor:
    """The class of the largest logit at valid positions, the first of equals; -1 elsewhere.

    >>> logits = LazyLogits(hidden=torch.eye(2), weight=torch.eye(2))
    >>> head_argmax(logits, torch.tensor([False, True]))
    tensor([-1,  1])

    Args:
        logits: States [..., D].
        valid: Bool [...]; the states elsewhere are not read.

    Returns:
        int64, of the shape of `valid`, without gradient.
    """
    out = torch.full(valid.shape, -1, dtype=torch.int64, device=valid.device)
    out[valid] = chunked(lambda _, logits_CV: logits_CV.argmax(-1), logits.detached().at(valid))
    return out


def head_log_probabilities(logits: LazyLogits, target_N: Tensor) -> Tensor:
    """log p(target) at each position, which a loss may combine as it likes.

    >>> logits = LazyLogits(hidden=torch.zeros(2, 3), weight=torch.zeros(4, 3))
    >>> head_log_probabilities(logits, torch.tensor([0, 3]))
    tensor([-1.3863, -1.3863])

    Args:
        logits: States [N, D].
        target_N: int64 classes, 0 to V - 1.

    Returns:
        [N], at most 0, float32, or float64 where the head is; gradient as of `chunked`.
    """
    return chunked(lambda rows, logits_CV: -F.cross_entropy(logits_CV, target_N[rows], reduction="none"), logits)


def head_cross_entropy(logits: LazyLogits, target_N: Tensor) -> Tensor:
    """Sum over positions of -log p(target).

    >>> logits = LazyLogits(hidden=torch.zeros(2, 3), weight=torch.zeros(4, 3))
    >>> head_cross_entropy(logits, torch.tensor([0, 3]))
    tensor(2.7726)

    Args:
        logits: States [N, D].
        target_N: int64 classes, 0 to V - 1.

    Returns:
        Scalar with gradient by states, and by weight and bias where they require one. 0 where N is 0.
    """

    everywhere = torch.ones_like(target_N, dtype=torch.bool)
    return joint_sum(logits, target_N, everywhere, [PassRequest()], _one(logits), rows_at_once(logits))[0]


def head_divergence(student: LazyLogits, teacher: LazyLogits, weights_N: Tensor | None, how: Comparison) -> Tensor:
    """Sum over positions of weight times divergence between teacher and student.

    A student that is uniform over two classes against a teacher sure of one to three parts in four, weight 2:
    2 (0.75 log 1.5 + 0.25 log 0.5) = 0.2616.

    >>> one = torch.ones(1, 1)
    >>> student = LazyLogits(hidden=one, weight=torch.zeros(2, 1))
    >>> teacher = LazyLogits(hidden=one, weight=torch.tensor([[1.0986123], [0.0]]))
    >>> head_divergence(student, teacher, torch.tensor([2.0]), Comparison(kind="forward_kl", temperature=1.0))
    tensor(0.2616)

    Args:
        student: States [N, D].
        teacher: States [N, E] with a head over the same V classes. A constant: detached here.
        weights_N: A constant, detached here; None is 1 everywhere.
        how: Kind, temperature and the rest.

    Returns:
        Scalar with gradient by the student's states, and by its head where that requires one. 0 where N is 0.
    """
    weights_N1 = None if weights_N is None else weights_N.detach()[:, None]
    wish = PassRequest(other=teacher.detached(), how=how, weights_M1=weights_N1)
    nowhere_N = torch.zeros(student.hidden.shape[0], dtype=torch.int64, device=student.hidden.device)
    return joint_sum(student, nowhere_N, nowhere_N == 0, [wish], _one(student), rows_at_once(student))[0]


def _one(logits: LazyLogits) -> Tensor:
    """The factor of a single sum, [1]."""
    return at_least_float32(logits.weight.detach().new_ones(1))

"""Cross-entropies and divergences of a few rows of logits, with their gradients by the logits.

float32 on a CPU is worked by the kernels of `cpu_kernels`, where there is one for the divergence; everything else by
torch. Every exponential is taken once, of numbers at most 0. Products are summed in two passes, one in place: a
batched product of single rows takes ten times as long.

Shape legend for this file
    C positions of a chunk    P positions of a part of it    V classes
"""

import math
import threading
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from xkd_trainer.losses.ops.divergence import Comparison, divergence
from xkd_trainer.models.measures import has_cpu_kernels

PART_ELEMENTS = 1 << 20
"""Numbers of a chunk that softmaxes and their like are taken of at a time, or one row; products take the whole chunk.

A call of a kernel costs some 30 microseconds where its numbers have filled the caches: with parts of 2**16, that is
half the time of a row of 49,000.
"""

STEP_ELEMENTS = 1 << 16
"""The same for what one thread does in many of torch's steps: few enough to stay in the cache between them."""

PARTS_OFF_CPU = 8
"""Parts of a chunk where every piece is a kernel's launch: few, but fewer temporaries than the whole chunk."""


class Scratch:
    """Memory for temporaries, used again for the next: on a CPU, fresh pages cost more than what is done in them."""

    def __init__(self) -> None:
        self._kept: dict[object, Tensor] = {}

    def of(self, name: object, shape: Sequence[int], like: Tensor) -> Tensor:
        """Numbers that are not set, in the dtype and on the device of `like`; those of the same name are overwritten.

        >>> scratch, like = Scratch(), torch.empty(0)
        >>> scratch.of("a", (2, 3), like).data_ptr() == scratch.of("a", (2, 2), like).data_ptr()
        True
        """
        size = math.prod(shape)
        kept = self._kept.get(name)
        if kept is None or kept.numel() < size or (kept.dtype, kept.device) != (like.dtype, like.device):
            with torch.inference_mode(mode=False):  # what is made in that mode cannot be written to outside it
                kept = self._kept[name] = like.new_empty(size)
        return kept[:size].view(*shape)


_kept = threading.local()


def scratch_for(logits: Tensor) -> Scratch:
    """Memory for one pass over logits on that device, which must not be asked for again before the pass is done.

    On a CPU this thread's own, which stays for the next step: a chunk or two of logits, that is up to some 300 MB.
    Other devices have an allocator that keeps memory.
    """
    if logits.device.type != "cpu":
        return Scratch()
    if not hasattr(_kept, "scratch"):
        _kept.scratch = Scratch()
    kept: Scratch = _kept.scratch
    return kept


def slices(first: int, last: int, size: int) -> Iterator[slice]:
    """The range in pieces of at most `size`.

    >>> list(slices(3, 8, 2))
    [slice(3, 5, None), slice(5, 7, None), slice(7, 8, None)]
    """
    for start in range(first, last, size):
        yield slice(start, min(start + size, last))


def parts(logits_CV: Tensor) -> Iterator[slice]:
    """Ranges of the rows of a chunk that are worked on at a time."""
    rows, classes = logits_CV.shape
    on_cpu = logits_CV.device.type == "cpu"
    size = PART_ELEMENTS // max(1, classes) if on_cpu else math.ceil(rows / PARTS_OFF_CPU)
    return slices(0, rows, max(1, size))


def _has_kernel(*logits_PV: Tensor) -> bool:
    plain = all(x.device.type == "cpu" and x.dtype == torch.float32 and x.stride(-1) == 1 for x in logits_PV)
    return plain and has_cpu_kernels()


def cross_entropy_rows(logits_PV: Tensor, target_P: Tensor, factor: Tensor) -> Tensor:
    """-log p(target) of each row; the logits are overwritten by `factor` (a scalar) times its gradient.

    >>> logits = torch.zeros(1, 4)
    >>> cross_entropy_rows(logits, torch.tensor([1]), torch.tensor(4.0)), logits
    (tensor([1.3863]), tensor([[ 1., -3.,  1.,  1.]]))
    """
    if _has_kernel(logits_PV):
        from xkd_trainer.cpu_kernels.softmax_rows import cross_entropy

        threads = torch.get_num_threads()
        return torch.from_numpy(cross_entropy(logits_PV.numpy(), target_P.numpy(), float(factor), threads))
    target_P1 = target_P[:, None]
    logits_PV -= logits_PV.amax(-1, keepdim=True)
    below_P1 = logits_PV.gather(-1, target_P1)
    sum_P1 = logits_PV.exp_().sum(-1, keepdim=True)
    logits_PV *= factor / sum_P1
    logits_PV.scatter_add_(-1, target_P1, -factor.expand(target_P1.shape))
    return (sum_P1.log() - below_P1)[:, 0]


def divergence_rows(
    student_PV: Tensor, teacher_PV: Tensor, factor_P1: Tensor, how: Comparison, scratch: Scratch, into_PV: Tensor
) -> Tensor:
    """The divergence of each row; `factor` times its gradient by the student's logits goes to `into`.

    `into` may be the student's logits themselves; the teacher's are left as they are. Takes numbers 0 to 2 of
    `scratch`.

    >>> student, teacher, one = torch.zeros(1, 2), torch.tensor([[1.0986123, 0.0]]), torch.ones(1, 1)
    >>> divergence_rows(student, teacher, one, Comparison(kind="forward_kl", temperature=1.0), Scratch(), student)
    tensor([0.1308])
    >>> student
    tensor([[-0.2500,  0.2500]])
    """
    if how.kind == "forward_kl":
        return _forward_kl_rows(student_PV, teacher_PV, factor_P1 / how.temperature, how.temperature, scratch, into_PV)
    rows, classes = student_PV.shape
    alone = student_PV.device.type == "cpu" and torch.get_num_threads() == 1
    losses = [factor_P1[:0, 0]]
    for r in slices(0, rows, max(1, STEP_ELEMENTS // max(1, classes) if alone else rows)):
        leaf_PV = student_PV[r].detach().requires_grad_()
        with torch.enable_grad():
            loss_P = divergence(leaf_PV, teacher_PV[r], how.kind, temperature=how.temperature, knobs=how.knobs)
            (slope_PV,) = torch.autograd.grad(loss_P, leaf_PV, grad_outputs=factor_P1[r, 0].to(loss_P.dtype))
        into_PV[r] = slope_PV
        losses.append(loss_P.detach())
    return torch.cat(losses)


def _forward_kl_rows(
    student_PV: Tensor, teacher_PV: Tensor, share_P1: Tensor, temperature: float, scratch: Scratch, into_PV: Tensor
) -> Tensor:
    """KL(p || q) as sum p (log p - log q); its gradient is (q - p) / temperature."""
    if _has_kernel(student_PV, teacher_PV, into_PV):
        from xkd_trainer.cpu_kernels.softmax_rows import forward_kl

        rows, classes = student_PV.shape
        odds_P2V = scratch.of(0, (rows, 2, classes), student_PV)
        loss_P = forward_kl(
            student_PV.numpy(), teacher_PV.numpy(), share_P1[:, 0].numpy(), temperature,
            into_PV=into_PV.numpy(), odds_P2V=odds_P2V.numpy(), threads=torch.get_num_threads(),
        )  # fmt: skip
        return torch.from_numpy(loss_P)
    q_PV, gap_PV, p_PV = (scratch.of(number, student_PV.shape, student_PV) for number in range(3))
    torch.sub(student_PV, student_PV.amax(-1, keepdim=True), out=q_PV).mul_(1.0 / temperature)
    torch.sub(teacher_PV, teacher_PV.amax(-1, keepdim=True), out=gap_PV).mul_(1.0 / temperature)
    torch.exp(gap_PV, out=p_PV)
    gap_PV -= q_PV
    p_sum_P1, q_sum_P1 = p_PV.sum(-1, keepdim=True), q_PV.exp_().sum(-1, keepdim=True)
    loss_P1 = gap_PV.mul_(p_PV).sum(-1, keepdim=True) / p_sum_P1 + q_sum_P1.log() - p_sum_P1.log()
    torch.mul(q_PV, share_P1 / q_sum_P1, out=into_PV).addcmul_(p_PV, share_P1 / p_sum_P1, value=-1.0)
    return loss_P1[:, 0]

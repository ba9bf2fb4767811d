"""Memory of a training process, before any weight is loaded.

The student is made of torch's fake tensors, which have sizes and no numbers. One forward pass of its micro-batch
counts what autograd keeps, each storage once, with gradient checkpointing, dtypes and adapter as the run has them. The
other parts are sums of sizes; docs/training.md has the formulas.
"""

import contextlib
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel, masking_utils

from xkd_schemas.config import RunConfig
from xkd_trainer.data.cache import Cache
from xkd_trainer.data.collate import batch_of
from xkd_trainer.data.sampler import AHEAD
from xkd_trainer.losses.ops.lazy_logits import CHUNK_BYTES, WIDER, LazyLogits
from xkd_trainer.losses.ops.shared_pass import PASS_BYTES, head_cross_entropy
from xkd_trainer.models.architecture import Head, backbone
from xkd_trainer.models.compute_dtype import dtype_named, this_device
from xkd_trainer.models.lora import trained
from xkd_trainer.training.prepare import build_losses, check_student_settings, open_run, student_of

PER_WEIGHT: Final = {"adamw": 2.0, "adamw_fused": 2.0, "adamw_8bit": 0.5}
"""Optimizer state of each trained number, in numbers of its own size; in bytes of float32."""


def plan_training(run: RunConfig, student_table: str = "") -> dict[str, Any]:
    """Parameters, and bytes of each part of a process's memory; refuses what training would refuse of names and cache.

    Returns:
        parameters and trained (of the student), projectors, documents and tokens of the largest micro-batch, device,
        `bytes` by part, and their sum as total.
    """
    check_student_settings(run)
    opened, device = open_run(run, student_table), this_device()
    _load_kernels()
    cache = opened.cache
    step_size = min(run.train.batch_size, len(cache.rows(0, run.train.seed)))
    share = math.ceil(step_size / int(os.environ.get("WORLD_SIZE", "1")))
    rows, longest = _longest(cache, share)
    fit = max(1, run.train.batch_tokens // longest) if run.train.batch_tokens else share
    documents = min(run.train.micro_batch_size or share, share, fit)
    with torch.device("meta"):
        student = student_of(run, opened.tokenizer, empty=True).train()
    read = dict[Any, int]()
    losses, *_ = build_losses(
        run, cache, student, opened.tokenizer, lambda one: {
            "teacher_head": lambda: _teacher_head(one, read, device),
            "teacher_embeddings": lambda: _teacher_matrix(one, read, "embeddings", device),
        },
    )  # fmt: skip
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device(device), _one_document_a_row():
        student = student.to_empty(device=device)
        student.tie_weights()
        kept = _activations(student, documents, longest, run.train.mixed_precision)
    projectors = [*trained(nn.ModuleDict(losses)).values()]
    learnt = [*trained(student).values(), *projectors]
    head_Vd = student.get_output_embeddings().weight
    step = _tensor_bytes(batch_of(cache, rows, opened.wanted))
    heads = [one.sizes.vocab_size for one, name in read if name == "head"]
    parts = {
        "process": _resident(),
        "weights": _size(student.parameters()) + _size(projectors),
        "teacher's head and embeddings": sum(read.values()),
        "gradients": _size(learnt),
        "optimizer": sum(_state_bytes(run.train.optimizer, parameter) for parameter in learnt),
        "activations": kept,
        "logits": _logits(head_Vd, documents * longest, max(heads, default=0)),
        "batches read ahead": (AHEAD + 2) * step,
    }
    return {
        "parameters": sum(p.numel() for p in student.parameters()),
        "trained": sum(p.numel() for p in trained(student).values()),
        "projectors": sum(p.numel() for p in projectors),
        "documents": documents, "tokens": longest, "device": device, "bytes": parts, "total": sum(parts.values()),
    }  # fmt: skip


def describe_plan(plan: Mapping[str, Any]) -> list[str]:
    """The same for people."""
    trained, parts = plan["trained"], plan["bytes"]
    return [
        f"parameters: {plan['parameters']:,}; trained: {trained:,}, and {plan['projectors']:,} of projectors",
        f"largest micro-batch: {plan['documents']} documents of {plan['tokens']} tokens, on {plan['device']}",
        *(f"{name}: {_in_mib(size)}" for name, size in parts.items()),
        f"peak of one process, an estimate: {_in_mib(plan['total'])}",
    ]


def _in_mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"


def _activations(student: PreTrainedModel, documents: int, tokens: int, precision: str) -> int:
    """Bytes that autograd keeps of a forward pass, but for the parameters, and of the states that come out."""
    own = {p.untyped_storage()._cdata for p in student.parameters()}
    kept: dict[int, Any] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    ids_BL = torch.zeros(documents, tokens, dtype=torch.int64)
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast(ids_BL.device.type, dtype=half, enabled=half is not None),
    ):
        states_BLD = backbone(student)(input_ids=ids_BL, use_cache=False).last_hidden_state
    return sum(int(storage.nbytes()) for storage in kept.values()) + 4 * int(states_BLD.numel())


@contextlib.contextmanager
def _one_document_a_row() -> Iterator[None]:
    """Without the mask that transformers makes for packed rows where it cannot see that there are none."""
    find = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda *_, **__: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = find


def _teacher_matrix(cache: Cache, read: dict[Any, int], name: str, device: str) -> Tensor:
    sizes, dtype = cache.sizes, dtype_named(cache.teachers.manifest.spec["dtype"])
    matrix_VD = torch.empty(sizes.vocab_size, sizes.hidden_size, dtype=dtype, device="meta")
    wide = 4 if name == "head" and device == "cpu" else dtype.itemsize  # a CPU's head is float32
    read[cache, name] = matrix_VD.numel() * wide
    return matrix_VD


def _teacher_head(cache: Cache, read: dict[Any, int], device: str) -> Head:
    sizes = cache.sizes
    return Head(weight_VD=_teacher_matrix(cache, read, "head", device), scale=sizes.logit_scale, softcap=sizes.softcap)


def _longest(cache: Cache, count: int) -> tuple[list[int], int]:
    """The rows with the most student tokens, and the most that one has."""
    lengths = cache.lengths(cache.usable)
    order = np.argsort(-lengths, kind="stable")[:count]
    return cache.usable[order].tolist(), int(lengths[order[0]])


def _state_bytes(optimizer: str, parameter: Tensor) -> int:
    """Of one parameter: two numbers a weight, a row and a column of it, or two bytes a weight."""
    if optimizer in PER_WEIGHT:
        return int(PER_WEIGHT[optimizer] * parameter.numel() * (4 if "8bit" in optimizer else parameter.itemsize))
    shape = parameter.shape
    return parameter.itemsize * (
        parameter.numel() // shape[-1] + parameter.numel() // shape[-2] if len(shape) > 1 else parameter.numel()
    )


def _logits(head_Vd: Tensor, positions: int, teacher_classes: int) -> int:
    """A chunk of the student's logits, the gradient of a head that learns, and two chunks of the teacher's logits."""
    chunk = min(4 * len(head_Vd) * positions, PASS_BYTES)
    slope = 4 * head_Vd.numel() if head_Vd.requires_grad else 0
    return chunk + slope + 2 * min(4 * teacher_classes * positions, WIDER * CHUNK_BYTES)


def _size(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _tensor_bytes(value: Any) -> int:
    """Of all tensors of a batch."""
    if isinstance(value, Tensor):
        return value.nbytes
    if is_dataclass(value):
        return sum(_tensor_bytes(getattr(value, field.name)) for field in fields(value))
    return sum(map(_tensor_bytes, value)) if isinstance(value, tuple) else 0


def _load_kernels() -> None:
    """Compiled kernels and their libraries, by a cross-entropy of two classes: training has them in memory, too."""
    hidden = torch.zeros(1, 2, requires_grad=True)
    logits = LazyLogits(hidden=hidden, weight=torch.zeros(2, 2, requires_grad=True))
    torch.autograd.backward(head_cross_entropy(logits, torch.zeros(1, dtype=torch.int64)))


def _resident() -> int:
    """What this process holds, which has imported what training imports; 0 where the system does not say."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else ()
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmRSS:")), 0)

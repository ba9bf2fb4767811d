"""Memory of a training process, before any weight is loaded.

The student is made of torch's fake tensors, which have sizes and no numbers. One forward pass of its micro-batch
counts what autograd keeps, each storage once, with gradient checkpointing, dtypes and adapter as the run has them. The
other parts are sums of sizes; docs/training.md has the formulas.
"""

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from xkd_schemas.config import RunConfig
from xkd_trainer.data.cache import Cache
from xkd_trainer.data.collate import batch_of
from xkd_trainer.losses.ops.shared_pass import PASS_BYTES
from xkd_trainer.models.architecture import Head, backbone
from xkd_trainer.models.compute_dtype import dtype_named, this_device
from xkd_trainer.models.forward import checkpoint_blocks
from xkd_trainer.models.loading import load_errors, model_source, new_model
from xkd_trainer.models.lora import add_adapter, trained
from xkd_trainer.training.prepare import build_losses, check_student_settings, open_run

AHEAD: Final = 2  # steps whose batches are ready while one is worked on
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
    cache = opened.cache
    share = math.ceil(run.train.batch_size / int(os.environ.get("WORLD_SIZE", "1")))
    documents = min(run.train.micro_batch_size or share, share)
    rows, longest = _longest(cache, share)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device(device):
        student = _student(run, len(opened.tokenizer))
        kept = _activations(student, documents, longest, run.train.mixed_precision)
        read = dict.fromkeys(("head", "embeddings"), 0)
        losses, _, _ = build_losses(
            run, cache, student, opened.tokenizer, teacher_head=lambda: _teacher_head(cache, read),
            teacher_embeddings=lambda: _teacher_matrix(cache, read, "embeddings"),
        )  # fmt: skip
    learnt = [*trained(student).values(), *_learnt(losses.values())]
    head_V = student.get_output_embeddings().weight
    step = _tensor_bytes(batch_of(cache, rows, opened.wanted))
    parts = {
        "process": _resident(),
        "weights": _size(student.parameters()) + _size(_learnt(losses.values())),
        "teacher's head and embeddings": sum(read.values()),
        "gradients": _size(learnt),
        "optimizer": sum(_state_bytes(run.train.optimizer, parameter) for parameter in learnt),
        "activations": kept,
        "logits": _logits(len(head_V), documents * longest, 2 if read["head"] else 1)
        + 4 * head_V.numel() * head_V.requires_grad,
        "batches read ahead": (AHEAD + 2) * step,
    }
    return {
        "parameters": sum(p.numel() for p in student.parameters()),
        "trained": sum(p.numel() for p in trained(student).values()),
        "projectors": sum(p.numel() for p in _learnt(losses.values())),
        "documents": documents, "tokens": longest, "device": device, "bytes": parts, "total": sum(parts.values()),
    }  # fmt: skip


def _student(run: RunConfig, vocab_size: int) -> PreTrainedModel:
    """The student as it is trained, of fake tensors."""
    name = run.student.model
    if name.startswith("new:"):
        model = new_model(name.removeprefix("new:"), vocab_size=vocab_size, special={})
    else:
        source, options = model_source(name, weights=False)
        with load_errors(name, source):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source, **options))
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype_named(run.student.dtype))
    if run.train.lora.rank:
        add_adapter(model, run.train.lora, name)
    if run.train.gradient_checkpointing:
        checkpoint_blocks(model)
    return model.train()


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
        states_BLD: Tensor = backbone(student)(input_ids=ids_BL, use_cache=False).last_hidden_state
    return int(sum(storage.nbytes() for storage in kept.values())) + 4 * states_BLD.numel()


def _teacher_matrix(cache: Cache, read: dict[str, int], name: str) -> Tensor:
    sizes, dtype = cache.sizes, dtype_named(cache.teachers.manifest.spec["dtype"])
    matrix_VD = torch.empty(sizes.vocab_size, sizes.hidden_size, dtype=dtype)
    wide = 4 if name == "head" and matrix_VD.device.type == "cpu" else dtype.itemsize  # a CPU's head is float32
    read[name] = matrix_VD.numel() * wide
    return matrix_VD


def _teacher_head(cache: Cache, read: dict[str, int]) -> Head:
    sizes = cache.sizes
    return Head(weight_VD=_teacher_matrix(cache, read, "head"), scale=sizes.logit_scale, softcap=sizes.softcap)


def _longest(cache: Cache, count: int) -> tuple[list[int], int]:
    """The rows with the most student tokens, and the most that one has."""
    lengths = {}
    for row in cache.usable.tolist():
        one, at = cache.at(row)
        lengths[row] = len(one.students[at]["token_ids"])
    rows = sorted(lengths, key=lambda row: -lengths[row])[:count]
    return rows, lengths[rows[0]]


def _state_bytes(optimizer: str, parameter: Tensor) -> int:
    """Of one parameter: two numbers a weight, a row and a column of it, or two bytes a weight."""
    if optimizer in PER_WEIGHT:
        return int(PER_WEIGHT[optimizer] * parameter.numel() * (4 if "8bit" in optimizer else parameter.itemsize))
    shape = parameter.shape
    return parameter.itemsize * (
        parameter.numel() // shape[-1] + parameter.numel() // shape[-2] if len(shape) > 1 else parameter.numel()
    )


def _logits(classes: int, positions: int, sides: int) -> int:
    return sides * 4 * classes * min(positions, max(1, PASS_BYTES // (4 * classes)))


def _learnt(losses: Iterable[nn.Module]) -> list[nn.Parameter]:
    return [p for loss in losses for p in loss.parameters() if p.requires_grad]


def _size(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors)


def _tensor_bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.itemsize
    if is_dataclass(value):
        return sum(_tensor_bytes(getattr(value, field.name)) for field in fields(value))
    values = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return sum(map(_tensor_bytes, values))


def _resident() -> int:
    """What this process holds, which has imported what training imports; 0 where the system does not say."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else ()
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmRSS:")), 0)

"""Several processes as one run: what ends one of them ends all, with one line; the same numbers as in one process.

torchrun and accelerate launch start the processes and say in the environment which one this is. Each holds the whole
student (DDP), or its part of it (FSDP2). Where there is one process nothing here does anything.
"""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np
import torch
from accelerate import (
    Accelerator,
    DistributedDataParallelKwargs,
    DistributedType,
    FullyShardedDataParallelPlugin,
    PartialState,
)
from torch import Tensor, nn
from torch.distributed import DistError
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map

from xkd_schemas import errors
from xkd_schemas.config import TrainSection
from xkd_schemas.errors import UsageError, WorkersGone, XkdError
from xkd_trainer.models.lora import cast

T = TypeVar("T")


def join() -> None:
    """Meet the other processes of this run, before anything is loaded."""
    PartialState(cpu=not torch.cuda.is_available())


def make_accelerator(train: TrainSection) -> Accelerator:
    """For all processes of this run; with FSDP2 where `accelerate launch --use_fsdp` asks for it."""
    fsdp = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if fsdp and train.eval_data and train.load_best_at_end:
        raise UsageError("FSDP cannot export the best student", fix="--load-best-at-end false")
    ddp = DistributedDataParallelKwargs(gradient_as_bucket_view=True)  # gradients once in memory, not twice
    trackers = {"log_with": list(train.track), "project_dir": Path(train.out) / "trackers"} if train.track else {}
    made = Accelerator(
        mixed_precision=train.mixed_precision, cpu=not torch.cuda.is_available(), kwargs_handlers=[ddp], **trackers
    )
    if fsdp:
        plugin = FullyShardedDataParallelPlugin(cpu_ram_efficient_loading=False)  # each process loads the student
        if made.num_processes == 1 or plugin.fsdp_version != 2:
            found = "one process" if made.num_processes == 1 else "version 1"
            fix = "accelerate launch --use_fsdp --fsdp_version 2 --num_processes 2 --no_python xkd-train ..."
            raise UsageError(f"FSDP is asked for with {found}", fix=fix)
        plugin.mixed_precision_policy = None  # autocast as without FSDP, so that the losses are computed in float32
        for state in (PartialState(), made.state):  # accelerate does so on GPUs only
            vars(state).update(distributed_type=DistributedType.FSDP)
        made.state.fsdp_plugin = plugin
    return made


def prepare(accelerator: Accelerator, module: nn.Module, optimizer: Any) -> tuple[Any, Any]:
    """Both on the device, as DDP or FSDP2 wants them; the optimizer goes on with the state it has."""
    state = optimizer.state_dict()
    if accelerator.is_fsdp2:
        if getattr(module.student, "peft_config", None):
            raise UsageError(
                "FSDP cannot save an adapter (LoRA)", fix="leave out --use_fsdp: an adapter needs less memory"
            )
        optimizer.state.clear()  # of parameters that are replaced
    module, optimizer = accelerator.prepare(module, optimizer)
    if accelerator.is_fsdp2:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        for index, values in state["state"].items():
            own = parameters[index]
            for name, value in values.items():
                if value.shape == own.shape:
                    values[name] = distribute_tensor(value, own.device_mesh, own.placements)
        optimizer.load_state_dict(state)
    return module, optimizer


@contextmanager
def whole_root(module: nn.Module) -> Iterator[None]:
    """What lies in no block, such as embeddings and projectors, is whole inside, also with FSDP."""
    if isinstance(module, FSDPModule):
        module.unshard()
    yield
    if isinstance(module, FSDPModule):
        module.reshard()


def gather(values: T) -> T:
    """The same with whole tensors in place of what FSDP has cut up, in the first process and on its CPU.

    All processes must call it.
    """
    known: dict[int, Tensor] = {}

    def join(value: Any) -> Any:
        if not isinstance(value, DTensor):
            return value
        if id(value) not in known:  # tied weights stay one
            full: Tensor = value.full_tensor().detach()
            known[id(value)] = full.cpu() if full.ndim == 0 or PartialState().is_main_process else full.flatten()[:0]
        return known[id(value)]

    gathered: T = tree_map(join, values)
    return gathered


def gather_student(student: Any, dtype: torch.dtype) -> Any:
    """The student to save: itself in `dtype`, or with FSDP a copy of whole weights on the first process's CPU."""
    if not isinstance(next(student.parameters()), DTensor):
        return cast(student, dtype)
    weights = gather(student.state_dict(keep_vars=True))
    if not PartialState().is_main_process:
        return student
    with torch.device("meta"):
        copy = type(student)(student.config)
    copy.load_state_dict({name: tensor.detach().to(dtype) for name, tensor in weights.items()}, assign=True)
    copy.tie_weights()
    copy.generation_config = student.generation_config
    return copy


def largest(*values: float) -> list[float]:
    """The largest of each value over all processes."""
    state = PartialState()
    if state.num_processes == 1:
        return [*values]
    found = torch.tensor(values, dtype=torch.float64, device=state.device)
    torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
    return found.tolist()


def agree(work: Callable[[], T]) -> T:
    """What `work` returns in this process; an error of it in any process is raised in all of them.

    Every process must call it at the same place. Of several errors that of the first process is raised.
    """
    state, failed = PartialState(), None
    try:
        result = work()
    except Exception as error:  # whatever it is goes on below
        if state.num_processes == 1:
            raise
        failed = error
    first = state.num_processes - int(largest(failed is not None and state.num_processes - state.process_index)[0])
    if first == state.num_processes:
        return result
    raise _share(failed, first)


def agree_to_raise(error: Exception | None) -> None:
    """Raise the error of any process in all of them; as `agree`."""

    def work() -> None:
        if error is not None:
            raise error

    agree(work)


def _share(failed: Exception | None, first: int) -> Exception:
    """The error of process `first`, as it is there, and as one of ours in the others."""
    state, text = PartialState(), b""
    if state.process_index == first:
        told = (
            failed if isinstance(failed, XkdError) else WorkersGone(f"process {first} failed: {failed!r}", fix=_AGAIN)
        )
        text = json.dumps([type(told).__name__, told.what, told.kept, told.fix]).encode()
    size = torch.tensor(len(text), device=state.device)
    torch.distributed.broadcast(size, first)
    sent = torch.tensor([*text] or [0] * int(size), dtype=torch.uint8, device=state.device)
    torch.distributed.broadcast(sent, first)
    if state.process_index == first and not isinstance(failed, XkdError):
        assert failed is not None
        return failed
    kind, what, kept, fix = json.loads(bytes(sent.tolist()))
    error: XkdError = getattr(errors, kind)(what, kept=kept, fix=fix)
    error.shared = True
    return error


def seed_step(seed: int, step: int) -> None:
    """Random numbers of a step, such as dropout, are a function of the seed, the step and the process."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, PartialState().process_index]).generate_state(1)[0]))


def sum_gradients(accelerator: Accelerator, module: nn.Module) -> None:
    """Add up what the processes gathered without a word to each other; DDP does it in its buckets.

    It is done when all micro-batches of all processes have gone through: one that runs out of memory in the middle of
    a backward pass could not take back what it had sent. A gradient that no document of a process reached is 0.
    """
    if accelerator.num_processes > 1 and not accelerator.is_fsdp2:
        with accelerator.trigger_sync_in_backward(getattr(module, "_orig_mod", module)):
            reach = [parameter.sum() for parameter in module.parameters() if parameter.requires_grad]
            accelerator.backward(torch.stack(reach).sum() * 0.0)


@contextmanager
def losing_no_process(kept: Callable[[], str]) -> Iterator[None]:
    """Where another process of the run dies, what it does to this one's work inside is WorkersGone."""
    try:
        yield
    except RuntimeError as error:
        lost = isinstance(error, DistError) or any(words in str(error) for words in _LOST)
        if PartialState().num_processes == 1 or not lost:
            raise
        raise WorkersGone("another process of this run is gone", kept=kept(), fix=_AGAIN) from error


_LOST: Final = ("closed by peer", "reset by peer", "gloo", "NCCL")
_AGAIN: Final = "run the same command again to go on"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on a GPU or on a CPU."""
    words = ("DefaultCPUAllocator", "can't allocate memory", "not enough memory")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(word in str(error) for word in words)

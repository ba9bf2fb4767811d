"""The teacher's passes over the batches of a shard: one each, or block after block with all batches in each.

Shape legend for this file
    B documents    L tokens    D width
"""

import contextlib
import os
import tempfile
from collections.abc import Collection, Generator, Iterator, Sequence
from functools import partial
from pathlib import Path
from shutil import disk_usage
from typing import IO, Any, Final

import torch
from torch import Tensor
from transformers import PreTrainedModel

from xkd_pipeline.capture.measure import ROWS, Reading, pad_readings
from xkd_pipeline.workers.contract import KEPT
from xkd_schemas.config import TeacherSection
from xkd_schemas.durable_files import disk_errors
from xkd_schemas.errors import DiskFailed, UsageError
from xkd_schemas.signals import KINDS, Signal
from xkd_schemas.tokens import last_text
from xkd_trainer.models.forward import States, empty_model, run
from xkd_trainer.models.streaming import stream_of, why_not_streamed

SHARE: Final = 0.25  # of the memory, that the states of a shard may take


def memory_for(device: str) -> int:
    """Bytes that a model may take in this process: of a GPU all of it, where the processor has as much to spare."""
    import psutil  # accelerate needs it too

    free = min([int(psutil.virtual_memory().available), *free_of_groups()])
    if device != "cuda" or not torch.cuda.is_available():
        return free
    return min(free, torch.cuda.get_device_properties(0).total_memory)


def free_of_groups(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> Iterator[int]:
    """Bytes that each control group of this process leaves it, as of a container or a job of Slurm (version 2)."""
    named = own.read_text().rpartition("::/")[2].strip() if own.is_file() else ""
    for folder in (root / named, *(root / named).parents):
        with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
            taken = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            yield max(0, int((folder / "memory.max").read_text()) - int(taken["anon"]))


def why_streamed(teacher: TeacherSection, dtype: torch.dtype, device: str) -> str:
    """Why the blocks of a teacher are streamed in this process, in words; "" where they are not.

    UsageError where they are to be, and to be on several devices too.
    """
    if teacher.device_map or teacher.max_memory:
        if teacher.stream_layers:
            raise UsageError(
                "a teacher is streamed, or its weights are on several devices, not both",
                fix="leave out --stream-layers, or --device-map, --max-memory and several GPUs for a worker",
            )
        return ""
    if teacher.stream_layers is not None:
        return "as asked for" if teacher.stream_layers else ""
    if teacher.model.endswith(".gguf"):
        return ""
    try:
        model, memory = empty_model(teacher.model), memory_for(device)
    except UsageError:  # said by what loads it whole
        return ""
    weights = sum(weight.numel() for weight in model.parameters()) * dtype.itemsize
    if weights <= memory or why_not_streamed(model, teacher.model):
        return ""
    return f"its weights take {weights / 1e9:.1f} GB, there is memory for {memory / 1e9:.1f} GB"


class Batch:
    """Documents of one pass, padded."""

    def __init__(self, indices: tuple[int, ...], readings: list[Reading], multiple: int, device: torch.device) -> None:
        self.indices, self.readings = indices, readings
        self.ids_BL, self.valid_BL = (t.to(device) for t in pad_readings(readings, multiple))
        self.text_B = torch.tensor([last_text(reading.tokens.kinds) for reading in readings]).to(device)


def reads_of(wanted: Sequence[Signal]) -> dict[str, Any]:
    """What the signals read of a pass: `layers`, `attention`, `attention_layers` and `text_layers` of `run`."""

    def layers(names: Collection[str]) -> list[int]:
        return sorted({s.layer for s in wanted if s.layer is not None and s.name in names})

    return {
        "layers": layers(KINDS.keys() - ROWS),
        "attention": any(s.name == "attention_last" for s in wanted),
        "attention_layers": layers({"attention"}),
        "text_layers": layers({"attention_text"}),
    }


def passes(
    model: PreTrainedModel, batches: Sequence[Batch], wanted: Sequence[Signal], scratch: Path | None
) -> Generator[tuple[Batch, States, Sequence[Signal], bool], None, None]:
    """Each batch with the states of a pass, the signals to be read from them, and whether its last states are there.

    Of a streamed model there is a pass for each block and batch, and the states of a batch between two blocks are
    kept in memory, or where they do not fit in a file in `scratch`.
    """
    stream = stream_of(model)
    if stream is None:
        for batch in batches:
            yield batch, _run(model, batch, wanted), wanted, True
        return
    size = sum(batch.ids_BL.numel() for batch in batches) * model.get_input_embeddings().weight[0].nbytes
    with hold(size, stream.device, scratch) as held:
        for number in stream.sweep():
            last = number == len(stream)
            asked = [s for s in wanted if s.layer == number or (last and s.layer is None)]
            for place, batch in enumerate(batches):
                states, after_BLD = stream.step(number, held.get(place), partial(_run, model, batch, asked))
                held[place] = after_BLD
                yield batch, states, asked, last


def _run(model: PreTrainedModel, batch: Batch, wanted: Sequence[Signal]) -> States:
    return run(model, batch.ids_BL, batch.valid_BL, text_B=batch.text_B, **reads_of(wanted))


class StatesInFile:
    """States by number, in a file."""

    def __init__(self, device: str, file: IO[bytes], scratch: Path) -> None:
        self._device, self._file, self._scratch = device, file, scratch
        self._places: dict[int, tuple[int, Tensor]] = {}  # in the file, and an empty tensor of the shape

    def get(self, number: int) -> Tensor | None:
        """What was put there; None for nothing."""
        if number not in self._places:
            return None
        place, empty = self._places[number]
        states = torch.empty_like(empty, device="cpu")
        with disk_errors(self._scratch):
            self._file.seek(place)
            self._file.readinto(_bytes_of(states))  # type: ignore[attr-defined]
        return states.to(self._device)

    def __setitem__(self, number: int, states: Tensor) -> None:
        """Keep states in the place of those that were put there before."""
        with disk_errors(self._scratch):
            end = self._file.seek(0, os.SEEK_END)
            place, _ = self._places.setdefault(number, (end, torch.empty_like(states, device="meta")))
            self._file.seek(place)
            self._file.write(_bytes_of(states.cpu().contiguous()))


def _bytes_of(states: Tensor) -> Any:
    return states.flatten().view(torch.uint8).numpy()


@contextlib.contextmanager
def hold(size: int, device: str, scratch: Path | None) -> Iterator[dict[int, Tensor] | StatesInFile]:
    """Room for so many bytes of states between the blocks of a model on `device`.

    In memory where they take no more than SHARE of it, otherwise in a file without a name, of which nothing is left
    when this process ends; DiskFailed where there is no room for it in `scratch`.
    """
    if size <= SHARE * memory_for(device):
        yield {}
        return
    folder = scratch or Path(tempfile.gettempdir())
    if size > (free := disk_usage(folder).free):
        raise DiskFailed(
            f"{folder} has {free / 1e9:.1f} GB free, the states of a shard take {size / 1e9:.1f} GB",
            kept=KEPT, fix="free space there, or make shards of fewer documents with documents.rows_per_shard=N",
        )  # fmt: skip
    with disk_errors(folder), tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        yield StatesInFile(device, file, folder)

"""The trainer's reader against a memory copy of the same states, and against readers of other projects.

Everybody puts the states of eight documents at a time into a padded batch: the trainer's own `batch_of` with all that
it makes beside them (tokens, alignment, masks), the others with the states alone into a tensor that is reused, and the
zeros after them: what "memory" is does the same from arrays in memory.

Shape legend for this file
    R kept rows of one document    B documents of a batch    D width
"""

import functools
import importlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from benchmarks.measure import Options, Result, Row, Skipped, cost, interleaved, ratio
from benchmarks.states import HIDDEN, Sizes, states_cache
from xkd_trainer.data.cache import Cache
from xkd_trainer.data.collate import batch_of

BATCH = 8
States = npt.NDArray[np.int16]
ReadOne = Callable[[int], States]


def run(options: Options) -> list[Result]:
    """Documents of 64 to 512 tokens with states of 8 KiB a token, all digests checked before."""
    lengths = np.random.default_rng(1).integers(64, options.size(512, 96), options.size(72, 24))
    sizes = Sizes(lengths=tuple(map(int, lengths)), width=options.size(4096, 64), rows_per_shard=32)
    states = states_cache(options.scratch / "cache", sizes)
    in_order = np.arange(len(states))
    orders = {"sequential": in_order, "shuffled": np.random.default_rng(2).permutation(in_order)}
    readers, results = peers(states, options.scratch)
    target_BRD = np.zeros((BATCH, max(map(len, states)), sizes.width), np.int16)
    cache = Cache(options.scratch / "cache", student="made")
    shards = len(cache.teachers.manifest.commits)
    calls: dict[str, Callable[[], object]] = {
        "declarations": lambda: [cache.teachers.shard(number).batch(0) for number in range(shards)],
    }
    for name, order in orders.items():
        calls |= {f"ours {name}": functools.partial(read_all, cache, order)}
        for peer, read in readers.items():
            calls |= {f"{peer} {name}": functools.partial(pad_all, read, order, target_BRD)}
    seconds = interleaved(calls, options.repeats)
    size = sum(s.nbytes for s in states)

    def row(what: str, ours: str, theirs: str, bar: float | None) -> Row:
        return ratio(what, size / seconds[ours] / 1e9, size / seconds[theirs] / 1e9, "GB/s", bar=bar, at_least=True)

    bars = {"sequential": 0.60, "shuffled": 0.55}
    rows: list[Result] = [
        row(f"{name} reader / memory copy of the same padded states", f"ours {name}", f"memory {name}", bars[name])
        for name in orders
    ]
    what = "types, lengths and offsets of all shards checked / memory copy"
    rows += [cost(what, seconds["declarations"], seconds["memory sequential"])]
    rows += [
        row(f"shuffled reader / {peer}", "ours shuffled", f"{peer} shuffled", PEER_BARS[peer])
        for peer in readers
        if peer != "memory"
    ]
    return rows + results


def batches(order: Sequence[int]) -> Iterator[list[int]]:
    """Eight rows at a time."""
    rows = iter([int(row) for row in order])
    while batch := list(itertools.islice(rows, BATCH)):
        yield batch


def read_all(cache: Cache, order: Any) -> None:
    """Every document once, as the trainer reads."""
    for rows in batches(order):
        batch_of(cache, rows, frozenset({HIDDEN}))


def pad_all(read: ReadOne, order: Any, target_BRD: States) -> None:
    """Every document once into the reused batch, which is left as it must be: zeros after each document."""
    for rows in batches(order):
        found = [read(row) for row in rows]
        longest = max(map(len, found))
        for place, states_RD in enumerate(found):
            target_BRD[place, : len(states_RD)] = states_RD
            target_BRD[place, len(states_RD) : longest] = 0


PEER_BARS = {"datasets, torch format": 5.0, "datasets, torch format of int16": None, "litdata": 1.3}


def peers(states: Sequence[npt.NDArray[np.uint16]], scratch: Path) -> tuple[dict[str, ReadOne], list[Result]]:
    """Readers of one document's states by name, and rows for those that are not installed."""
    tensors = [torch.from_numpy(one.view(np.int16)) for one in states]
    found: dict[str, ReadOne] = {"memory": [one.view(np.int16) for one in states].__getitem__}
    missing: list[Result] = []
    for name, package, make in (
        ("datasets, torch format", "datasets", of_datasets),
        ("datasets, torch format of int16", "datasets", functools.partial(of_datasets, dtype=torch.int16)),
        ("litdata", "litdata", of_litdata),
    ):
        try:
            importlib.import_module(package)
        except ImportError as error:
            missing.append(Skipped(what=f"shuffled reader / {name}", why=NOT_HERE[package].format(error=error)))
        else:
            found[name] = make(tensors, scratch / package)
    return found, missing


NOT_HERE = {
    "datasets": "{error}; pip install datasets",
    "litdata": "{error}; pip install litdata, which brings torchvision and its torch",
}


def of_datasets(tensors: Sequence[Tensor], folder: Path, dtype: torch.dtype | None = None) -> ReadOne:
    """A list column of int16 numbers (there is no bfloat16), saved to disk and mapped; torch format makes int64."""
    import datasets

    datasets.disable_progress_bars()
    if not folder.exists():
        ends = np.cumsum([0, *(t.numel() for t in tensors)], dtype=np.int32)
        values = np.concatenate([t.numpy().reshape(-1) for t in tensors])
        column = pa.ListArray.from_arrays(pa.array(ends), pa.array(values))
        made = datasets.Dataset(datasets.table.InMemoryTable(pa.table({"states": column})))
        made.save_to_disk(str(folder))
    width, options = tensors[0].shape[1], {} if dtype is None else {"dtype": dtype}
    saved = datasets.load_from_disk(str(folder)).with_format("torch", **options)
    return lambda row: saved[row]["states"].numpy().reshape(-1, width)


def of_litdata(tensors: Sequence[Tensor], folder: Path) -> ReadOne:
    """Chunks of tensors of int16 (it refuses bfloat16)."""
    from litdata.streaming import StreamingDataset
    from litdata.streaming.writer import BinaryWriter

    folder.mkdir()
    writer = BinaryWriter(str(folder), chunk_bytes=2**26)
    for number, tensor in enumerate(tensors):
        writer[number] = tensor
    writer.done()
    writer.merge(1)
    saved = StreamingDataset(str(folder))
    return lambda row: saved[row].numpy()

"""Which documents stand in which optimizer step: a closed form of (seed, epoch, step), so nothing must be saved.

The shuffle is a keyed permutation of 0..n-1 computed element by element (an eight-round Feistel network
on the next power of four, walked until it lands inside; with four rounds neighbours stay together too
often). No list of n numbers is ever made.
"""

import hashlib
import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from xkd_schemas.runfile import TrainSection

Int64s = npt.NDArray[np.int64]
_ROUNDS = 8


def permuted(positions: Int64s, size: int, *, seed: int, epoch: int) -> Int64s:
    """Where each position of the epoch's shuffled order points, int64, same shape.

    >>> sorted(permuted(np.arange(5), 5, seed=1, epoch=0).tolist())
    [0, 1, 2, 3, 4]
    """
    half = max(1, (max(size - 1, 1).bit_length() + 1) // 2)
    keys = _keys(seed, epoch)
    values = _feistel(positions.astype(np.uint64), half, keys)
    while (outside := values >= size).any():
        values[outside] = _feistel(values[outside], half, keys)
    return values.astype(np.int64)


def _keys(seed: int, epoch: int) -> list[int]:
    block = hashlib.sha512(f"xkd order {seed} {epoch}".encode()).digest()
    return [int.from_bytes(block[8 * i : 8 * i + 8], "little") for i in range(_ROUNDS)]


def _feistel(values: npt.NDArray[np.uint64], half: int, keys: list[int]) -> npt.NDArray[np.uint64]:
    mask = np.uint64((1 << half) - 1)
    left, right = values >> np.uint64(half), values & mask
    for key in keys:
        left, right = right, (left ^ _mix(right, key)) & mask
    return (left << np.uint64(half)) | right


def _mix(values: npt.NDArray[np.uint64], key: int) -> npt.NDArray[np.uint64]:
    """The finaliser of splitmix64 on value + key."""
    with np.errstate(over="ignore"):
        z = values + np.uint64(key)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@dataclass(frozen=True, kw_only=True, slots=True)
class Order:
    """The documents of every optimizer step of a run."""

    size: int
    """Usable documents."""
    batch_size: int
    """Documents of a step over all processes; the last step of an epoch may have fewer."""
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps that see every document once."""
        return -(-self.size // self.batch_size)

    def step(self, step: int) -> Int64s:
        """Positions 0..size-1 of the documents of optimizer step `step` (0 is the first), [n]."""
        epoch, within = divmod(step, self.steps_per_epoch)
        first = within * self.batch_size
        positions = np.arange(first, min(first + self.batch_size, self.size), dtype=np.int64)
        return permuted(positions, self.size, seed=self.seed, epoch=epoch)

    def share(self, step: int, rank: int, world: int, micro_batch_size: int) -> list[Int64s]:
        """The micro-batches of one process: its rows of the step, cut in order; possibly none."""
        rows = self.step(step)[rank::world]
        size = micro_batch_size or max(1, len(rows))
        return [rows[first : first + size] for first in range(0, len(rows), size)]


def learning_rate(step: int, total: int, train: TrainSection) -> float:
    """Factor of the learning rates at optimizer step `step` (0 is the first): linear warm-up, then a cosine.

    >>> [round(learning_rate(s, 10, TrainSection(warmup_ratio=0.2)), 2) for s in (0, 1, 2, 9)]
    [0.5, 1.0, 1.0, 0.04]
    """
    warm = math.ceil(train.warmup_ratio * total)
    if step < warm:
        return (step + 1) / warm
    share = (step - warm) / max(1, total - warm)
    return train.min_lr_ratio + (1 - train.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * share))

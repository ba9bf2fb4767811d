"""Which documents stand in which optimizer step: a closed form of (seed, epoch, step), so nothing must be saved."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np
import numpy.typing as npt

from xkd_schemas.config import TrainSection

Int64s = npt.NDArray[np.int64]

ORDER: Final = "numpy PCG64 permutation"
"""Names the formula in checkpoints: a run that was begun with another one is refused."""


@lru_cache(maxsize=1)
def permute(size: int, *, seed: int, epoch: int) -> Int64s:
    """The epoch's shuffled order of the positions 0..size-1, [size], read-only.

    >>> sorted(permute(5, seed=1, epoch=0).tolist())
    [0, 1, 2, 3, 4]
    """
    order = np.random.Generator(np.random.PCG64([seed, epoch])).permutation(size)
    order.setflags(write=False)
    return order


@dataclass(frozen=True, kw_only=True, slots=True)
class Order:
    """The documents of every optimizer step of a run."""

    size: int  # usable documents
    batch_size: int  # documents of a step over all processes; the last step of an epoch may have fewer
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps that see every document once."""
        return -(-self.size // self.batch_size)

    def step(self, step: int) -> Int64s:
        """Positions 0..size-1 of the documents of optimizer step `step` (0 is the first), [n]."""
        epoch, within = divmod(step, self.steps_per_epoch)
        first = within * self.batch_size
        return permute(self.size, seed=self.seed, epoch=epoch)[first : first + self.batch_size]

    def share(self, step: int, rank: int, world: int, micro_batch_size: int) -> list[Int64s]:
        """The micro-batches of one process: its rows of the step, cut in order; possibly none."""
        rows = self.step(step)[rank::world]
        size = micro_batch_size or max(1, len(rows))
        return [rows[first : first + size] for first in range(0, len(rows), size)]

    def shares(
        self, step: int, world: int, train: TrainSection, lengths_of: Callable[[Int64s], Int64s]
    ) -> list[list[Int64s]]:
        """The micro-batches of every process; with a budget of tokens the step's documents are dealt out by length.

        `lengths_of` tells the tokens of the documents at some positions, and is asked for those of this step alone.
        """
        if not train.batch_tokens:
            return [self.share(step, rank, world, train.micro_batch_size) for rank in range(world)]
        rows = self.step(step)
        lengths = lengths_of(rows)
        order = np.argsort(-lengths, kind="stable")
        hands = [order[rank::world] for rank in range(world)]
        return [[rows[hand][part] for part in cut(lengths[hand], train)] for hand in hands]


def cut(lengths: Int64s, train: TrainSection) -> list[slice]:
    """Runs of documents, the longest first, that have at most `batch_tokens` tokens when they are padded.

    >>> cut(np.array([9, 4, 4, 3]), TrainSection(batch_tokens=8))
    [slice(0, 1, None), slice(1, 3, None), slice(3, 4, None)]
    """
    runs, first = [], 0
    while first < len(lengths):
        most = max(1, train.batch_tokens // max(1, int(lengths[first])))
        end = min(len(lengths), first + min(most, train.micro_batch_size or most))
        runs.append(slice(first, end))
        first = end
    return runs


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

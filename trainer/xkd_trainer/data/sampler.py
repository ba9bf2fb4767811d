"""Which documents stand in which optimizer step: a closed form of (seed, epoch, step), so nothing must be saved.

Their batches are read while earlier steps are worked on.
"""

import math
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, TypeVar

import numpy as np

from xkd_schemas.config import TrainSection
from xkd_schemas.console import rank
from xkd_schemas.signals import Signal
from xkd_schemas.tokens import Int64s
from xkd_trainer.data.batch import Batch, blank
from xkd_trainer.data.cache import Cache
from xkd_trainer.data.collate import batch_of

T = TypeVar("T")

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


AHEAD: Final = 2  # steps whose batches are read while one is worked on


def prefetch(items: Iterator[T], depth: int = AHEAD) -> Generator[T]:
    """The items, none of them None, made in a thread at most `depth` ahead; its errors are raised here."""
    with ThreadPoolExecutor(1, thread_name_prefix="produce") as pool:
        ahead = deque(pool.submit(next, items, None) for _ in range(depth))
        while (item := ahead.popleft().result()) is not None:
            ahead.append(pool.submit(next, items, None))
            yield item


class StepBatches:
    """The micro-batches of each optimizer step; `micro_batch_size` may be made smaller between two steps."""

    def __init__(self, cache: Cache, wanted: frozenset[Signal], order: Order, train: TrainSection, world: int) -> None:
        self.cache, self.wanted, self.order, self.train, self.world = cache, wanted, order, train, world
        self.micro_batch_size = train.micro_batch_size

    def read(self, step: int) -> list[Batch]:
        """This process's micro-batches of a step; every process gets the same number, blank ones if need be."""
        shares, rows_of_epoch = self._shares(step), self._rows_of_epoch(step)

        def read(places: Int64s) -> Batch:
            return batch_of(self.cache, rows_of_epoch[places].tolist(), self.wanted)

        batches = [read(places) for places in shares[rank()]]
        missing = max(len(share) for share in shares) - len(batches)
        return batches + [blank(read(shares[0][0])) for _ in range(missing)]

    def largest(self, step: int) -> int:
        """Documents in the largest micro-batch of a step, over all processes."""
        return max(len(places) for share in self._shares(step) for places in share)

    def _shares(self, step: int) -> list[list[Int64s]]:
        how = self.train.model_copy(update={"micro_batch_size": self.micro_batch_size})
        rows_of_epoch = self._rows_of_epoch(step)
        return self.order.shares(step, self.world, how, lambda places: self.cache.lengths(rows_of_epoch[places]))

    def _rows_of_epoch(self, step: int) -> Int64s:
        return self.cache.rows(step // self.order.steps_per_epoch, self.train.seed)

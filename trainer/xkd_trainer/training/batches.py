"""The batches of optimizer steps, read while earlier steps are worked on."""

from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeVar

from xkd_schemas.config import TrainSection
from xkd_schemas.console import rank
from xkd_trainer.data.batch import Batch, blank
from xkd_trainer.data.collate import batch_of
from xkd_trainer.data.sampler import Int64s, Order
from xkd_trainer.training.prepare import Ready

T = TypeVar("T")

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

    def __init__(self, ready: Ready, order: Order, train: TrainSection, world: int) -> None:
        self.ready, self.order, self.train, self.world = ready, order, train, world
        self.micro_batch_size = train.micro_batch_size

    def read(self, step: int) -> list[Batch]:
        """This process's micro-batches of a step; every process gets the same number, blank ones if need be."""
        shares, rows_of_epoch = self._shares(step), self._rows_of_epoch(step)
        cache, wanted = self.ready.cache, self.ready.wanted
        batches = [batch_of(cache, rows_of_epoch[places].tolist(), wanted) for places in shares[rank()]]
        while len(batches) < max(len(share) for share in shares):
            batches.append(blank(batch_of(cache, rows_of_epoch[shares[0][0]].tolist(), wanted)))
        return batches

    def largest(self, step: int) -> int:
        """Documents in the largest micro-batch of a step, over all processes."""
        return max(len(places) for share in self._shares(step) for places in share)

    def _shares(self, step: int) -> list[list[Int64s]]:
        how = self.train.model_copy(update={"micro_batch_size": self.micro_batch_size})
        cache, rows_of_epoch = self.ready.cache, self._rows_of_epoch(step)
        return self.order.shares(step, self.world, how, lambda places: cache.lengths(rows_of_epoch[places]))

    def _rows_of_epoch(self, step: int) -> Int64s:
        return self.ready.cache.rows(step // self.order.steps_per_epoch, self.train.seed)

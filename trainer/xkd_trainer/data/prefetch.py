"""Things made in a thread while the caller works on earlier ones."""

import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class _Failed:
    error: BaseException


def prefetched(make: Callable[[], Iterator[T]], depth: int = 2) -> Iterator[T]:
    """The items of `make()`, produced in a thread at most `depth` ahead; its errors are raised here."""
    items: queue.Queue[T | _Failed | None] = queue.Queue(maxsize=depth)
    stop = threading.Event()

    def put(item: T | _Failed | None) -> None:
        while not stop.is_set():
            try:
                return items.put(item, timeout=0.1)
            except queue.Full:
                continue

    def produce() -> None:
        try:
            for item in make():
                put(item)
                if stop.is_set():
                    return
            put(None)
        except BaseException as error:
            put(_Failed(error))

    thread = threading.Thread(target=produce, daemon=True)
    thread.start()
    try:
        while (item := items.get()) is not None:
            if isinstance(item, _Failed):
                raise item.error
            yield item
    finally:
        stop.set()
        thread.join()

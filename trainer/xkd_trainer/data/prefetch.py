"""Things made in a thread while the caller works on earlier ones."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def prefetch(make: Callable[[], Iterator[T]], depth: int = 2) -> Iterator[T]:
    """The items of `make()`, none of them None, made in a thread at most `depth` ahead; its errors are raised here."""
    items = make()
    with ThreadPoolExecutor(1, thread_name_prefix="produce") as pool:
        ahead = deque(pool.submit(next, items, None) for _ in range(depth))
        while (item := ahead.popleft().result()) is not None:
            ahead.append(pool.submit(next, items, None))
            yield item

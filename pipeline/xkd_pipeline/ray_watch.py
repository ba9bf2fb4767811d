"""Our own exit status where Ray, waiting for a head that is gone, would end this process with its own.

Ray waits inside C++, where no exception reaches it, and after a minute ends the process with status 1.
"""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Final, NoReturn

import psutil

from xkd_schemas.errors import XkdError
from xkd_schemas.terminal import tell

EVERY_SECONDS: Final = 0.2
GRACE_SECONDS: Final = 5.0
"""So long a dead head may still come out as an exception, which is the better end."""
OURS: Final = ("gcs_server", "raylet")
"""Processes without which nothing goes on, children of the process that started Ray."""


class Family:
    """Ray's own processes that this one started."""

    def __init__(self) -> None:
        self._seen: dict[psutil.Process, str] = {}

    def gone(self) -> str:
        """Which of them is dead that was once alive; "" where none is."""
        for process in psutil.Process().children():
            with suppress(psutil.NoSuchProcess):
                if process not in self._seen and (name := process.name()) in OURS:
                    self._seen[process] = name
        dead = [name for process, name in self._seen.items() if not _alive(process)]
        return f"its {dead[0]} died" if dead else ""

    def kill(self) -> None:
        """End those that are left; their own children follow them."""
        for process in self._seen:
            with suppress(psutil.NoSuchProcess):
                process.kill()


def _alive(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


@contextmanager
def attended(gone: Callable[[], str], error: Callable[[str], XkdError], tidy: Callable[[], None]) -> Iterator[None]:
    """Calls of Ray that may wait for its head; this process ends by itself where that stays gone.

    Args:
        gone: Why the head does not answer; "" where it does. Called in another thread.
        error: What to say then; its exit code is the process's.
        tidy: Called before.
    """
    over = threading.Event()

    def watch() -> None:
        while not over.wait(EVERY_SECONDS):
            reason = gone()
            if reason and not over.wait(GRACE_SECONDS):
                tidy()
                _end(error(reason))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()


def _end(error: XkdError) -> NoReturn:
    tell(error)
    os._exit(error.exit_code)

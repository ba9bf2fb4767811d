"""Progress of long work on standard error: a bar on a terminal, elsewhere a plain line at least every ten seconds.

Whoever waits for work opens a `Progress`; whoever does it calls `tick`, wherever it is, and the innermost open
`Progress` counts it. `heartbeat` shows it from a thread of its own, so that work that never ticks is not silent.
Times are only shown; nothing that is written to a cache or a checkpoint depends on them.
"""

import contextlib
import shutil
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Final, Self, TypeVar

T = TypeVar("T")

EVERY: Final = 9.0  # seconds between two plain lines; with a beat more it is ten at most
REDRAWN: Final = 0.2  # seconds between two drawings of a bar at least
BEAT: Final = 1.0  # seconds between two looks at the clock while nothing ticks
PATIENCE: Final = 2.0  # seconds before a bar without a count appears
BAR: Final = 20  # signs of a bar

_open: "list[Progress]" = []
_lock = threading.RLock()


class Progress:
    """Work with a label, counted in `of` where its total is known."""

    def __init__(self, label: str, total: float = 0, *, of: str = "rows", quiet: bool = False) -> None:
        self.label, self.total, self.of = label, total, of
        self.done = 0.0
        self.note = ""
        self._quiet = quiet
        self._start = self._shown = time.monotonic()
        self._tty = sys.stderr.isatty()
        self._drawn = False

    def reach(self, done: float, note: str = "") -> None:
        """`done` of the total are finished, whatever was ticked before."""
        self.done, self.note = done, note or self.note
        self.beat()

    def beat(self) -> None:
        """Show where the work is, if it is time to."""
        with _lock:
            now = time.monotonic()
            pause = EVERY if not self._tty else REDRAWN if self.total or self._drawn else PATIENCE
            if self._quiet or not _open or _open[-1] is not self or now - self._shown < pause:
                return
            self._shown, self._drawn = now, self._tty
            line = self._line(now - self._start)
            width = shutil.get_terminal_size().columns - 1
            sys.stderr.write(f"\r\x1b[K{line[:width]}" if self._tty else f"{line}\n")
            sys.stderr.flush()

    def _line(self, elapsed: float) -> str:
        done = min(self.done, self.total)
        parts = [f"{show_time(elapsed)} elapsed"]
        if self.total:
            bar = f"[{'#' * int(BAR * done / self.total):.<{BAR}}] " if self._tty else ""
            parts.insert(0, f"{bar}{int(done)} of {int(self.total)} {self.of}")
        if done:
            parts.append(f"{show_time(elapsed / done * (self.total - done))} left")
        return f"{self.label}: {', '.join([*parts, *filter(None, [self.note])])}"

    def clear(self) -> None:
        """Take a bar off the terminal, so that something else can be written there."""
        if self._drawn:
            self._drawn = False
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()

    def __enter__(self) -> Self:
        with _lock:
            clear()
            if _open:
                self._shown = _open[-1]._shown
            _open.append(self)
        return self

    def __exit__(self, *_raised: object) -> None:
        with _lock:
            self.clear()
            _open.remove(self)
            if _open:
                _open[-1]._shown = self._shown


def tick(done: float = 1) -> None:
    """So much more of the work at hand is done; nothing where nobody waits for it."""
    if _open:
        _open[-1].reach(_open[-1].done + done)


def tick_each(items: Iterable[T]) -> Iterator[T]:
    """The same items; one more is done each time that the next is asked for."""
    for item in items:
        yield item
        tick()


def remark(text: str) -> None:
    """What the line of the work at hand says last, such as who is at work."""
    if _open:
        _open[-1].reach(_open[-1].done, text)


def clear() -> None:
    """Take the bar off the terminal; the next beat draws it again."""
    with _lock:
        if _open:
            _open[-1].clear()


@contextlib.contextmanager
def heartbeat(label: str, *, quiet: bool = False) -> Iterator[None]:
    """Show the innermost open `Progress`, at least that of the whole under its `label`, while the body works."""
    stopped = threading.Event()

    def beat() -> None:
        with contextlib.suppress(OSError, ValueError):  # nobody reads standard error any more
            while not stopped.wait(BEAT):
                for progress in _open[-1:]:
                    progress.beat()

    with Progress(label, quiet=quiet):
        thread = threading.Thread(target=beat, daemon=True, name="xkd-progress")
        thread.start()
        try:
            yield
        finally:
            stopped.set()
            thread.join(timeout=BEAT)


def show_time(seconds: float) -> str:
    """Hours, minutes and seconds.

    >>> show_time(3725.4), show_time(61)
    ('1:02:05', '1:01')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"

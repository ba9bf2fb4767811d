"""Faults on order, for tests: the n-th operation of files.py fails, kills the process or cuts the power.

    XKD_FAULT=commit.write:3:ENOSPC     the third write of a commit record fails once
    XKD_FAULT=*:17:kill                 SIGKILL before operation 17, after half of it where it is a write
    XKD_FAULT=*.fsync:2:EIO+            every fsync from the second on fails
    XKD_FAULT=*:17:cut                  as kill, and what was not fsynced is lost; XKD_FAULT_SEED=5 loses a part of it

A point is WHAT.OPERATION: plan, commit, manifest, shard, rejects, tensors, tokenizer, card, sums, lock or file, then
create, write, fsync, rename, link, remove, mkdir or sync (of a folder). Only files.py calls `step`.
"""

import errno
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from xkd_schemas.errors import UsageError


@dataclass(kw_only=True)
class Journal:
    """What is not durable yet, as a strict file system counts it: data until fsync, entries until their folder's."""

    data: dict[int, int] = field(default_factory=dict)
    """inode -> descriptor of a file whose content was not fsynced."""
    entries: dict[Path, list[Callable[[], None]]] = field(default_factory=dict)
    """folder -> how to undo each change of it since it was synced."""

    def created(self, path: Path) -> None:
        """A new file, empty or not."""
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self.data[os.fstat(descriptor).st_ino] = descriptor
        self.appeared(path)

    def appeared(self, path: Path) -> None:
        """A new entry of a folder: a file, a link or a folder."""
        self.entries.setdefault(path.parent, []).append(lambda: _vanish(path))

    def renamed(self, source: Path, target: Path, replaced: bytes | None) -> None:
        """`source` became `target`, which held `replaced`."""

        def undo() -> None:
            if target.exists() and source.parent.exists():
                target.rename(source)
            if replaced is not None:
                target.write_bytes(replaced)

        self.entries.setdefault(target.parent, []).append(undo)

    def removed(self, path: Path, content: bytes) -> None:
        """An entry went away."""
        self.entries.setdefault(path.parent, []).append(lambda: _restore(path, content))

    def fsynced(self, inode: int) -> None:
        """The content of a file is durable."""
        if inode in self.data:
            os.close(self.data.pop(inode))

    def synced(self, folder: Path) -> None:
        """The entries of a folder are durable."""
        self.entries.pop(folder, None)

    def cut(self, seed: int | None) -> None:
        """Lose what is not durable: all of it, or with a seed as much as chance has it."""
        chance = random.Random(seed)
        for descriptor in self.data.values():
            size = os.fstat(descriptor).st_size
            os.ftruncate(descriptor, 0 if seed is None else chance.choice((0, size, chance.randint(0, size))))
        for folder in sorted(self.entries, key=lambda f: -len(f.parts)):
            undos = self.entries[folder]
            kept = 0 if seed is None else chance.randint(0, len(undos))
            for undo in reversed(undos[kept:]):
                undo()


def _vanish(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _restore(path: Path, content: bytes) -> None:
    if path.parent.exists():
        path.write_bytes(content)


@dataclass(kw_only=True)
class Fault:
    """One fault on order, and how often its point was passed."""

    pattern: str
    at: int
    action: str
    """Name of an errno, with + for "from then on"; kill; cut; count does nothing."""
    seed: int | None = None
    seen: int = 0
    points: list[str] = field(default_factory=list)
    """Every point that was passed, in order."""
    journal: Journal | None = None

    def step(self, point: str, torn: Callable[[], object]) -> None:
        """Pass `point`: OSError, death, or nothing."""
        if not fnmatchcase(point, self.pattern):
            return
        self.points.append(point)
        self.seen += 1
        if self.action == "count" or self.seen < self.at or (self.seen > self.at and self.action[-1] != "+"):
            return
        torn()
        if self.journal is not None:
            self.journal.cut(self.seed)
        if self.action in ("kill", "cut"):
            os.kill(os.getpid(), signal.SIGKILL)
        number = getattr(errno, self.action.rstrip("+"))
        raise OSError(number, f"{os.strerror(number)} (injected at {point})")


def fault_of(text: str, seed: str = "") -> Fault:
    """The fault that XKD_FAULT describes.

    >>> fault_of("commit.write:3:ENOSPC").at
    3

    Raises:
        UsageError: Not PATTERN:N:ACTION, or an unknown action.
    """
    pattern, _, rest = text.partition(":")
    at, _, action = rest.partition(":")
    known = action in ("kill", "cut", "count") or hasattr(errno, action.rstrip("+"))
    if not (pattern and at.isdigit() and action and known):
        raise UsageError(f"XKD_FAULT={text} is not POINT:N:ACTION", next="e.g. XKD_FAULT=commit.write:3:ENOSPC")
    journal = Journal() if action == "cut" else None
    return Fault(pattern=pattern, at=int(at), action=action, seed=int(seed) if seed else None, journal=journal)


_ordered: list[Fault] = []
"""Empty, or the fault on order; from the environment at import, from `injected` in tests."""


def order_from_environment() -> None:
    """Take the fault of XKD_FAULT, if it is set; files.py calls this once."""
    text = os.environ.get("XKD_FAULT", "")
    if text and not _ordered:
        try:
            _ordered.append(fault_of(text, os.environ.get("XKD_FAULT_SEED", "")))
        except UsageError as error:  # at an import, where no command is there yet to say it
            sys.stderr.write(f"{error}\n")
            raise SystemExit(error.exit_code) from None


@contextmanager
def injected(text: str, seed: str = "") -> Iterator[Fault]:
    """Order a fault for a while in this process."""
    fault = fault_of(text, seed)
    before = list(_ordered)
    _ordered[:] = [fault]
    try:
        yield fault
    finally:
        _ordered[:] = before


def step(point: str, torn: Callable[[], object] = lambda: None) -> None:
    """Pass a point before its operation; `torn` does half of it first where it is going to fail."""
    if _ordered:
        _ordered[0].step(point, torn)


def journal() -> Journal | None:
    """Where operations are noted when a power cut is on order."""
    return _ordered[0].journal if _ordered else None

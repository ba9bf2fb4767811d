"""A disk that fails on order: its n-th operation fails, kills the process or cuts the power.

    commit.write:3:ENOSPC     the third write of a commit record fails once
    *:17:kill                 SIGKILL before operation 17, after half of it where it is a write
    *.fsync:2:EIO+            every fsync from the second on fails
    *:17:cut                  as kill, and what was not fsynced is lost; with a seed a part of it

A point is WHAT.OPERATION. WHAT is folder, commit, rejects or tokenizer by the folder, plan, manifest, card, sums,
shard or tensors by a file's final name, else file; the operation is create, write, fsync, rename, link, remove,
mkdir or sync (of a folder).
"""

import errno
import io
import os
import random
import shutil
import signal
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from xkd_schemas import durable_files as files


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


def kind_of(path: Path) -> str:
    folders = {"commits": "commit", "rejects": "rejects", "tokenizer": "tokenizer"}
    names = {"plan.json": "plan", "manifest.json": "manifest", "README.md": "card", "SHA256SUMS": "sums"}
    suffixes = {".arrow": "shard", ".safetensors": "tensors"}
    return folders.get(path.parent.name) or names.get(path.name) or suffixes.get(path.suffix, "file")


def real(path: Path) -> Path:
    """The path without links in its folders."""
    return path.parent.resolve() / path.name


class FaultyDisk(files.Disk):
    """One fault on order; `points` are the operations that were begun, `seen` those that the pattern fits."""

    def __init__(self, text: str, seed: str = "", *, synced: bool = True) -> None:
        self.pattern, at, self.action = text.split(":")
        self.at, self.seen, self.seed, self.synced = int(at), 0, int(seed) if seed else None, synced
        self.points: list[str] = []
        self.journal = Journal()

    def step(self, point: str, torn: Callable[[], object] = lambda: None) -> None:
        """OSError, death, or nothing; `torn` does half of the operation."""
        if not fnmatchcase(point, self.pattern):
            return
        self.points.append(point)
        self.seen += 1
        if self.at == 0 or self.seen < self.at or (self.seen > self.at and self.action[-1] != "+"):
            return
        torn()
        if self.action == "cut":
            self.journal.cut(self.seed)
        if self.action in ("kill", "cut"):
            os.kill(os.getpid(), signal.SIGKILL)
        number = getattr(errno, self.action.rstrip("+"))
        raise OSError(number, f"{os.strerror(number)} (injected at {point})")

    def create(self, path: Path) -> io.RawIOBase:
        self.step(f"{kind_of(path)}.create")
        raw = super().create(path)
        self._note(self.journal.created, real(path))
        return Torn(raw, self, f"{kind_of(path)}.write")

    def fsync(self, descriptor: int) -> None:
        path, status = Path(f"/proc/self/fd/{descriptor}").readlink(), os.fstat(descriptor)
        is_folder = stat.S_ISDIR(status.st_mode)
        if not is_folder and status.st_ino not in self.journal.data:  # a library wrote it
            self._note(self.journal.created, path)
        self.step("folder.sync" if is_folder else f"{kind_of(path)}.fsync")
        if self.synced:
            super().fsync(descriptor)
            self.journal.synced(path) if is_folder else self.journal.fsynced(status.st_ino)

    def mkdir(self, folder: Path) -> None:
        self.step("folder.mkdir")
        super().mkdir(folder)
        self._note(self.journal.appeared, real(folder))

    def rename(self, source: Path, target: Path) -> None:
        self.step(f"{kind_of(target)}.rename")
        old = target.read_bytes() if target.is_file() else None
        super().rename(source, target)
        self._note(self.journal.renamed, real(source), real(target), old)

    def link(self, source: Path, target: Path) -> None:
        self.step(f"{kind_of(target)}.link")
        super().link(source, target)
        self._note(self.journal.appeared, real(target))

    def unlink(self, path: Path) -> None:
        self.step(f"{kind_of(path)}.remove")
        content = path.read_bytes() if path.is_file() else None
        super().unlink(path)
        if content is not None:
            self._note(self.journal.removed, real(path), content)

    def _note(self, change: Callable[..., None], *what: Any) -> None:
        """Only a power cut needs to know what is not durable."""
        if self.action == "cut":
            change(*what)


class Torn(io.RawIOBase):
    """A new file whose every write is an operation, of which half is done where it fails."""

    def __init__(self, raw: io.RawIOBase, disk: FaultyDisk, point: str) -> None:
        self._raw, self._disk, self._point = raw, disk, point

    def write(self, data: Any) -> int:
        view = memoryview(data)
        self._disk.step(self._point, torn=lambda: self._raw.write(view[: len(view) // 2]))
        return self._raw.write(view) or 0

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._raw.fileno()

    def close(self) -> None:
        self._raw.close()
        super().close()


@contextmanager
def injected(text: str, seed: str = "", *, synced: bool = True) -> Iterator[FaultyDisk]:
    """Order a fault for a while in this process."""
    before, files.disk = files.disk, (faulty := FaultyDisk(text, seed, synced=synced))
    try:
        yield faulty
    finally:
        files.disk = before

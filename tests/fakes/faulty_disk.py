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
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from xkd_schemas import durable_files as files
from xkd_schemas.errors import BadData


def _vanish(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def kind_of(path: Path) -> str:
    folders = {"commits": "commit", "rejects": "rejects", "tokenizer": "tokenizer"}
    names = {"plan.json": "plan", "manifest.json": "manifest", "README.md": "card", "SHA256SUMS": "sums"}
    suffixes = {".arrow": "shard", ".safetensors": "tensors"}
    return folders.get(path.parent.name) or names.get(path.name) or suffixes.get(path.suffix, "file")


def real(path: Path) -> Path:
    """The path without links in its folders."""
    return path.parent.resolve() / path.name


class FaultyDisk(files.Disk):
    """One fault on order; `points` are the operations that were begun, `seen` those that the pattern fits.

    For a power cut it notes what is not durable, as a strict file system counts it: data until fsync, entries until
    their folder's.
    """

    def __init__(self, text: str, seed: str = "", *, synced: bool = True) -> None:
        self.pattern, at, self.action = text.split(":")
        self.at, self.seen, self.seed, self.synced = int(at), 0, int(seed) if seed else None, synced
        self.points: list[str] = []
        self.data: dict[int, int] = {}  # inode -> descriptor of a file whose content was not fsynced
        self.entries: dict[Path, list[Callable[[], object]]] = {}  # folder -> how to undo each change since its sync

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
            self._lose()
        if self.action in ("kill", "cut"):
            os.kill(os.getpid(), signal.SIGKILL)
        number = getattr(errno, self.action.rstrip("+"))
        raise OSError(number, f"{os.strerror(number)} (injected at {point})")

    def _lose(self) -> None:
        """Lose what is not durable: all of it, or with a seed as much as chance has it."""
        chance = random.Random(self.seed)
        for descriptor in self.data.values():
            size = os.fstat(descriptor).st_size
            os.ftruncate(descriptor, 0 if self.seed is None else chance.choice((0, size, chance.randint(0, size))))
        for folder in sorted(self.entries, key=lambda f: -len(f.parts)):
            undos = self.entries[folder]
            kept = 0 if self.seed is None else chance.randint(0, len(undos))
            for undo in reversed(undos[kept:]):
                undo()

    def create(self, path: Path) -> io.RawIOBase:
        self.step(f"{kind_of(path)}.create")
        raw = super().create(path)
        self._created(real(path))
        return Torn(raw, self, f"{kind_of(path)}.write")

    def fsync(self, descriptor: int) -> None:
        path, status = Path(f"/proc/self/fd/{descriptor}").readlink(), os.fstat(descriptor)
        is_folder = stat.S_ISDIR(status.st_mode)
        if not is_folder and status.st_ino not in self.data:  # a library wrote it
            self._created(path)
        self.step("folder.sync" if is_folder else f"{kind_of(path)}.fsync")
        if self.synced:
            super().fsync(descriptor)
            self.entries.pop(path, None)
            if status.st_ino in self.data:
                os.close(self.data.pop(status.st_ino))

    def mkdir(self, folder: Path) -> None:
        self.step("folder.mkdir")
        super().mkdir(folder)
        self._changed(real(folder), _vanish)

    def rename(self, source: Path, target: Path) -> None:
        self.step(f"{kind_of(target)}.rename")
        old = target.read_bytes() if target.is_file() else None
        super().rename(source, target)
        back = real(source)

        def undo(path: Path) -> None:
            if path.exists() and back.parent.exists():
                path.rename(back)
            if old is not None:
                path.write_bytes(old)

        self._changed(real(target), undo)

    def link(self, source: Path, target: Path) -> None:
        self.step(f"{kind_of(target)}.link")
        super().link(source, target)
        self._changed(real(target), _vanish)

    def unlink(self, path: Path) -> None:
        self.step(f"{kind_of(path)}.remove")
        content = path.read_bytes() if path.is_file() else None
        super().unlink(path)
        if content is not None:
            self._changed(real(path), lambda path: path.parent.exists() and path.write_bytes(content))

    def _created(self, path: Path) -> None:
        if self.action == "cut":
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            self.data[os.fstat(descriptor).st_ino] = descriptor
            self._changed(path, _vanish)

    def _changed(self, path: Path, undo: Callable[[Path], object]) -> None:
        """Only a power cut needs to know how an entry of a folder was before."""
        if self.action == "cut":
            self.entries.setdefault(path.parent, []).append(lambda: undo(path))


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


def exit_code_of(work: Callable[[], object]) -> int:
    """How a copy of this process ends that does the work: 0, 65 for BadData, 1 for another error, -9 if killed."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        except BadData:
            code = BadData.exit_code
        except BaseException:
            traceback.print_exc(file=sys.__stderr__)
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

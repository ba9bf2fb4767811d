"""The only door to the disk for anything that must survive a crash: write whole, or not at all.

A file is written beside its target, fsynced, and renamed or linked; then the folder is fsynced. Every operation
is a method of `disk`, in whose place tests put one that fails.
"""

import contextlib
import errno
import fcntl
import hashlib
import io
import json
import os
import re
import shutil
import socket
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import xxhash

from xkd_schemas.errors import Busy, DiskFailed, Refused

SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_REMEDIES: Final = dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "free space") | dict.fromkeys(
    (errno.EROFS, errno.EACCES, errno.EPERM), "make it writable"
)
_BUFFER: Final = 2**20
Json = Any


class Disk:
    """The operations that a crash may fall between."""

    def create(self, path: Path) -> io.RawIOBase:
        """A new file, open for writing."""
        return path.open("xb", buffering=0)

    def fsync(self, descriptor: int) -> None:
        """Make a file's content or a folder's entries durable."""
        os.fsync(descriptor)

    def mkdir(self, folder: Path) -> None:
        """A new folder, or one that is there."""
        folder.mkdir(exist_ok=True)

    def rename(self, source: Path, target: Path) -> None:
        """Give a file another name, replacing what has it."""
        source.replace(target)

    def link(self, source: Path, target: Path) -> None:
        """Give a file a second name; FileExistsError where something has it."""
        os.link(source, target)

    def unlink(self, path: Path) -> None:
        """Remove a file, or nothing where there is none."""
        path.unlink(missing_ok=True)


disk = Disk()


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn an OSError into DiskFailed that names the path and what stays valid."""
    try:
        yield
    except OSError as error:
        raise DiskFailed(
            f"{path}: {error.strerror or error}", kept="everything committed before",
            fix=f"{_REMEDIES.get(error.errno or 0, 'look at the disk')}, run again",
        ) from error  # fmt: skip


def sync_folder(folder: Path) -> None:
    """Make renames and links inside `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        disk.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Create a folder and its parents, each durable in its own parent; nothing where it is there."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    disk.mkdir(folder)
    sync_folder(folder.parent)


def _temporary_in(folder: Path) -> Path:
    return folder / f".tmp-{os.getpid()}-{os.urandom(6).hex()}"


@contextlib.contextmanager
def written_beside(folder: Path, save: Callable[[Path], object]) -> Iterator[Path]:
    """A new temporary file in `folder` that `save` wrote, fsynced. It is removed at the end, unless it was renamed."""
    make_folder(folder)
    temporary = _temporary_in(folder)
    try:
        save(temporary)
        _sync(temporary)
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def rename(source: Path, target: Path) -> None:
    """Rename, replacing `target`; durable after `sync_folder`."""
    disk.rename(source, target)


def remove(path: Path) -> None:
    """Remove a file, or do nothing where there is none."""
    disk.unlink(path)


def replace(target: Path, content: bytes) -> None:
    """Write `content` to `target`, replacing what is there, so that a reader sees old or new and never half."""
    save_file(target, lambda path: _create(path, content))


def _create(path: Path, content: bytes) -> None:
    with io.BufferedWriter(disk.create(path), _BUFFER) as stream:
        stream.write(content)


def put_if_absent(target: Path, content: bytes) -> bool:
    """Create `target` with `content`; False, and nothing changed, if it exists already."""
    with disk_errors(target):
        with written_beside(target.parent, lambda path: _create(path, content)) as temporary:
            try:
                disk.link(temporary, target)
            except FileExistsError:
                return False
        sync_folder(target.parent)
        return True


def save_file(target: Path, save: Callable[[Path], object]) -> None:
    """Let a library write one file by its path, then make it durable and put it at `target`."""
    with disk_errors(target):
        with written_beside(target.parent, save) as temporary:
            rename(temporary, target)
        sync_folder(target.parent)


def save_folder(target: Path, save: Callable[[Path], object]) -> dict[str, str]:
    """Let a library write files into an empty folder, then put each into `target`; their sha256 by name, sorted.

    A name that the library did not write this time is left as it is. There must be one writer at a time.
    """
    with disk_errors(target):
        make_folder(target)
        for left in target.glob(".tmp-*"):  # by a writer that died
            shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
        work = _temporary_in(target)
        work.mkdir()
        try:
            save(work)
            names = sorted(path.name for path in work.iterdir())
            for name in names:
                _sync(work / name)
                rename(work / name, target / name)
        finally:
            shutil.rmtree(work, ignore_errors=True)
        sync_folder(target)
        return {name: sha256_of(target / name) for name in names}


def _sync(path: Path) -> None:
    with path.open("rb+") as stream:
        disk.fsync(stream.fileno())


@contextlib.contextmanager
def hold_lock(folder: Path) -> Iterator[None]:
    """Hold `folder/LOCK`; Busy names the process that has it. Freed by the system when we die."""
    path = folder / "LOCK"
    with disk_errors(path):
        make_folder(folder)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "another process"
            raise Busy(f"{folder} is being written by {holder}", fix="wait for it, then run this again") from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"pid {os.getpid()} on {socket.gethostname()}".encode(), 0)
        yield
    finally:
        os.close(descriptor)


def inside(root: Path, *names: str) -> Path:
    """`root/names...`, or Refused where a name is not plain or the path leaves the root through a link."""
    path = root
    for name in names:
        if not SAFE_NAME.fullmatch(name):
            raise Refused(f"{root}: {name!r} is not a plain file name", fix="rebuild the cache from a trusted source")
        path = path / name
        if path.is_symlink():
            raise Refused(f"{path} is a symbolic link", fix="copy the file into the cache")
    return path


def bytes_below(folder: Path) -> int:
    """Bytes of all files of a folder, at any depth; files that vanish meanwhile count as nothing."""
    size = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            status = path.lstat()
            size += status.st_size if stat.S_ISREG(status.st_mode) else 0
    return size


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file: its identity."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def canonical(value: Json) -> bytes:
    """JSON with sorted keys, no blanks and no NaN: equal values give equal bytes."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return text.encode()


def digest(value: Json) -> str:
    """Hex sha256 of the canonical JSON: names content."""
    return hashlib.sha256(canonical(value)).hexdigest()


def xxh3_of(data: bytes | memoryview) -> str:
    """Hex xxh3-64 of bytes: finds accidents on every read, does not resist tampering."""
    return str(xxhash.xxh3_64_hexdigest(data))


# Temporary folders that a killed process leaves, and that the next run removes.
#
# The process that makes such a folder holds a lock on it, which the system frees when the process ends. So a folder
# whose lock is free has no owner, whatever process number its name has: numbers are given again. Where the file system
# cannot lock a folder (some network ones), nothing is removed.


@contextlib.contextmanager
def own_folder(parent: Path, prefix: str, *, mode: int = 0o777) -> Iterator[Path]:
    """A new folder `parent/PREFIX...`; removed at the end, unless it was renamed by then.

    Folders of the same prefix that no live process owns are removed first. With XKD_DEBUG set it stays until then.
    """
    remove_ownerless(parent, prefix)
    folder, descriptor = _make_locked(parent, prefix, mode)
    try:
        yield folder
    finally:
        if not os.environ.get("XKD_DEBUG"):
            shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)


def _make_locked(parent: Path, prefix: str, mode: int) -> tuple[Path, int]:
    while True:
        folder = parent / f"{prefix}{os.getpid()}-{os.urandom(3).hex()}"
        folder.mkdir(mode=mode)
        with contextlib.suppress(FileNotFoundError):  # another process removed it before it was locked
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            with contextlib.suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            if folder.is_dir() and os.path.samestat(folder.stat(), os.fstat(descriptor)):
                return folder, descriptor
            os.close(descriptor)


def remove_ownerless(parent: Path, prefix: str) -> None:
    """Remove this user's folders `parent/PREFIX...` whose lock nobody holds; links and other users' stay."""
    for folder in parent.glob(f"{prefix}*"):
        with contextlib.suppress(OSError):
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                if os.fstat(descriptor).st_uid == os.getuid():
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(folder)
            finally:
                os.close(descriptor)

"""The only door to the disk for anything that must survive a crash: write whole, or not at all.

A file is written beside its target, fsynced, and renamed or linked; then the folder is fsynced. Every operation
passes a point of faults.py first, where tests let it fail.
"""

import contextlib
import errno
import fcntl
import hashlib
import io
import os
import re
import shutil
import socket
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, Final

import xxhash

from xkd_schemas import faults
from xkd_schemas.errors import Busy, DiskFailed, Refused

faults.order_from_environment()

SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn an OSError into DiskFailed that names the path and what stays valid."""
    try:
        yield
    except OSError as error:
        raise DiskFailed(
            f"{path}: {error.strerror or error}", kept="everything committed before",
            next=f"{_REMEDIES.get(error.errno or 0, 'look at the disk')}, run again",
        ) from error  # fmt: skip


_REMEDIES: Final = dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "free space") | dict.fromkeys(
    (errno.EROFS, errno.EACCES, errno.EPERM), "make it writable"
)


def kind_of(path: Path) -> str:
    """What a file is, for the points of faults.py.

    >>> kind_of(Path("cache/documents/commits/00001.json"))
    'commit'
    """
    folders = {"commits": "commit", "rejects": "rejects", "tokenizer": "tokenizer"}
    names = {"plan.json": "plan", "manifest.json": "manifest", "README.md": "card", "SHA256SUMS": "sums"}
    suffixes = {".arrow": "shard", ".safetensors": "tensors"}
    return folders.get(path.parent.name) or names.get(path.name) or suffixes.get(path.suffix, "file")


def _fsync(descriptor: int) -> None:
    """Make a file's content or a folder's entries durable; the tests' control puts nothing in its place."""
    os.fsync(descriptor)
    if (journal := faults.journal()) is not None:
        journal.fsynced(os.fstat(descriptor).st_ino)
        journal.synced(Path(f"/proc/self/fd/{descriptor}").readlink())


def sync_folder(folder: Path) -> None:
    """Make renames and links inside `folder` durable."""
    faults.step("folder.sync")
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        _fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Create a folder and its parents, each durable in its own parent; nothing where it is there."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    faults.step("folder.mkdir")
    folder.mkdir(exist_ok=True)
    if (journal := faults.journal()) is not None:
        journal.appeared(folder.resolve())
    sync_folder(folder.parent)


class _Watched(io.RawIOBase):
    """A new file whose every write to the system passes a point of faults.py."""

    def __init__(self, raw: io.FileIO, point: str) -> None:
        self._raw = raw
        self._point = point

    def write(self, data: Any) -> int:
        view = memoryview(data)
        faults.step(self._point, torn=lambda: self._raw.write(view[: len(view) // 2]))
        return self._raw.write(view)

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._raw.fileno()

    def close(self) -> None:
        self._raw.close()
        super().close()


def _temporary_in(folder: Path) -> Path:
    return folder / f".tmp-{os.getpid()}-{os.urandom(6).hex()}"


def write_beside(folder: Path, write: Callable[[IO[bytes]], None], kind: str = "file") -> Path:
    """Write a new temporary file in `folder`, fsync it, and return its path. Nothing is left on failure."""
    make_folder(folder)
    temporary = _temporary_in(folder)
    try:
        faults.step(f"{kind}.create")
        with io.BufferedWriter(_Watched(temporary.open("xb", buffering=0), f"{kind}.write"), _BUFFER) as stream:
            _note_created(temporary)
            write(stream)
            stream.flush()
            faults.step(f"{kind}.fsync")
            _fsync(stream.fileno())
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return temporary


_BUFFER: Final = 2**20


def _note_created(path: Path) -> None:
    if (journal := faults.journal()) is not None:
        journal.created(path.resolve())


def rename(source: Path, target: Path) -> None:
    """Rename, replacing `target`; durable after `sync_folder`."""
    faults.step(f"{kind_of(target)}.rename")
    journal = faults.journal()
    old = target.read_bytes() if journal is not None and target.is_file() else None
    source.replace(target)
    if journal is not None:
        journal.renamed(source.parent.resolve() / source.name, target.parent.resolve() / target.name, old)


def remove(path: Path) -> None:
    """Remove a file, or do nothing where there is none."""
    faults.step(f"{kind_of(path)}.remove")
    journal = faults.journal()
    content = path.read_bytes() if journal is not None and path.is_file() else None
    path.unlink(missing_ok=True)
    if journal is not None and content is not None:
        journal.removed(path.parent.resolve() / path.name, content)


def replace(target: Path, content: bytes) -> None:
    """Write `content` to `target`, replacing what is there, so that a reader sees old or new and never half."""
    with disk_errors(target):
        temporary = write_beside(target.parent, lambda stream: _write_all(stream, content), kind_of(target))
        rename(temporary, target)
        sync_folder(target.parent)


def put_if_absent(target: Path, content: bytes) -> bool:
    """Create `target` with `content`; False, and nothing changed, if it exists already."""
    with disk_errors(target):
        temporary = write_beside(target.parent, lambda stream: _write_all(stream, content), kind_of(target))
        try:
            faults.step(f"{kind_of(target)}.link")
            os.link(temporary, target)
            if (journal := faults.journal()) is not None:
                journal.appeared(target.parent.resolve() / target.name)
        except FileExistsError:
            return False
        finally:
            remove(temporary)
        sync_folder(target.parent)
        return True


def saved(target: Path, save: Callable[[Path], object]) -> None:
    """Let a library write one file by its path, then make it durable and put it at `target`."""
    with disk_errors(target):
        make_folder(target.parent)
        temporary = _temporary_in(target.parent)
        try:
            _save(temporary, save, kind_of(target))
            rename(temporary, target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(target.parent)


def saved_folder(target: Path, save: Callable[[Path], object]) -> list[str]:
    """Let a library write files into an empty folder, then put each into `target`; their names, sorted.

    A name that the library did not write this time is left as it is. There must be one writer at a time.
    """
    with disk_errors(target):
        make_folder(target)
        for left in target.glob(".tmp-*"):  # by a writer that died
            shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
        work = _temporary_in(target)
        work.mkdir()
        try:
            faults.step("tokenizer.create")
            save(work)
            names = sorted(path.name for path in work.iterdir())
            for name in names:
                _synced(work / name, "tokenizer")
                rename(work / name, target / name)
        finally:
            shutil.rmtree(work, ignore_errors=True)
        sync_folder(target)
        return names


def _save(path: Path, save: Callable[[Path], object], kind: str) -> None:
    faults.step(f"{kind}.create")
    faults.step(f"{kind}.write", torn=path.touch)
    save(path)
    _synced(path, kind)


def _synced(path: Path, kind: str) -> None:
    _note_created(path)
    faults.step(f"{kind}.fsync")
    with path.open("rb+") as stream:
        _fsync(stream.fileno())


def lock_file(path: Path) -> int:
    """Descriptor of a lock file, created where it is not there; no forked child keeps it over an exec."""
    with disk_errors(path):
        make_folder(path.parent)
        faults.step("lock.create")
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold `folder/LOCK`; Busy names the process that has it. Freed by the system when we die."""
    descriptor = lock_file(folder / "LOCK")
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "another process"
            raise Busy(f"{folder} is being written by {holder}", next="wait for it, then run this again") from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"pid {os.getpid()} on {socket.gethostname()}".encode(), 0)
        yield
    finally:
        os.close(descriptor)


def _write_all(stream: IO[bytes], content: bytes) -> None:
    stream.write(content)


def inside(root: Path, *names: str) -> Path:
    """`root/names...`, or Refused where a name is not plain or the path leaves the root through a link."""
    path = root
    for name in names:
        if not SAFE_NAME.fullmatch(name):
            raise Refused(f"{root}: {name!r} is not a plain file name", next="rebuild the cache from a trusted source")
        path = path / name
        if path.is_symlink():
            raise Refused(f"{path} is a symbolic link", next="copy the file into the cache")
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


def xxh3_of(data: bytes | memoryview) -> str:
    """Hex xxh3-64 of bytes: finds accidents on every read, does not resist tampering."""
    return str(xxhash.xxh3_64_hexdigest(data))

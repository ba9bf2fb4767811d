"""The only door to the disk for anything that must survive a crash: write whole, or not at all.

A file is written beside its target, fsynced, and renamed or linked; then the folder is fsynced.
"""

import contextlib
import hashlib
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import xxhash

from xkd_schemas.errors import DiskFailed, Refused

SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn an OSError into DiskFailed that names the path and what stays valid."""
    try:
        yield
    except OSError as error:
        raise DiskFailed(
            f"{path}: {error.strerror or error}", kept="everything committed before", next="free space, run again"
        ) from error


def sync_folder(folder: Path) -> None:
    """Make renames and links inside `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_beside(folder: Path, write: Callable[[IO[bytes]], None]) -> Path:
    """Write a new temporary file in `folder`, fsync it, and return its path. Nothing is left on failure."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".tmp-{os.getpid()}-{os.urandom(6).hex()}"
    try:
        with temporary.open("xb") as stream:
            write(stream)
            stream.flush()
            os.fsync(stream.fileno())
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return temporary


def replace(target: Path, content: bytes) -> None:
    """Write `content` to `target`, replacing what is there, so that a reader sees old or new and never half."""
    with disk_errors(target):
        temporary = write_beside(target.parent, lambda stream: _write_all(stream, content))
        temporary.replace(target)
        sync_folder(target.parent)


def put_if_absent(target: Path, content: bytes) -> bool:
    """Create `target` with `content`; False, and nothing changed, if it exists already."""
    with disk_errors(target):
        temporary = write_beside(target.parent, lambda stream: _write_all(stream, content))
        try:
            os.link(temporary, target)
        except FileExistsError:
            return False
        finally:
            temporary.unlink(missing_ok=True)
        sync_folder(target.parent)
        return True


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


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file: its identity."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def xxh3_of(data: bytes | memoryview) -> str:
    """Hex xxh3-64 of bytes: finds accidents on every read, does not resist tampering."""
    return str(xxhash.xxh3_64_hexdigest(data))

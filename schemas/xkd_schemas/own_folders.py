"""Temporary folders that a killed process leaves, and that the next run removes.

The process that makes such a folder holds a lock on it, which the system frees when the process ends. So a folder
whose lock is free has no owner, whatever process number its name has: numbers are given again. Where the file system
cannot lock a folder (some network ones), nothing is removed.
"""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def own_folder(parent: Path, prefix: str, *, mode: int = 0o777) -> Iterator[Path]:
    """A new folder `parent/PREFIX...`; removed at the end, unless it was renamed by then.

    Folders of the same prefix that no live process owns are removed first. With XKD_DEBUG set it stays until then.
    """
    remove_ownerless(parent, prefix)
    folder, descriptor = _made(parent, prefix, mode)
    try:
        yield folder
    finally:
        if not os.environ.get("XKD_DEBUG"):
            shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)


def _made(parent: Path, prefix: str, mode: int) -> tuple[Path, int]:
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

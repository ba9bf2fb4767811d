"""The only door to fsspec: a corpus at any address it knows (s3://, gs://, https://, memory://) is copied once."""

import atexit
import contextlib
import functools
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, Final

from xkd_schemas.durable_files import disk_errors
from xkd_schemas.errors import InputMissing, UsageError, XkdError

_URL: Final = re.compile(r"[a-z][a-z0-9+.-]*(::[a-z][a-z0-9+.-]*)*://.+", re.DOTALL)
COPY_BYTES: Final = 4 << 20


def is_url(name: str) -> bool:
    """True for what fsspec shall open.

    >>> is_url("s3://bucket/a.jsonl"), is_url("data/a.jsonl"), is_url("owner/name:train")
    (True, False, False)
    """
    return _URL.fullmatch(name) is not None


def shown(url: str) -> str:
    """The address without name, password and query, which may be secrets.

    >>> shown("https://me:secret@host/a.jsonl?token=1")
    'https://host/a.jsonl'
    """
    return re.sub(r"://[^/@]*@", "://", url.split("?", 1)[0])


@functools.cache
def local_copy(url: str) -> Path:
    """A remote file under its own name in a folder of this process, copied once and removed when it ends.

    Raises:
        InputMissing: Not there or out of reach.
        UsageError: The address's kind needs a package that is not installed.
    """
    name = PurePosixPath(shown(url)).name
    files, path = _store_of(url)
    with _remote_errors(url):
        if not files.isfile(path):
            raise InputMissing(f"{shown(url)} is not a file there", fix="name one file, with its ending")
    folder = Path(tempfile.mkdtemp(prefix="xkd-corpus-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    _download(files, path, folder / name, url)
    return folder / name


def _store_of(url: str) -> tuple[Any, str]:
    """(file system, path in it)"""
    import fsspec

    try:
        files, path = fsspec.core.url_to_fs(url)
    except ImportError as error:
        package = str(error).split("\n")[0][:120]
        raise UsageError(f"{shown(url)}: {package}", fix="pip install what it names, e.g. pip install s3fs") from error
    except ValueError as error:
        raise UsageError(f"{shown(url)}: {str(error)[:120]}", fix="check the beginning of the address") from error
    return files, str(path)


@contextlib.contextmanager
def _remote_errors(url: str) -> Iterator[None]:
    """Turn whatever a store's own library raises into InputMissing, one line without secrets."""
    try:
        yield
    except XkdError:
        raise
    except Exception as error:  # stores raise what their own libraries raise
        said = getattr(error, "strerror", None) or error
        line = " ".join(str(said).split())[:160].replace(url, shown(url))
        raise InputMissing(f"{shown(url)}: {line or type(error).__name__}", fix="check address and access") from error


def _download(files: Any, path: str, target: Path, url: str) -> None:
    with disk_errors(target):
        stream = target.open("wb")
    with stream, _remote_errors(url), files.open(path, "rb") as source:
        while chunk := source.read(COPY_BYTES):
            with disk_errors(target):
                stream.write(chunk)
                stream.flush()

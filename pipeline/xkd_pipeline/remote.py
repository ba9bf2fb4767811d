"""The only door to fsspec: corpora, and sealed caches, at any address it knows (s3://, gs://, https://, memory://).

A remote store has no fsync, link or lock, so nothing is ever made there: a cache is published when it is sealed, its
manifests last; fetch.py brings it back.
"""

import atexit
import contextlib
import functools
import hashlib
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any, Final

from xkd_schemas.errors import BadData, InputMissing, Mismatch, UsageError, XkdError
from xkd_schemas.files import disk_errors, inside, rename, sha256_of, sync_folder, write_beside
from xkd_schemas.manifest import Manifest, read_record
from xkd_schemas.table import sealed_tables

_URL: Final = re.compile(r"[a-z][a-z0-9+.-]*(::[a-z][a-z0-9+.-]*)*://.+", re.DOTALL)
_LINE: Final = re.compile(r"([0-9a-f]{64})  (.+)")
SUMS: Final = "SHA256SUMS"
MAX_SUMS_BYTES: Final = 256 << 20
"""A larger list of files is refused."""
COPY_BYTES: Final = 4 << 20
OBJECT_STORES: Final = frozenset(("s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "oss", "oci"))
"""They have no folders; asked for one, some would make a bucket of a mistyped name."""


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


def local_copy(url: str) -> Path:
    """A remote file under its own name in a folder of this process, copied once and removed when it ends.

    Raises:
        InputMissing: Not there or out of reach.
        UsageError: The address's kind needs a package that is not installed.
    """
    return _copied(url)


@functools.cache
def _copied(url: str) -> Path:
    name = PurePosixPath(shown(url)).name
    files, path = store_of(url)
    with remote_errors(url):
        if not files.isfile(path):
            raise InputMissing(f"{shown(url)} is not a file there", next="name one file, with its ending")
    folder = Path(tempfile.mkdtemp(prefix="xkd-corpus-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    downloaded(files, path, folder / name, url)
    return folder / name


def publish(root: Path, url: str) -> dict[str, Any]:
    """Copy a sealed cache to `url`: data first, then the manifests, then the list of digests that makes it whole.

    Raises:
        InputMissing: No sealed cache.
        BadData: A file is not what SHA256SUMS says.
        UsageError: `url` is no address, or there is something else at it.
    """
    if not is_url(url):
        raise UsageError(f"{url} is not an address", next="e.g. s3://bucket/cache or file:///mnt/share/cache")
    sums = _sums(root)
    files, path = store_of(url)
    base = path.rstrip("/")
    with remote_errors(url):
        if files.exists(f"{base}/{SUMS}"):
            theirs = files.cat_file(f"{base}/{SUMS}")
            if theirs != (root / SUMS).read_bytes():
                raise Mismatch(f"{shown(url)} holds another cache", kept="it as it is", next="name an empty address")
    for name in sorted(sums, key=lambda name: (name.endswith("manifest.json"), name)):
        source = inside(root, *name.split("/"))
        if not source.is_file() or sha256_of(source) != sums[name]:
            raise BadData(
                f"{source} is not what {SUMS} says", kept="what is at the address has no manifest yet",
                next="run the command that made the cache again",
            )  # fmt: skip
        _upload(files, source, f"{base}/{name}", url)
    _upload(files, root / SUMS, f"{base}/{SUMS}", url)
    return {"url": shown(url), "files": len(sums) + 1, "bytes": sum((root / name).stat().st_size for name in sums)}


def check_sealed(root: Path) -> None:
    """Raise InputMissing or BadData where a table of the cache is not whole."""
    for name in sealed_tables(root):
        read_record(inside(root, *name.split("/"), "manifest.json"), Manifest)


def _sums(root: Path) -> dict[str, str]:
    if not root.is_dir():
        raise InputMissing(f"cache {root} is not a folder", next="make one with xkd-cache documents")
    check_sealed(root)
    begun = [p.parent for p in root.glob("*/*/plan.json") if not (p.parent / "manifest.json").is_file()]
    if begun:
        raise UsageError(f"{begun[0]} is not finished", next="finish or delete it, then publish")
    try:
        content = (root / SUMS).read_bytes()
    except OSError as error:
        raise InputMissing(f"{root / SUMS}: {error.strerror}", next="run the last xkd-cache command again") from error
    return parsed_sums(content, str(root))


def parsed_sums(content: bytes, where: str) -> dict[str, str]:
    """Name to sha256 of a SHA256SUMS; BadData for a broken line, Refused for a name that is not plain.

    >>> parsed_sums(b"00" * 32 + b"  documents/plan.json\\n", "x")["documents/plan.json"][:4]
    '0000'
    """
    found: dict[str, str] = {}
    for number, line in enumerate(content.decode("utf-8", "replace").split("\n")[:-1], start=1):
        match = _LINE.fullmatch(line)
        if match is None or match[2] in found:
            raise BadData(f"{where}/{SUMS}: line {number} is no digest and new name", next="publish the cache again")
        inside(Path(where), *match[2].split("/"))
        found[match[2]] = match[1]
    return found


def store_of(url: str) -> tuple[Any, str]:
    """(file system, path in it)"""
    import fsspec

    try:
        files, path = fsspec.core.url_to_fs(url)
    except ImportError as error:
        package = str(error).split("\n")[0][:120]
        raise UsageError(
            f"{shown(url)}: {package}", next="pip install what it names, e.g. pip install s3fs"
        ) from error
    except ValueError as error:
        raise UsageError(f"{shown(url)}: {str(error)[:120]}", next="check the beginning of the address") from error
    return files, str(path)


@contextlib.contextmanager
def remote_errors(url: str) -> Iterator[None]:
    """Turn whatever a store's own library raises into InputMissing, one line without secrets."""
    try:
        yield
    except XkdError:
        raise
    except Exception as error:  # stores raise what their own libraries raise
        said = getattr(error, "strerror", None) or error
        line = " ".join(str(said).split())[:160].replace(url, shown(url))
        raise InputMissing(f"{shown(url)}: {line or type(error).__name__}", next="check address and access") from error


def downloaded(files: Any, path: str, target: Path, url: str) -> str:
    """Copy one file to `target`, where it appears whole and durable; sha256 of its bytes."""
    digest = hashlib.sha256()

    def write(stream: IO[bytes]) -> None:
        with remote_errors(url), files.open(path, "rb") as source:
            while chunk := source.read(COPY_BYTES):
                digest.update(chunk)
                with disk_errors(target):
                    stream.write(chunk)

    with disk_errors(target):
        temporary = write_beside(target.parent, write)
        rename(temporary, target)
        sync_folder(target.parent)
    return digest.hexdigest()


def _upload(files: Any, source: Path, path: str, url: str) -> None:
    with remote_errors(url):
        if not OBJECT_STORES & set([files.protocol] if isinstance(files.protocol, str) else files.protocol):
            files.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
        with source.open("rb") as stream, files.open(path, "wb") as target:
            shutil.copyfileobj(stream, target, COPY_BYTES)

"""Sealed caches at an address (address.py): a remote store has no fsync, link or lock, so nothing is ever made there.

A cache is published when it is sealed, its manifests last; fetch.py brings it back.
"""

import re
import shutil
from pathlib import Path
from typing import Any, Final

from xkd_schemas.address import COPY_BYTES, is_url, remote_errors, shown, store_of
from xkd_schemas.errors import BadData, InputMissing, Mismatch, UsageError
from xkd_schemas.files import inside, sha256_of
from xkd_schemas.manifest import Manifest, read_record
from xkd_schemas.table import check_cache, sealed_tables

_LINE: Final = re.compile(r"([0-9a-f]{64})  (.+)")
SUMS: Final = "SHA256SUMS"
MAX_SUMS_BYTES: Final = 256 << 20
"""A larger list of files is refused."""
OBJECT_STORES: Final = frozenset(("s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "oss", "oci"))
"""They have no folders; asked for one, some would make a bucket of a mistyped name."""


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
    check_cache(root)
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


def _upload(files: Any, source: Path, path: str, url: str) -> None:
    with remote_errors(url):
        if not OBJECT_STORES & set([files.protocol] if isinstance(files.protocol, str) else files.protocol):
            files.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
        with source.open("rb") as stream, files.open(path, "wb") as target:
            shutil.copyfileobj(stream, target, COPY_BYTES)

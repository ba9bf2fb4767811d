"""A published cache becomes a folder here: whole, or not there under its name.

Files arrive in a folder beside the target, each under its name only when it is on the disk and has the digest of the
list. A fetch that was killed or lost its connection goes on with them; the last step is one rename.
"""

from pathlib import Path
from typing import Any, Final

from xkd_pipeline.parquet import refuse_full
from xkd_pipeline.remote import MAX_SUMS_BYTES, SUMS, check_sealed, parsed_sums
from xkd_pipeline.store import locked
from xkd_schemas.address import downloaded, is_url, remote_errors, shown, store_of
from xkd_schemas.errors import BadData, InputMissing, Refused, UsageError, XkdError
from xkd_schemas.files import disk_errors, inside, remove, rename, sha256_of, sync_folder

LOCK: Final = "LOCK"


def fetch(url: str, folder: Path) -> dict[str, Any]:
    """Copy a published cache to a new folder; it has its name only when every digest was right.

    Returns:
        The folder, its bytes, and how many files an earlier fetch had left.

    Raises:
        InputMissing: No published cache at the address.
        UsageError: `folder` is there, and neither empty nor this cache whole.
        Refused: A name in the list leaves the folder.
        BadData: A file is not what the list says.
        DiskFailed: The disk is full or fails.
        Busy: Another process fetches to the same folder.
    """
    if not is_url(url):
        raise UsageError(f"{url} is not an address", next="e.g. s3://bucket/cache")
    if not (folder / SUMS).is_file():
        refuse_full(folder)
    sums = _list_of(url)
    if folder.is_dir() and any(folder.iterdir()):
        return _there(folder, sums, url)
    partial = folder.parent / f".{folder.name}.fetching"
    if partial.is_symlink():
        raise Refused(f"{partial} is a symbolic link", next="remove it")
    with locked(partial):
        try:
            size, kept = _filled(url, sums, partial)
            with disk_errors(partial):
                remove(partial / LOCK)
                sync_folder(partial)
        except XkdError as error:
            error.kept = f"what arrived whole, in {partial}; the same command goes on"
            raise
        with disk_errors(folder):
            if folder.is_dir():
                folder.rmdir()
            rename(partial, folder)
            sync_folder(folder.parent)
    return {"cache": str(folder), "bytes": size, "kept": kept}


def _there(folder: Path, sums: bytes, url: str) -> dict[str, Any]:
    """What `fetch` says where the cache was fetched before; UsageError where the folder holds anything else."""
    wanted = parsed_sums(sums, shown(url))
    paths = {inside(folder, *name.split("/")): digest for name, digest in wanted.items()}
    whole = all(path.is_file() and sha256_of(path) == digest for path, digest in paths.items())
    if folder.is_symlink() or not whole or (folder / SUMS).read_bytes() != sums:
        refuse_full(folder)
    return {"cache": str(folder), "bytes": sum(path.stat().st_size for path in paths), "kept": len(paths)}


def _list_of(url: str) -> bytes:
    """The list of digests; nothing is written before it was read and makes sense."""
    files, path = store_of(url)
    name = f"{path.rstrip('/')}/{SUMS}"
    with remote_errors(url):
        if not files.exists(name):
            raise InputMissing(f"{shown(url)} holds no {SUMS}, so no published cache", next="check the address")
        if files.size(name) > MAX_SUMS_BYTES:
            raise Refused(f"{shown(url)}/{SUMS} is larger than {MAX_SUMS_BYTES} bytes", next="look at the address")
        content = bytes(files.cat_file(name))
    parsed_sums(content, shown(url))
    return content


def _filled(url: str, sums: bytes, folder: Path) -> tuple[int, int]:
    """Every file of the list in `folder`, and no other; (bytes, files that were there already)."""
    files, path = store_of(url)
    wanted = parsed_sums(sums, shown(url))
    targets = {inside(folder, *name.split("/")): name for name in wanted}
    with disk_errors(folder):
        for other in [p for p in folder.rglob("*") if not p.is_dir() and p not in targets and p != folder / LOCK]:
            remove(other)
    size = kept = 0
    for target, name in targets.items():
        if target.is_file() and sha256_of(target) == wanted[name]:
            kept += 1
        elif downloaded(files, f"{path.rstrip('/')}/{name}", target, url) != wanted[name]:
            remove(target)
            raise BadData(f"{shown(url)}/{name} is not what {SUMS} says", next="fetch again, or publish it again")
        size += target.stat().st_size
    downloaded(files, f"{path.rstrip('/')}/{SUMS}", folder / SUMS, url)
    if (folder / SUMS).read_bytes() != sums:
        raise BadData(f"{shown(url)}/{SUMS} changed while it was fetched", next="fetch again")
    check_sealed(folder)
    return size, kept

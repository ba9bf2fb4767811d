"""Clear away what nothing in a cache refers to, and tables that nobody wants any more."""

import contextlib
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from xkd_pipeline.maintain.verify import tables_of
from xkd_pipeline.tables.dataset_card import forget
from xkd_pipeline.tables.writer import locked
from xkd_schemas.cache.manifest import Commit, Manifest, Plan, read_record, record_or_none, record_paths
from xkd_schemas.durable_files import bytes_below, disk_errors, inside, remove, sync_folder
from xkd_schemas.errors import BadData, InputMissing, UsageError

YOUNG_SECONDS: Final = 60.0
"""A file that no record names may still belong to a writer that is dying; younger ones are left."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Orphan:
    """A file that nothing refers to."""

    file: Path
    size: int
    why: str


def collect(root: Path, *, older_than: float, dry_run: bool) -> list[Orphan]:
    """Remove unreferenced shards and rejects, leftovers of writers that died, and quarantine older than so many hours.

    With `dry_run` only say what would go. A table whose records cannot all be read keeps every shard: what they name
    is not known.
    """
    folders = [inside(root, *name.split("/")) for name in tables_of(root)]
    with contextlib.nullcontext() if dry_run else locked(root):
        young, old = time.time() - YOUNG_SECONDS, time.time() - 3600 * older_than
        found: list[Orphan] = []
        for folder in (root, *folders):
            for place in (folder, *(folder / name for name in ("commits", "rejects", "tokenizer"))):
                found += _list_orphans(place.glob(".tmp-*"), "left by a writer that died", young)
            found += _list_orphans((folder / "quarantine").glob("*"), "quarantined", old)
        for folder in folders:
            loose = [*folder.glob("*.arrow"), *folder.glob("rejects/*.jsonl")]
            named = _referenced_files(folder, {path.name for path in loose})
            found += _list_orphans((p for p in loose if p.name not in named), "no record names it", young)
        if not dry_run:
            _remove(found)
    return found


def _list_orphans(paths: Iterable[Path], why: str, before: float) -> Iterator[Orphan]:
    for path in sorted(paths):
        for file in sorted(path.rglob("*")) if path.is_dir() and not path.is_symlink() else [path]:
            status = file.lstat()
            if status.st_mtime <= before and not file.is_dir():
                yield Orphan(file=file, size=status.st_size, why=why)


def _referenced_files(folder: Path, everything: set[str]) -> set[str]:
    """Names of the shards and rejects that a table's records name; `everything` where one cannot be read."""
    try:
        records = [read_record(path, Commit) for path in record_paths(folder)]
        if (folder / "manifest.json").exists():
            records += read_record(folder / "manifest.json", Manifest).commits
    except (BadData, InputMissing):
        return everything
    return {r.file for r in records} | {r.rejects.file for r in records if r.rejects is not None}


def _remove(found: Sequence[Orphan]) -> None:
    for one in found:
        with disk_errors(one.file):
            remove(one.file)
    for folder in {one.file.parent for one in found}:
        with disk_errors(folder):
            if folder.name.startswith(".tmp-") and not any(folder.iterdir()):
                folder.rmdir()
            else:
                sync_folder(folder)


def drop(root: Path, table: str) -> int:
    """Remove a table, finished or not; its bytes. Interrupted, it goes on when it is called again.

    Raises:
        UsageError: It is the documents, there is no such table, or other tables were made from it.
        Busy: Another process writes to the cache.
    """
    known = [name for name in tables_of(root) if "/" in name]
    if table not in known:
        raise UsageError(
            f"{root} has no table {table} that can be dropped", fix=f"use one of: {', '.join(known) or 'none'}"
        )
    folder = inside(root, *table.split("/"))
    with locked(root):
        plans = ((name, record_or_none(inside(root, *name.split("/"), "plan.json"), Plan)) for name in known)
        made = [name for name, plan in plans if plan and table == f"teachers/{plan.spec.get('teacher', '')}"]
        if made:
            fix = f"first: xkd-cache drop {root} {made[0]}"
            raise UsageError(f"{', '.join(made)} {'was' if len(made) == 1 else 'were'} made from {table}", fix=fix)
        size = bytes_below(folder)
        with disk_errors(folder):
            remove(folder / "manifest.json")
            sync_folder(folder)
            forget(root, table)
            shutil.rmtree(folder)
            sync_folder(folder.parent)
    return size

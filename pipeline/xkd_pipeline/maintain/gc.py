"""Clear away what nothing in a cache refers to, and tables that nobody wants any more."""

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from xkd_pipeline.maintain.verify import tables_of
from xkd_pipeline.tables.dataset_card import forget
from xkd_pipeline.tables.writer import locked
from xkd_schemas.cache.manifest import Commit, Manifest, Plan, read_record, record_paths
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


def find_orphans(root: Path, *, older_than: float) -> list[Orphan]:
    """Unreferenced shards and rejects, leftovers of writers that died, and quarantine older than `older_than` hours.

    A table whose records cannot all be read keeps every shard: what they name is not known.
    """
    moment = time.time()
    found: list[Orphan] = []
    for folder in (root, *(inside(root, *name.split("/")) for name in tables_of(root))):
        for place in (folder, *(folder / name for name in ("commits", "rejects", "tokenizer"))):
            found += _list_orphans(place.glob(".tmp-*"), "left by a writer that died", moment - YOUNG_SECONDS)
        found += _list_orphans((folder / "quarantine").glob("*"), "quarantined", moment - 3600 * older_than)
        named = _referenced_files(folder) if folder != root else None
        if named is not None:
            files = (*folder.glob("*.arrow"), *folder.glob("rejects/*.jsonl"))
            loose = [path for path in files if path.name not in named]
            found += _list_orphans(loose, "no record names it", moment - YOUNG_SECONDS)
    return found


def _list_orphans(paths: Any, why: str, before: float) -> list[Orphan]:
    found = []
    for path in sorted(paths):
        for file in sorted(path.rglob("*")) if path.is_dir() and not path.is_symlink() else [path]:
            status = file.lstat()
            if status.st_mtime <= before and not file.is_dir():
                found.append(Orphan(file=file, size=status.st_size, why=why))
    return found


def _referenced_files(folder: Path) -> set[str] | None:
    records: list[Commit] = []
    try:
        records += [read_record(path, Commit) for path in record_paths(folder)]
        if (folder / "manifest.json").exists():
            records += read_record(folder / "manifest.json", Manifest).commits
    except (BadData, InputMissing):
        return None
    return {r.file for r in records} | {r.rejects.file for r in records if r.rejects is not None}


def collect(root: Path, *, older_than: float, dry_run: bool) -> list[Orphan]:
    """Remove orphans, holding the lock; with `dry_run` only say what would go."""
    if dry_run:
        return find_orphans(root, older_than=older_than)
    tables_of(root)  # a folder that is no cache gets no lock file
    with locked(root):
        found = find_orphans(root, older_than=older_than)
        _remove(found)
    return found


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
        made = [name for name in known if table == f"teachers/{_teacher_of(inside(root, *name.split('/')))}"]
        if made:
            raise UsageError(f"{', '.join(made)} was made from {table}", fix=f"first: xkd-cache drop {root} {made[0]}")
        size = bytes_below(folder)
        with disk_errors(folder):
            remove(folder / "manifest.json")
            sync_folder(folder)
            forget(root, table)
            shutil.rmtree(folder)
            sync_folder(folder.parent)
    return size


def _teacher_of(folder: Path) -> str:
    """Name of the teacher that a table was made from; "" where it was made from none."""
    try:
        return str(read_record(folder / "plan.json", Plan).spec.get("teacher", ""))
    except (BadData, InputMissing):
        return ""

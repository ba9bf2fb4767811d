"""How far the tables of a cache are, from plans, commit records and sizes of files: no shard is opened."""

from pathlib import Path
from typing import Any, TypeVar

from xkd_schemas.additions import plans_of, records_of
from xkd_schemas.cache_files import refuse_links
from xkd_schemas.errors import BadData
from xkd_schemas.files import bytes_below
from xkd_schemas.manifest import Commit, Manifest, Plan, read_record
from xkd_schemas.table import TABLES


def table_states(root: Path) -> list[dict[str, Any]]:
    """One dict per table that was begun: table, units, done, documents, bytes of its whole folder, sealed.

    `unreadable` counts plans and records that are damaged, `quarantined` and `leftovers` what `gc` would look at.
    """
    refuse_links(root)
    plans = [path for pattern in TABLES for path in sorted(root.glob(f"{pattern}/plan.json"))]
    return [_state(root, path) for path in plans]


def _state(root: Path, path: Path) -> dict[str, Any]:
    folder = path.parent
    records = records_of(folder)
    commits = [commit for record in records if (commit := _whole(record, Commit)) is not None]
    plan = _plan(folder)
    return {
        "table": folder.relative_to(root).as_posix(),
        "units": len(plan.units) if plan else len(records),
        "done": len(commits),
        "documents": sum(c.rows for c in commits),
        "bytes": bytes_below(folder),
        "sealed": _is_sealed(folder, plan),
        "additions": len(plan.earlier) if plan else 0,
        "unreadable": len(records) - len(commits) + (plan is None),
        "quarantined": len(list((folder / "quarantine").glob("*"))),
        "leftovers": len(list(folder.rglob(".tmp-*"))),
    }


def _plan(folder: Path) -> Plan | None:
    try:
        return plans_of(folder)[-1]
    except BadData:
        return None


def _is_sealed(folder: Path, plan: Plan | None) -> bool:
    """True where the manifest is there, and is that of the last addition."""
    if not (folder / "manifest.json").exists():
        return False
    if plan is None or not plan.earlier:
        return True
    manifest = _whole(folder / "manifest.json", Manifest)
    return manifest is not None and len(manifest.commits) == len(plan.units)


R = TypeVar("R", Manifest, Commit)


def _whole(path: Path, kind: type[R]) -> R | None:
    try:
        return read_record(path, kind)
    except BadData:
        return None

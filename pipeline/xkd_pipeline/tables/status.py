"""How far the tables of a cache are, from plans, commit records and sizes of files: no shard is opened."""

import contextlib
from pathlib import Path
from typing import Any

from xkd_schemas.cache.manifest import Commit, Plan, read_record, record_paths, refuse_links
from xkd_schemas.cache.table import TABLES
from xkd_schemas.durable_files import bytes_below
from xkd_schemas.errors import BadData


def table_states(root: Path) -> list[dict[str, Any]]:
    """One dict per table that was begun: table, units, done, documents, bytes of its whole folder, sealed.

    `unreadable` counts plans and records that are damaged, `quarantined` and `leftovers` what `gc` would look at.
    """
    refuse_links(root)
    plans = [path for pattern in TABLES for path in sorted(root.glob(f"{pattern}/plan.json"))]
    return [_state(root, path) for path in plans]


def _state(root: Path, path: Path) -> dict[str, Any]:
    folder = path.parent
    records = record_paths(folder)
    commits: list[Commit] = []
    for record in records:
        with contextlib.suppress(BadData):
            commits.append(read_record(record, Commit))
    plan: Plan | None = None
    with contextlib.suppress(BadData):
        plan = read_record(path, Plan)
    return {
        "table": folder.relative_to(root).as_posix(),
        "units": len(plan.units) if plan else len(records),
        "done": len(commits),
        "documents": sum(c.rows for c in commits),
        "bytes": bytes_below(folder),
        "sealed": (folder / "manifest.json").exists(),
        "unreadable": len(records) - len(commits) + (plan is None),
        "quarantined": len(list((folder / "quarantine").glob("*"))),
        "leftovers": len(list(folder.rglob(".tmp-*"))),
    }

"""How far the tables of a cache are, from plans and commit records alone: no shard is opened."""

from pathlib import Path
from typing import Any

from xkd_schemas.manifest import Commit, Plan, read_record


def table_states(root: Path) -> list[dict[str, Any]]:
    """One dict per table that was begun: table, units, done, documents, bytes, sealed."""
    states = []
    patterns = ("documents", "students/*", "teachers/*")
    for plan_path in (path for pattern in patterns for path in sorted(root.glob(f"{pattern}/plan.json"))):
        plan = read_record(plan_path, Plan)
        commits = [read_record(path, Commit) for path in sorted((plan_path.parent / "commits").glob("[0-9]*.json"))]
        states.append(
            {
                "table": plan.table,
                "units": len(plan.units),
                "done": len(commits),
                "documents": sum(c.rows for c in commits),
                "bytes": sum(c.size for c in commits),
                "sealed": (plan_path.parent / "manifest.json").exists(),
            }
        )
    return states

"""What a cache says of itself: README.md (with what `load_dataset` reads), SHA256SUMS, and how far each table is."""

from pathlib import Path
from typing import Any

from xkd_schemas.cache.manifest import Commit, Manifest, Plan, record_or_none, record_paths, refuse_links
from xkd_schemas.cache.table import TABLES
from xkd_schemas.durable_files import bytes_below, replace, sha256_of
from xkd_schemas.errors import DiskFailed


def card_text(root: Path) -> str:
    """Text of the card for the tables that are sealed below `root`; one whose manifest is damaged is left out."""
    paths = (path for pattern in TABLES for path in sorted(root.glob(f"{pattern}/manifest.json")))
    manifests = [manifest for path in paths if (manifest := record_or_none(path, Manifest))]
    configs = "".join(
        f"- config_name: {m.table.replace('/', '-')}\n  data_files: {m.table}/*.arrow\n"
        + ("  default: true\n" if m.table == "documents" else "")
        for m in manifests
    )
    rows = "".join(
        f"| {m.table} | {m.rows} | {len(m.commits)} | {sum(c.size for c in m.commits):,} | `{m.root[:16]}` |\n"
        for m in manifests
    )
    return (
        f"---\nconfigs:\n{configs}---\n\n# XKD cache\n\n"
        "What a teacher model knew about a corpus, kept so that students can be trained without the teacher.\n\n"
        f"| table | documents | shards | bytes | root |\n|---|---|---|---|---|\n{rows}\n"
        "`sha256sum -c SHA256SUMS` checks every file. `load_dataset(FOLDER, CONFIG)` of Hugging Face datasets\n"
        "opens a table; `xkd-train --shards FOLDER` trains from it. Each table's settings are in its plan.json.\n"
    )


def write_root_files(root: Path) -> None:
    """README.md, so that `load_dataset(root)` works, and SHA256SUMS for `sha256sum -c`."""
    _update(root / "README.md", card_text(root).encode())
    lines = []
    for path in sorted(p for p in root.rglob("*") if p.is_file()):
        relative = path.relative_to(root)
        kept = path.name not in {"LOCK", "SHA256SUMS"} and not path.name.startswith(".tmp-")
        if kept and "quarantine" not in relative.parts:
            lines.append(f"{_sum(root, path)}  {relative.as_posix()}\n")
    _update(root / "SHA256SUMS", "".join(lines).encode())


def forget(root: Path, table: str) -> None:
    """Bring README.md and SHA256SUMS up to date where a table goes; no other digest is taken anew."""
    card, sums = root / "README.md", root / "SHA256SUMS"
    _update(card, card_text(root).encode())
    old = sums.read_text().splitlines() if sums.is_file() else []
    pairs = [(digest, name) for digest, _, name in (line.partition("  ") for line in old)]
    kept = [(sha256_of(card) if n == card.name else d, n) for d, n in pairs if not n.startswith(f"{table}/")]
    _update(sums, "".join(f"{digest}  {name}\n" for digest, name in kept).encode())


def _update(path: Path, content: bytes) -> None:
    if not path.is_file() or path.read_bytes() != content:
        replace(path, content)


def _sum(root: Path, path: Path) -> str:
    """sha256 of a file; a shard's stands in its name's record already and is not read again."""
    if path.suffix == ".arrow":
        commit = record_or_none(path.parent / "commits" / f"{path.name[:5]}.json", Commit)
        if commit and commit.file == path.name:
            return commit.sha256
    try:
        return sha256_of(path)
    except OSError as error:
        raise DiskFailed(f"{path.relative_to(root)}: {error.strerror}") from error


def table_states(root: Path) -> list[dict[str, Any]]:
    """One dict per table that was begun: table, units, done, documents, bytes of its whole folder, sealed.

    `unreadable` counts plans and records that are damaged, `quarantined` and `leftovers` what `gc` would look at.
    """
    refuse_links(root)
    states = []
    for path in (path for pattern in TABLES for path in sorted(root.glob(f"{pattern}/plan.json"))):
        folder, records, plan = path.parent, record_paths(path.parent), record_or_none(path, Plan)
        commits = [commit for record in records if (commit := record_or_none(record, Commit))]
        states.append({
            "table": folder.relative_to(root).as_posix(), "units": len(plan.units) if plan else len(records),
            "done": len(commits), "documents": sum(c.rows for c in commits), "bytes": bytes_below(folder),
            "sealed": (folder / "manifest.json").exists(),
            "unreadable": len(records) - len(commits) + (plan is None),
            "quarantined": len(list((folder / "quarantine").glob("*"))),
            "leftovers": len(list(folder.rglob(".tmp-*"))),
        })  # fmt: skip
    return states

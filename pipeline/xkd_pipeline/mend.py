"""Repair a cache (make only its bad units again) and clear away what nothing refers to."""

import shlex
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from xkd_pipeline.align import StudentSettings, make_students
from xkd_pipeline.run import Workers
from xkd_pipeline.store import Store, locked
from xkd_pipeline.verify import Bad, tables_of, units_by_table, verify
from xkd_schemas.additions import parts_of, plans_of, records_of
from xkd_schemas.errors import BadData, InputMissing, XkdError
from xkd_schemas.files import disk_errors, inside, remove, sync_folder
from xkd_schemas.manifest import Commit, Manifest, Plan, read_record

YOUNG_SECONDS: Final = 60.0
"""A file that no record names may still belong to a writer that is dying; younger ones are left."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Repaired:
    """What a repair found and did."""

    bad: list[Bad]
    made: dict[str, int]
    """Table -> units made again; 0 where only other files were put right."""
    commands: list[str]
    """What to type for what needs the corpus or the teacher."""
    left: list[Bad]
    """What is still wrong."""


def repair(root: Path, workers: Workers) -> Repaired:
    """Quarantine the bad units and make them again, from what the cache itself holds.

    A student's table is made from its own tokenizer/ and the two tables before it. Documents need the corpus and a
    teacher's table needs the teacher: for these the command is returned, which makes the same bad units and no other.
    """
    bad = verify(root, "full")
    made: dict[str, int] = {}
    commands: list[str] = []
    for name, units in units_by_table(bad).items():
        command = _command(root, name)
        if name.startswith("students/") and not commands and command:
            try:
                made[name] = _again(root, name, units, workers)
                continue
            except XkdError as error:
                command = f"{command}   # {error.what}"
        commands.append(command or f"xkd-cache verify {shlex.quote(str(root))}   # {name}: its plan cannot be read")
    if bad and not commands:
        with locked(root):
            _store(root, tables_of(root)[0]).describe()
    return Repaired(bad=bad, made=made, commands=commands, left=verify(root, "full") if bad else [])


def _plan(root: Path, name: str) -> Plan | None:
    """The plan, or the same things out of the sealed manifest; None where neither can be read."""
    folder = inside(root, *name.split("/"))
    with suppress(BadData, InputMissing):
        return plans_of(folder)[-1]
    return None


def _store(root: Path, name: str) -> Store:
    plan = _plan(root, name)
    if plan is None:
        raise BadData(f"{root / name}/plan.json cannot be read", next=f"delete {root / name} and make it again")
    return Store(root, name, plan.spec, plan.units)


def _again(root: Path, name: str, units: set[int], workers: Workers) -> int:
    """Make a student's bad units from the cache; how many were made."""
    store = _store(root, name)
    encoder: dict[str, Any] = store.plan.spec["encoder"]
    settings = StudentSettings(
        tokenizer=str(store.folder / "tokenizer"), template=encoder["template"], max_tokens=encoder["max_tokens"]
    )
    with locked(root):
        return make_students(root, name.partition("/")[2], store.plan.spec["teacher"], settings, workers).made


def _command(root: Path, name: str) -> str:
    """The command that makes this table, with its stored settings; CAPITALS stand for paths that no cache holds."""
    plan = _plan(root, name)
    if plan is None:
        return ""
    s, cache, table = plan.spec, str(root), name.partition("/")[2]
    if name == "documents":
        corpus = [f"PATH_OF/{c['name']}" for c in s["corpus"]]
        parts = ["xkd-cache", "documents", *corpus, "--out", cache, "--set", f"documents.max_chars={s['max_chars']}"]
        parts += ["--set", f"documents.rows_per_shard={s['rows_per_shard']}"]
        for form in {c["form"] for c in s["corpus"]}:
            parts += ["--form", form]
    elif name.startswith("teachers/"):
        parts = ["xkd-cache", "teacher", cache, "--model", "PATH_OF_TEACHER", "--name", table]
        parts += ["--template", s["encoder"]["template"], "--max-tokens", str(s["encoder"]["max_tokens"])]
        parts += ["--dtype", s["dtype"], "--batch-tokens", str(s["batch_tokens"]), "--threads", str(s["threads"])]
    else:
        parts = ["xkd-cache", "align", cache, "--student", "PATH_OF_STUDENT", "--teacher", s["teacher"]]
        parts += ["--name", table, "--template", s["encoder"]["template"]]
        parts += ["--max-tokens", str(s["encoder"]["max_tokens"])]
    return shlex.join(parts)


@dataclass(frozen=True, kw_only=True, slots=True)
class Spare:
    """A file that nothing refers to."""

    file: Path
    size: int
    why: str


def spare(root: Path, *, older_than: float, now: float | None = None) -> list[Spare]:
    """Unreferenced shards and rejects, leftovers of writers that died, and quarantine older than `older_than` hours.

    A table whose records cannot all be read keeps every shard: what they name is not known.
    """
    moment = time.time() if now is None else now
    found: list[Spare] = []
    for folder in (root, *(inside(root, *name.split("/")) for name in tables_of(root))):
        for part in (*parts_of(folder), folder / "tokenizer"):
            for place in (part, part / "commits", part / "rejects"):
                found += _listed(place.glob(".tmp-*"), "left by a writer that died", moment - YOUNG_SECONDS)
        found += _listed((folder / "quarantine").glob("*"), "quarantined", moment - 3600 * older_than)
        named = _referenced(folder) if folder != root else None
        if named is not None:
            files = [p for part in parts_of(folder) for p in (*part.glob("*.arrow"), *part.glob("rejects/*.jsonl"))]
            loose = [p for p in files if p.name not in named]
            found += _listed(loose, "no record names it", moment - YOUNG_SECONDS)
    return found


def _listed(paths: Any, why: str, before: float) -> list[Spare]:
    found = []
    for path in sorted(paths):
        for file in sorted(path.rglob("*")) if path.is_dir() and not path.is_symlink() else [path]:
            status = file.lstat()
            if status.st_mtime <= before and not file.is_dir():
                found.append(Spare(file=file, size=status.st_size, why=why))
    return found


def _referenced(folder: Path) -> set[str] | None:
    records: list[Commit] = []
    try:
        records += [read_record(path, Commit) for path in records_of(folder)]
        if (folder / "manifest.json").exists():
            records += read_record(folder / "manifest.json", Manifest).commits
    except (BadData, InputMissing):
        return None
    return {r.file for r in records} | {r.rejects.file for r in records if r.rejects is not None}


def collect(root: Path, *, older_than: float, dry_run: bool) -> list[Spare]:
    """Remove what is spare, holding the lock; with `dry_run` only say what would go."""
    if dry_run:
        return spare(root, older_than=older_than)
    with locked(root):
        found = spare(root, older_than=older_than)
        _remove(found)
    return found


def _remove(found: Sequence[Spare]) -> None:
    for one in found:
        with disk_errors(one.file):
            remove(one.file)
    for folder in {one.file.parent for one in found}:
        with disk_errors(folder):
            if folder.name.startswith(".tmp-") and not any(folder.iterdir()):
                folder.rmdir()
            else:
                sync_folder(folder)

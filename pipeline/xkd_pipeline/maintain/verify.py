"""Is a cache what its manifests say? Every bad unit with its reason; nothing is changed.

quick   manifests, plans and records are whole and agree; every file is there with its size
full    every byte: sha256 of all files, xxh3 of every record batch
deep    what the bytes mean: see verify_rows.py
"""

import contextlib
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from xkd_pipeline.maintain.verify_rows import Finding, verify_rows
from xkd_schemas.cache.manifest import (
    Commit,
    Manifest,
    Plan,
    outside_tables,
    read_record,
    record_paths,
    refuse_links,
    unnamed_files,
)
from xkd_schemas.cache.table import TABLES, Shard, check_cache
from xkd_schemas.durable_files import inside, sha256_of
from xkd_schemas.errors import BadData, InputMissing, UsageError

LEVELS: Final = ("quick", "full", "deep")


def tables_of(root: Path) -> list[str]:
    """Tables that were begun, documents first; InputMissing where there is no cache, Refused where it has a link."""
    check_cache(root)
    refuse_links(root)
    found = [path for pattern in TABLES for path in sorted(root.glob(pattern)) if path.is_dir()]
    if not found:
        raise InputMissing(f"{root} holds no table", fix="make one with xkd-cache documents")
    return [path.relative_to(root).as_posix() for path in found]


def verify(root: Path, level: str = "full") -> list[Finding]:
    """Everything that is wrong with the cache, in the order of its tables and units.

    Raises:
        InputMissing: There is no cache.
        UsageError: An unknown level.
        Refused: A name in a record leaves the folder, or a file is a link.
        Mismatch: Written by a newer program.
    """
    if level not in LEVELS:
        raise UsageError(f"level {level!r} is not known", fix=f"use one of: {', '.join(LEVELS)}")
    found = {name: list(_check_table(root, name, level)) for name in tables_of(root)}
    if level == "deep":
        found |= {name: list(verify_rows(root, name)) for name, bad in found.items() if not bad}
    return [*itertools.chain.from_iterable(found.values()), *_check_root_files(root, level)]


def _check_table(root: Path, name: str, level: str) -> Iterator[Finding]:
    folder = inside(root, *name.split("/"))
    add = _finding_maker(root, name)
    plan = None
    try:
        plan = read_record(folder / "plan.json", Plan)
    except (BadData, InputMissing) as error:
        yield add(folder / "plan.json", error.what)
    if not (folder / "manifest.json").exists():
        count = f"{len(record_paths(folder))} of {len(plan.units) if plan else '?'}"
        yield add(folder / "manifest.json", f"missing: the table is not finished, {count} units are done")
        return
    try:
        manifest = read_record(folder / "manifest.json", Manifest)
        if manifest.table != name:
            raise BadData(f"belongs to {manifest.table}")
    except BadData as error:
        yield add(folder / "manifest.json", error.what)
        yield from _check_commits(folder, add)
        return
    if plan and (plan.table, plan.spec, len(plan.units)) != (name, manifest.spec, len(manifest.commits)):
        yield add(folder / "plan.json", "is not the plan that the manifest was made from")
    for number, commit in enumerate(manifest.commits):
        yield from _check_unit(folder, number, commit, add, level)
    for file, digest in manifest.files.items():
        path = next((p for p in (inside(folder, file), inside(folder, "tokenizer", file)) if p.is_file()), None)
        if path is None:
            yield add(folder / file, "missing")
        elif level != "quick" and sha256_of(path) != digest:
            yield add(path, "does not match its sha256")
    strange = _finding_maker(root, "")  # no unit of the table is bad
    yield from (strange(path, _STRANGE) for path in unnamed_files(folder, manifest))


_STRANGE: Final = "no manifest names it: delete it (xkd-cache gc does for shards)"


def _check_commits(folder: Path, add: "_Add") -> Iterator[Finding]:
    """Without a manifest the records say which units are bad too."""
    for path in record_paths(folder):
        try:
            commit = read_record(path, Commit)
        except (BadData, InputMissing) as error:
            yield add(path, error.what, int(path.stem) if path.stem.isdigit() else None)
            continue
        shard = inside(folder, commit.file)
        if not shard.is_file() or sha256_of(shard) != commit.sha256:
            yield add(shard, "missing" if not shard.is_file() else "does not match its sha256", commit.unit)


_Add = Callable[..., Finding]


def _finding_maker(root: Path, table: str) -> _Add:
    def add(path: Path, reason: str, unit: int | None = None) -> Finding:
        file = path.relative_to(root).as_posix()
        return Finding(
            table=table, unit=unit, file=file, reason=reason.replace(f"{path} ", "").replace(f"{path}: ", "")
        )

    return add


def _check_unit(folder: Path, number: int, commit: Commit, add: _Add, level: str) -> Iterator[Finding]:
    record = folder / "commits" / f"{number:05d}.json"
    try:
        if read_record(record, Commit).bound != commit:
            yield add(record, "is not the record in the manifest", number)
    except (BadData, InputMissing) as error:
        yield add(record, error.what, number)
    path = inside(folder, commit.file)
    if commit.unit != number or not commit.file.startswith(f"{number:05d}-{commit.sha256[:12]}"):
        yield add(path, f"the manifest names unit {commit.unit} here", number)
    if not path.is_file():
        yield add(path, "missing", number)
    elif (size := path.stat().st_size) != commit.size:
        yield add(path, f"has {size} bytes, its record says {commit.size}", number)
    elif level != "quick":
        yield from _check_bytes(path, number, commit, add)
    if commit.rejects is not None:
        rejects = inside(folder, "rejects", commit.rejects.file)
        if not rejects.is_file():
            yield add(rejects, "missing", number)
        elif level != "quick" and sha256_of(rejects) != commit.rejects.sha256:
            yield add(rejects, "does not match its sha256", number)


def _check_bytes(path: Path, number: int, commit: Commit, add: _Add) -> Iterator[Finding]:
    try:
        shard = Shard(path, commit)
        for batch in range(len(commit.batches)):
            shard.batch(batch)
        mark = (shard.schema.metadata or {}).get(b"unit", b"?").decode(errors="replace")
        if mark != str(number):
            yield add(path, f"holds unit {mark}", number)
    except BadData as error:
        yield add(path, error.what, number)
        return
    if sha256_of(path) != commit.sha256:
        yield add(path, "does not match its sha256", number)


def _check_root_files(root: Path, level: str) -> Iterator[Finding]:
    """SHA256SUMS covers what no manifest does: plans, records, tokenizers' small files, the card."""
    add = _finding_maker(root, "")
    yield from (add(path, _STRANGE) for path in outside_tables(root))
    sums = root / "SHA256SUMS"
    try:
        lines = sums.read_bytes().decode().split("\n")  # and at nothing else that ends a line
    except FileNotFoundError:
        yield add(sums, "missing")
        return
    except (OSError, UnicodeDecodeError) as error:
        yield add(sums, f"cannot be read: {error}")
        return
    listed, known = set(), _shard_digests(root)
    if lines.pop():
        yield add(sums, "does not end with a line's end")
    for line in lines:
        digest, _, name = line.partition("  ")
        if not name:
            yield add(sums, f"has a line without a file name: {json.dumps(line[:80])}")
            continue
        path = inside(root, *name.split("/"))
        listed.add(path)
        if fault := _check_sum(path, name, digest, known, level):
            yield add(path if fault == _OTHER else sums, fault)
    for path in _expected_files(root):
        if path not in listed:
            yield add(sums, f"does not name {path.relative_to(root).as_posix()}")


_OTHER: Final = "does not match SHA256SUMS"


def _check_sum(path: Path, name: str, digest: str, known: dict[Path, str], level: str) -> str:
    """What is wrong with one line of SHA256SUMS, or ""."""
    if not path.is_file():
        return f"names {name}, which is missing"
    if path in known:
        return f"gives {name} another digest than its manifest" if known[path] != digest else ""
    return _OTHER if level != "quick" and sha256_of(path) != digest else ""


def _shard_digests(root: Path) -> dict[Path, str]:
    """sha256 of every shard as its manifest has it; their bytes were compared with that already."""
    known: dict[Path, str] = {}
    for name in tables_of(root):
        with contextlib.suppress(BadData, InputMissing):  # reported with its table
            manifest = read_record(root / name / "manifest.json", Manifest)
            known |= {root / name / commit.file: commit.sha256 for commit in manifest.commits}
    return known


def _expected_files(root: Path) -> Iterator[Path]:
    for name in tables_of(root):
        folder = root / name
        if not (folder / "manifest.json").exists():
            continue  # begun, and told of with its table: only what is finished is listed
        yield from (path for path in (folder / "plan.json", folder / "manifest.json") if path.is_file())
        yield from record_paths(folder)
        yield from sorted(path for path in (folder / "tokenizer").glob("*") if path.is_file())
    if (root / "README.md").exists():
        yield root / "README.md"

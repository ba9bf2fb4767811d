"""Is a cache what its manifests say? Every bad shard with its reason; nothing is changed.

quick   manifests, plans and records are whole and agree; every file is there, shards with size, header and footer
full    every byte: sha256 of all files, xxh3 of every record batch
deep    what the bytes mean: see verify_rows.py
"""

import contextlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

from xkd_pipeline.maintain.verify_rows import Finding, verify_rows
from xkd_pipeline.tables.writer import further_file
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
from xkd_schemas.config import RunConfig
from xkd_schemas.durable_files import inside, sha256_of
from xkd_schemas.errors import BadData, InputMissing, Refused, UsageError

LEVELS: Final = ("quick", "full", "deep")

Fault = tuple[Path, str, int | None]
"""A file, what is wrong with it, and the shard that it belongs to."""


def tables_of(root: Path) -> list[str]:
    """Tables that were begun, documents first; InputMissing where there is no cache, Refused where it has a link."""
    check_cache(root)
    refuse_links(root)
    found = [path for pattern in TABLES for path in sorted(root.glob(pattern)) if path.is_dir()]
    if not any((path / name).exists() for path in found for name in ("plan.json", "manifest.json", "commits")):
        raise InputMissing(f"{root} is no cache: it holds no table", fix=f"xkd-cache documents CORPUS --out {root}")
    return [path.relative_to(root).as_posix() for path in found]


def verify(root: Path, level: str = "full") -> list[Finding]:
    """Everything that is wrong with the cache, in the order of its tables and shards.

    Raises:
        InputMissing: There is no cache.
        UsageError: An unknown level.
        Refused: A name in a record leaves the folder, or a file is a link.
        Mismatch: Written by a newer program.
    """
    if level not in LEVELS:
        raise UsageError(f"level {level!r} is not known", fix=f"use one of: {', '.join(LEVELS)}")
    found: list[Finding] = []
    for name in tables_of(root):
        bad = [_finding(root, name, *fault) for fault in _check_table(root, name, level)]
        found += bad if bad or level != "deep" else verify_rows(root, name)
    return found + [_finding(root, "", *fault) for fault in _check_root(root, level)]


def verify_run(run: RunConfig, *, level: str = "full") -> list[Finding]:
    """Everything that is wrong with the run's cache, as `xkd-cache verify`; `level` is quick, full or deep."""
    return verify(Path(run.cache), level)


def _finding(root: Path, table: str, path: Path, reason: str, unit: int | None) -> Finding:
    reason = reason.replace(f"{path} ", "").replace(f"{path}: ", "")
    return Finding(table=table, unit=unit, file=path.relative_to(root).as_posix(), reason=reason)


def _check_table(root: Path, name: str, level: str) -> Iterator[Fault]:
    folder = inside(root, *name.split("/"))
    plan, path = None, folder / "manifest.json"
    try:
        plan = read_record(folder / "plan.json", Plan)
    except (BadData, InputMissing) as error:
        yield folder / "plan.json", error.what, None
    if not path.exists():
        count = f"{len(record_paths(folder))} of {len(plan.units) if plan else '?'}"
        yield path, f"missing: the table is not finished, {count} shards are done", None
        return
    try:
        manifest = _read_manifest(root, name)
    except BadData as error:
        yield path, error.what, None
        yield from _check_commits(folder)
        return
    if plan and (plan.table, plan.spec, len(plan.units)) != (name, manifest.spec, len(manifest.commits)):
        yield folder / "plan.json", "is not the plan that the manifest was made from", None
    for number, commit in enumerate(manifest.commits):
        yield from _check_shard(folder, number, commit, level)
    for file, digest in manifest.files.items():
        yield from _check_digest(further_file(folder, file), digest, None, level)


def _read_manifest(root: Path, name: str) -> Manifest:
    manifest = read_record(inside(root, *name.split("/"), "manifest.json"), Manifest)
    if manifest.table != name:
        raise BadData(f"belongs to {manifest.table}")
    return manifest


def _check_digest(path: Path, digest: str, number: int | None, level: str) -> Iterator[Fault]:
    if not path.is_file():
        yield path, "missing", number
    elif level != "quick" and sha256_of(path) != digest:
        yield path, "does not match its sha256", number


def _check_commits(folder: Path) -> Iterator[Fault]:
    """Without a manifest the records say which shards are bad too."""
    for path in record_paths(folder):
        try:
            commit = read_record(path, Commit)
        except (BadData, InputMissing) as error:
            yield path, error.what, int(path.stem) if path.stem.isdigit() else None
            continue
        yield from _check_digest(inside(folder, commit.file), commit.sha256, commit.unit, "full")


def _check_shard(folder: Path, number: int, commit: Commit, level: str) -> Iterator[Fault]:
    record = folder / "commits" / f"{number:05d}.json"
    try:
        if read_record(record, Commit).bound != commit:
            yield record, "is not the record in the manifest", number
    except (BadData, InputMissing) as error:
        yield record, error.what, number
    path = inside(folder, commit.file)
    if commit.unit != number or not commit.file.startswith(f"{number:05d}-{commit.sha256[:12]}"):
        yield path, f"the manifest names shard {commit.unit} here", number
    try:
        shard = Shard(path, commit)
        for batch in range(len(commit.batches) if level != "quick" else 0):
            shard.batch(batch)
        mark = (shard.schema.metadata or {}).get(b"unit", b"?").decode(errors="replace")
        if mark != str(number):
            yield path, f"holds shard {mark}", number
        yield from _check_digest(path, commit.sha256, number, level)
    except (BadData, OSError) as error:
        yield path, error.what if isinstance(error, BadData) else f"cannot be read: {error.strerror}", number
    if commit.rejects is not None:
        rejects = inside(folder, "rejects", commit.rejects.file)
        yield from _check_digest(rejects, commit.rejects.sha256, number, level)


def _check_root(root: Path, level: str) -> Iterator[Fault]:
    manifests: dict[str, Manifest] = {}
    for name in tables_of(root):
        with contextlib.suppress(BadData, InputMissing):  # reported with its table
            manifests[name] = _read_manifest(root, name)
    unnamed = (path for name, manifest in manifests.items() for path in unnamed_files(root / name, manifest))
    for path in itertools.chain(outside_tables(root), unnamed):
        yield path, "no manifest names it: delete it (xkd-cache gc does for shards)", None
    sums = root / "SHA256SUMS"
    try:
        lines = sums.read_bytes().decode().split("\n")  # and at nothing else that ends a line
    except (OSError, UnicodeDecodeError) as error:
        yield sums, f"cannot be read: {error}" if sums.exists() else "missing", None
        return
    if lines.pop():
        yield sums, "does not end with a line's end", None
    digests = {root / name / commit.file: commit.sha256 for name, m in manifests.items() for commit in m.commits}
    yield from _check_sums(root, lines, digests, level)


def _check_sums(root: Path, lines: Sequence[str], digests: Mapping[Path, str], level: str) -> Iterator[Fault]:
    """The lines of SHA256SUMS; `digests` are those of the shards, whose bytes were compared already."""
    sums, listed = root / "SHA256SUMS", set[Path]()
    for line in lines:
        digest, _, name = line.partition("  ")
        try:
            path = inside(root, *name.split("/"))
        except Refused:  # and nobody opens it
            yield sums, f"has a line that names no file of a cache: {json.dumps(line[-80:])}", None
            continue
        listed.add(path)
        if not path.is_file():
            yield sums, f"names {name}, which is missing", None
        elif digests.get(path, digest) != digest:
            yield sums, f"gives {name} another digest than its manifest", None
        elif level != "quick" and path not in digests and sha256_of(path) != digest:
            yield path, "does not match SHA256SUMS", None
    for path in _expected_files(root):
        if path not in listed:
            yield sums, f"does not name {path.relative_to(root).as_posix()}", None


def _expected_files(root: Path) -> Iterator[Path]:
    """What SHA256SUMS covers and no manifest does: plans, records, tokenizers' small files, the card."""
    for folder in (root / name for name in tables_of(root)):
        if (folder / "manifest.json").exists():  # what is only begun is told of with its table
            own = (folder / "plan.json", folder / "manifest.json", *sorted((folder / "tokenizer").glob("*")))
            yield from (path for path in own if path.is_file())
            yield from record_paths(folder)
    if (root / "README.md").exists():
        yield root / "README.md"

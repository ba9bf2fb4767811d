"""A table while it is being made: its plan, its shards and their commit records, and the seal at the end.

Only the driver uses this, holding the cache's lock. Workers write shards (shard.py) and return
records; a record counts from the moment it is linked into commits/.
"""

import contextlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xkd_pipeline.tables.dataset_card import write_root_files
from xkd_pipeline.workers.contract import Stage, Workers
from xkd_pipeline.workers.scheduler import make_shards
from xkd_schemas.cache.manifest import (
    Commit,
    MadeDifferently,
    Manifest,
    Plan,
    Spec,
    Unit,
    is_damaged,
    read_record,
    record_or_none,
    record_paths,
    refuse_differences,
    refuse_links,
    seal_table,
    to_json,
)
from xkd_schemas.console import tell_kept, warn
from xkd_schemas.durable_files import (
    disk_errors,
    hold_lock,
    inside,
    make_folder,
    put_if_absent,
    remove,
    rename,
    replace,
    sha256_of,
)
from xkd_schemas.errors import BadData, UsageError
from xkd_schemas.progress import Progress

Finish = Callable[[Sequence[Commit]], tuple[dict[str, Any], dict[str, str]]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Built:
    """A sealed table, with the number of shards made now and of those that were there already."""

    manifest: Manifest
    made: int
    kept: int
    seconds: float = 0.0  # that making them took, with the start of workers
    tokens: int = 0  # in the shards made now


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What one stage did, for people and for --json."""

    line: str
    values: dict[str, Any]


@contextlib.contextmanager
def locked(root: Path) -> Iterator[None]:
    """Hold the cache for writing; Busy names the process that has it. Freed by the system when we die.

    Refused where it has a link, which a writer could follow out of it; UsageError where it is a file.
    """
    if root.exists() and not root.is_dir():
        raise UsageError(f"{root} is a file, and a cache is a folder", kept="it as it is", fix="name a folder")
    refuse_links(root)
    with hold_lock(root):
        yield


class Store:
    """A table's folder: `Store(root, "documents", spec, units)` opens it or begins it.

    Without `units` its shards hold the same rows as those of the documents table.
    Mismatch names every differing field where the folder was begun with another spec.
    """

    def __init__(self, root: Path, table: str, spec: Spec, units: tuple[Unit, ...] | None = None) -> None:
        self.root = root
        self.folder = inside(root, *table.split("/"))
        if units is None:
            units = read_record(root / "documents" / "plan.json", Plan).units
        plan = Plan(table=table, spec=json.loads(json.dumps(spec)), units=units)
        path = self.folder / "plan.json"
        if self._is_lost(path, plan):
            replace(path, to_json(plan))
        self.plan = read_record(path, Plan)
        if (plan.spec, plan.units) == (self.plan.spec, self.plan.units):
            return
        _, _, name = table.partition("/")
        other = f"other rows: --out OTHER, then xkd-train --shards {root} --shards OTHER"
        other = f"or give this one another --name (now {name})" if name else other
        advice = f"repeat the first command's settings; {other}"
        refuse_differences(self.folder, plan.spec, self.plan.spec, advice=advice)
        raise BadData(f"{path} lists other shards than this corpus gives", fix=advice)

    def _is_lost(self, path: Path, plan: Plan) -> bool:
        """Whether `plan` is to be written: of a new table, or because its file is damaged or not there."""
        if path.exists() and path.stat().st_size:
            return is_damaged(path, plan)
        manifest = self.manifest()
        if manifest is None:
            return not record_paths(self.folder)
        return (manifest.spec, len(manifest.commits)) == (plan.spec, len(plan.units))

    def commits(self) -> dict[int, Commit]:
        """Shards that are done: the record is whole and its file has the right size and digest.

        What does not verify is moved to quarantine/ and will be made again.
        """
        done: dict[int, Commit] = {}
        for path in record_paths(self.folder):
            try:
                commit = read_record(path, Commit)
                whole = path.name == f"{commit.unit:05d}.json" and commit.unit < len(self.plan.units)
                whole = whole and holds(self.folder, commit)
            except BadData:
                whole = False
            if whole:
                done[commit.unit] = commit
            else:
                shards = self.folder.glob(f"{path.stem}-*.arrow")
                quarantine(self.folder, [path, *shards, self.folder / "manifest.json"])
        return done

    def cares(self, units: Iterable[int]) -> dict[int, MadeDifferently]:
        """How shards were made that could not be made as planned, as their quarantined records say."""
        found = {}
        for unit in units:
            record = record_or_none(self.folder / "quarantine" / f"{unit:05d}.json", Commit)
            if record and record.care is not None and record.unit == unit:
                found[unit] = record.care
        return found

    def commit(self, record: Commit) -> None:
        """Make one finished shard count."""
        put_if_absent(self.folder / "commits" / f"{record.unit:05d}.json", to_json(record))

    def manifest(self) -> Manifest | None:
        """The sealed manifest; None where it or a file it names is missing or damaged and must be made again."""
        path = self.folder / "manifest.json"
        if not path.exists():
            return None
        try:
            manifest = read_record(path, Manifest)
        except BadData:
            return None
        files = ((further_file(self.folder, name), digest) for name, digest in manifest.files.items())
        return manifest if all(path.is_file() and sha256_of(path) == digest for path, digest in files) else None

    def seal(self, commits: dict[int, Commit], constants: dict[str, Any], files: dict[str, str]) -> Manifest:
        """Write the manifest once all shards are done, and remove files that no record names."""
        ordered = tuple(commits[unit] for unit in range(len(self.plan.units)))
        manifest = seal_table(self.plan, ordered, constants, files)
        self._sweep(ordered)
        replace(self.folder / "manifest.json", to_json(manifest))
        self.describe()
        return manifest

    def describe(self) -> None:
        """Bring README.md and SHA256SUMS of the cache up to date; the last run may have died before it could."""
        with disk_errors(self.root):
            for path in self.root.glob(".tmp-*"):
                remove(path)
        write_root_files(self.root)

    def _sweep(self, commits: tuple[Commit, ...]) -> None:
        shards = {c.file for c in commits}
        rejects = {c.rejects.file for c in commits if c.rejects is not None}
        with disk_errors(self.folder):
            loose = [path for path in self.folder.glob("[0-9]*.arrow") if path.name not in shards]
            loose += [path for path in (self.folder / "rejects").glob("*.jsonl") if path.name not in rejects]
            for folder in (self.folder, self.folder / "commits", self.folder / "rejects"):
                loose += folder.glob(".tmp-*")
            for path in loose:
                remove(path)


def further_file(folder: Path, name: str) -> Path:
    """Where a file lies that a manifest names beside the shards: in the table's folder or its tokenizer/."""
    places = inside(folder, name), inside(folder, "tokenizer", name)
    return next((path for path in places if path.is_file()), places[0])


def quarantine(folder: Path, paths: Iterable[Path]) -> None:
    """Move files of a table out of the way; gc removes them later."""
    with disk_errors(folder):
        make_folder(folder / "quarantine")
        for path in paths:
            if path.exists():
                rename(path, folder / "quarantine" / path.name)


def holds(folder: Path, commit: Commit) -> bool:
    """Whether the shard and the rejects that a record names are there and what it says."""
    shard = inside(folder, commit.file)
    whole = shard.is_file() and shard.stat().st_size == commit.size and sha256_of(shard) == commit.sha256
    if commit.rejects is not None:
        rejects = inside(folder, "rejects", commit.rejects.file)
        whole = whole and rejects.is_file() and sha256_of(rejects) == commit.rejects.sha256
    return whole


def build(
    store: Store,
    stage: Stage,
    jobs: Callable[[Sequence[int]], Iterable[Any]],
    workers: Workers,
    *,
    watch: Callable[[Sequence[Commit]], None] = lambda _commits: None,
    finish: Finish = lambda _commits: ({}, {}),
) -> Built:
    """Make the shards that are not there yet, then seal.

    `jobs` gives the jobs for the missing shards, lazily and in order. `watch` sees all records after each new one, and
    raises to stop, e.g. on too many rejects. `finish` turns all records into the manifest's constants and further
    files (name -> sha256).
    """
    manifest = store.manifest()  # before bad shards are quarantined, and it with them
    done = store.commits()
    kept = len(done)
    missing = [unit for unit in range(len(store.plan.units)) if unit not in done]
    watch(list(done.values()))
    if manifest is not None and not missing and list(manifest.commits) == [done[n].bound for n in sorted(done)]:
        store.describe()
        return Built(manifest=manifest, made=0, kept=kept)
    start = time.monotonic()
    if missing:
        kinds = {commit.made_on for commit in done.values() if commit.made_on}
        rows = {unit: store.plan.units[unit].rows for unit in missing}
        with Progress(store.plan.table, sum(rows.values())) as progress:

            def take(commit: Commit) -> None:
                store.commit(commit)
                done[commit.unit] = commit
                made = [unit for unit in missing if unit in done]
                progress.reach(sum(rows[unit] for unit in made), f"{len(made)} of {len(missing)} shards done")
                _tell_other_kind(store.plan.table, commit, kinds)
                watch(list(done.values()))

            def describe_kept() -> str:
                kept = f"{len(done)} of {len(store.plan.units)} shards of {store.plan.table}"
                documents = sum(commit.rows for commit in done.values())
                return f"{kept} ({documents} documents); lost: what was done of the shards in work"

            with tell_kept(describe_kept):
                make_shards(stage, jobs(missing), workers, take, store.cares(missing))
    seconds = time.monotonic() - start
    constants, files = finish([done[unit] for unit in sorted(done)])
    manifest = store.seal(done, constants, files)
    tokens = sum(done[unit].counts.get("tokens", 0) for unit in missing)
    return Built(manifest=manifest, made=len(missing), kept=kept, seconds=seconds, tokens=tokens)


def _tell_other_kind(table: str, commit: Commit, kinds: set[str]) -> None:
    """Say once that a table goes on on another kind of processor than `kinds`, and take that one up."""
    if commit.made_on and commit.made_on not in kinds:
        if kinds:
            warn(
                f"{table} continues on {commit.made_on}, after {', '.join(sorted(kinds))}: numbers may differ within "
                "the rounding of its dtype; xkd-cache verify --recompute measures how far"
            )
        kinds.add(commit.made_on)

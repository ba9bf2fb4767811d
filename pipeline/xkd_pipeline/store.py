"""A table while it is being made: its plan, its commit records, and the seal at the end.

Only the driver uses this, holding the cache's lock. Workers write shards (shard.py) and return
records; a record counts from the moment it is linked into commits/.
"""

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from xkd_pipeline.card import write_root_files
from xkd_schemas.additions import ADDED, part_of, parts_of, plans_of, records_of
from xkd_schemas.cache_files import refuse_links
from xkd_schemas.errors import BadData, InputMissing, Mismatch, UsageError
from xkd_schemas.files import (
    disk_errors,
    held,
    inside,
    make_folder,
    put_if_absent,
    remove,
    rename,
    replace,
    sha256_of,
)
from xkd_schemas.manifest import (
    FORMAT,
    Care,
    Commit,
    Generation,
    Manifest,
    Plan,
    Spec,
    Unit,
    commits_digest,
    is_damaged,
    read_record,
    refuse_differences,
    sealed,
    to_json,
)


@contextlib.contextmanager
def locked(root: Path) -> Iterator[None]:
    """Hold the cache for writing; Busy names the process that has it. Freed by the system when we die.

    Raises:
        Refused: It has a link, which a writer could follow out of it.
        UsageError: It is a file.
    """
    if root.exists() and not root.is_dir():
        raise UsageError(f"{root} is a file, and a cache is a folder", kept="it as it is", next="name a folder")
    refuse_links(root)
    with held(root):
        yield


class Store:
    """A table's folder: `Store(root, "documents", spec, units)` opens it or begins it.

    `plan` is always that of the whole table, additions included; `asked` are the units that were asked for, which are
    fewer where the command that began a table is run again after more was added to it. With `more`, a finished table
    gets an addition of the units behind its own.

    Raises:
        Mismatch: The folder was begun with another spec; every differing field is named.
    """

    def __init__(self, root: Path, table: str, spec: Spec, units: tuple[Unit, ...], *, more: bool = False) -> None:
        self.root = root
        self.folder = inside(root, *table.split("/"))
        plan = Plan(table=table, spec=json.loads(json.dumps(spec)), units=units)
        path = self.folder / "plan.json"
        none = not path.exists() or path.stat().st_size == 0
        if not records_of(self.folder) if none else is_damaged(path, plan):
            replace(path, to_json(plan))
        plans = plans_of(self.folder)
        if more and not any(_same(plan, old) for old in plans):
            plans.append(self._added(plan, plans[-1]))
        self.plan, self.asked = plans[-1], len(units)
        self.known_cares: dict[int, Care] = {}
        if any(_same(plan, old) for old in plans):
            return
        advice = f"repeat the first command's settings, or write to a new folder than {root}"
        advice += f"; more documents: xkd-cache add {root} --documents FILE" * (table == "documents")
        if table != "documents":
            advice = (
                f"repeat the first command's settings, or give this one another --name (now {table.split('/')[-1]})"
            )
        refuse_differences(self.folder, plan.spec, self.plan.spec, advice=advice)
        raise BadData(f"{path} lists other units than this corpus gives", next=advice)

    def _added(self, plan: Plan, last: Plan) -> Plan:
        """Begin an addition that makes `last` into `plan`."""
        number = len(last.earlier) + 1
        fixed = [{k: v for k, v in spec.items() if k not in GROWING} for spec in (plan.spec, last.spec)]
        refuse_differences(self.folder, *fixed, advice=_AS_BEFORE)
        sealed_now = self.manifest()
        if sealed_now is None:
            raise BadData(f"{self.folder} is damaged or not finished", next=f"xkd-cache repair {self.root}")
        if len(sealed_now.commits) != len(last.units):
            raise Mismatch(
                f"{self.folder}: addition {number - 1} is not finished",
                kept="what is finished of it",
                next=f"repeat the command that began it, or drop it: rm -r {self.folder / ADDED / str(number - 1)}",
            )
        if plan.units[: len(last.units)] != last.units or len(plan.units) == len(last.units):
            raise BadData(f"{self.folder}: what is to be added does not come after what is there")
        state = Generation(
            units=len(last.units), commits=commits_digest(sealed_now.commits), root=sealed_now.root,
            constants=sealed_now.constants,
        )  # fmt: skip
        grown = plan.model_copy(
            update={"format": FORMAT, "min_reader": FORMAT, "earlier": (*last.earlier, state)}
        )  # fmt: skip
        put_if_absent(self.folder / ADDED / str(number) / "plan.json", to_json(grown))
        return grown

    def commits(self) -> dict[int, Commit]:
        """Units that are done: the record is whole and its shard has the right size and digest.

        What does not verify is moved to quarantine/ and will be made again.
        """
        done: dict[int, Commit] = {}
        for path in records_of(self.folder):
            try:
                commit = read_record(path, Commit)
                part = self.part(commit.unit)
                whole = path.parent.parent == part and path.name == f"{commit.unit:05d}.json"
                whole = whole and commit.unit < len(self.plan.units) and holds(part, commit)
            except BadData:
                whole = False
            if whole:
                done[commit.unit] = commit
            else:
                self._quarantine(path)
        return done

    def part(self, unit: int) -> Path:
        """The folder of a unit's record and shard."""
        return part_of(self.folder, self.plan.starts, unit)

    def _quarantine(self, record: Path) -> None:
        with disk_errors(record):
            folder = self.folder / "quarantine"
            make_folder(folder)
            shards = record.parent.parent.glob(f"{record.stem}-*.arrow")
            for path in [record, *shards, self.folder / "manifest.json"]:
                if path.exists():
                    rename(path, folder / path.name)

    def cares(self, units: Iterable[int]) -> dict[int, Care]:
        """Units that are known to need care: `known_cares`, and what quarantined records say of how they were made."""
        found = dict(self.known_cares)
        for unit in units:
            with contextlib.suppress(BadData, InputMissing):
                record = read_record(self.folder / "quarantine" / f"{unit:05d}.json", Commit)
                if record.care is not None and record.unit == unit:
                    found[unit] = record.care
        return found

    def commit(self, record: Commit) -> None:
        """Make one finished unit count."""
        put_if_absent(self.part(record.unit) / "commits" / f"{record.unit:05d}.json", to_json(record))

    def manifest(self) -> Manifest | None:
        """The sealed manifest; None where it or a file it names is missing or damaged and must be made again."""
        path = self.folder / "manifest.json"
        if not path.exists():
            return None
        try:
            manifest = read_record(path, Manifest)
        except BadData:
            return None
        whole = all(self._holds(name, digest) for name, digest in manifest.files.items())
        return manifest if whole else None

    def _holds(self, name: str, digest: str) -> bool:
        places = (inside(self.folder, name), inside(self.folder, "tokenizer", name))
        return any(path.is_file() and sha256_of(path) == digest for path in places)

    def is_all(self, manifest: Manifest, done: Mapping[int, Commit]) -> bool:
        """Whether a manifest names what was asked for, every unit of it being done."""
        enough = len(manifest.commits) >= self.asked
        return enough and all(c.unit in done and done[c.unit].bound == c for c in manifest.commits)

    def refuse_gaps(self, done: Mapping[int, Commit]) -> None:
        """Raise Mismatch where a unit of an addition is not done that this command was not asked for."""
        gaps = [unit for unit in range(len(self.plan.units)) if unit not in done]
        if gaps:
            raise Mismatch(
                f"{self.folder}: unit {gaps[0]} belongs to what was added, and this command does not make it",
                kept="every finished unit",
                next=f"repeat the xkd-cache add command that began it, or xkd-cache repair {self.root}",
            )

    def seal(self, commits: dict[int, Commit], constants: dict[str, Any], files: dict[str, str]) -> Manifest:
        """Write the manifest once all units are done, and remove files that no record names."""
        ordered = tuple(commits[unit] for unit in range(len(self.plan.units)))
        manifest = sealed(self.plan, ordered, constants, files)
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
            for part in parts_of(self.folder):
                loose = [path for path in part.glob("[0-9]*.arrow") if path.name not in shards]
                loose += [path for path in (part / "rejects").glob("*.jsonl") if path.name not in rejects]
                for folder in (part, part / "commits", part / "rejects"):
                    loose += folder.glob(".tmp-*")
                for path in loose:
                    remove(path)


_AS_BEFORE: Final = "use the weights, tokenizer, parser and xkd-toolkit of the first time, or make a new cache"
GROWING: Final = ("corpus", "documents", "teacher_root")
"""What of a spec is another after an addition."""


def _same(one: Plan, other: Plan) -> bool:
    return one.spec == other.spec and one.units == other.units


def holds(part: Path, commit: Commit) -> bool:
    """Whether the shard and the rejects that a record names are there and what it says."""
    shard = inside(part, commit.file)
    whole = shard.is_file() and shard.stat().st_size == commit.size and sha256_of(shard) == commit.sha256
    if commit.rejects is not None:
        rejects = inside(part, "rejects", commit.rejects.file)
        whole = whole and rejects.is_file() and sha256_of(rejects) == commit.rejects.sha256
    return whole

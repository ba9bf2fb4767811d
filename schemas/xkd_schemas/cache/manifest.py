"""plan.json, commits/NNNNN.json and manifest.json: what a table is made of and how far it got.

A table folder holds an immutable plan (what will be made), one commit record for each finished
unit (what was made), and a manifest once all units are there. A unit is done exactly when its
commit record exists and its shard has the size and digest the record names.
"""

import contextlib
import gc
import json
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Final, TypeVar

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer

from xkd_schemas.durable_files import SAFE_NAME, Json, digest
from xkd_schemas.errors import BadData, InputMissing, Mismatch, Refused

FORMAT = 1  # version of these three files; a reader refuses a larger `min_reader`

Name = Annotated[str, Field(pattern=f"^{SAFE_NAME.pattern}$")]
Spec = dict[str, Json]
_MAKE = "run the xkd-cache command that makes this table"


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Unit(_Record):
    """One shard to be made: `rows` input rows of `source` from `first` (0 is the first row)."""

    source: str
    first: int
    rows: int


class RecordBatch(_Record):
    """Where a record batch lies in its shard, in bytes, and what its bytes hash to."""

    offset: int
    length: int
    rows: int
    xxh3: str


class Reject(_Record):
    """The file of one unit that lists the rows it could not use."""

    file: Name
    rows: int
    sha256: str
    reasons: dict[str, int]


class MadeDifferently(_Record):
    """How this shard deviates from the plan; the default means not at all."""

    lost: tuple[int, ...] = ()  # rows left out, ascending: each killed every process that worked on it
    batch: int = 0  # tokens of a forward pass, or documents of a call, after memory ran out; 0: the plan's

    def __bool__(self) -> bool:
        return bool(self.lost or self.batch)


class Commit(_Record):
    """One finished unit."""

    unit: int
    file: Name
    rows: int
    size: int  # bytes
    sha256: str
    frame_xxh3: str  # xxh3 of the bytes before the first and after the last record batch
    batches: tuple[RecordBatch, ...]
    rejects: Reject | None = None
    counts: dict[str, int] = {}  # named totals over the unit's rows: tokens, words, cut documents, rows by status
    sums: dict[str, float] = {}  # named sums that constants are made from
    unusable: tuple[int, ...] = ()  # rows of the unit whose `status` is not "ok"
    care: MadeDifferently | None = None  # what differed from the plan; not written where nothing did
    made_on: str | None = None  # kind of processor, e.g. "CPU AVX2"; not where no model ran, nor in a manifest

    @model_serializer(mode="wrap")
    def _without_none(self, handler: SerializerFunctionWrapHandler) -> dict[str, Json]:
        data: dict[str, Json] = handler(self)
        return {name: value for name, value in data.items() if value is not None or name == "rejects"}

    @property
    def bound(self) -> "Commit":
        """What of the record stands in the manifest."""
        return self.model_copy(update={"made_on": None})


class Plan(_Record):
    """What a table will be. Written once, never changed."""

    format: int = FORMAT
    min_reader: int = FORMAT
    table: str  # documents, teachers/NAME or students/NAME
    spec: Spec  # everything the bytes depend on; operational settings are not in it
    units: tuple[Unit, ...]


class Manifest(_Record):
    """A finished table."""

    format: int = FORMAT
    min_reader: int = FORMAT
    table: str
    spec: Spec
    spec_id: str
    commits: tuple[Commit, ...]
    constants: dict[str, Json] = {}  # measured once over the whole table: sizes of the model, standard deviations
    files: dict[Name, str] = {}  # sha256 of the other files of the folder that belong to the table
    root: str  # sha256 over spec, commits, constants and files: names this table's content

    @property
    def rows(self) -> int:
        """Documents in the table."""
        return sum(c.rows for c in self.commits)

    def count(self, name: str) -> int:
        """Sum of one named count over all units."""
        return sum(c.counts.get(name, 0) for c in self.commits)


def seal_table(plan: Plan, commits: tuple[Commit, ...], constants: dict[str, Json], files: dict[str, str]) -> Manifest:
    """The manifest of a table whose units are all committed."""
    commits = tuple(commit.bound for commit in commits)
    manifest = Manifest(
        table=plan.table, spec=plan.spec, spec_id=digest(plan.spec), commits=commits, constants=constants, files=files,
        root="",
    )  # fmt: skip
    return manifest.model_copy(update={"root": _root(manifest)})


def _root(m: Manifest) -> str:
    return digest([m.table, m.spec, [c.model_dump(mode="json") for c in m.commits], m.constants, m.files])


def is_whole(manifest: Manifest) -> bool:
    """True where the manifest matches the digests it carries."""
    m = manifest
    return m.format == m.min_reader == FORMAT and _root(m) == m.root and digest(m.spec) == m.spec_id


def to_json(record: BaseModel) -> bytes:
    """Indented JSON with a final newline, the same bytes for the same record.

    Plan and commit carry the sha256 of the rest: until the table is sealed, nothing else vouches for them, and
    afterwards it tells a damaged plan from one that was made for something else.
    """
    data = record.model_dump(mode="json")
    if isinstance(record, Commit | Plan):
        data[OWN] = digest(data)
    return (json.dumps(data, sort_keys=True, indent=1) + "\n").encode()


OWN: Final = "digest"  # field of a plan's and a commit's file that the record itself does not have


M = TypeVar("M", Plan, Commit, Manifest)


def read_record(path: Path, kind: type[M]) -> M:
    """Read plan, commit or manifest; InputMissing, BadData or Mismatch says what is wrong with it."""
    try:
        content = path.read_bytes()
    except OSError as error:
        what = "is not there" if isinstance(error, FileNotFoundError) else f"cannot be read: {error.strerror}"
        raise InputMissing(f"{path} {what}", fix=_MAKE) from None
    try:
        with _collecting_nothing():
            return _parse(path, content, kind)
    except (ValueError, TypeError, AttributeError, RecursionError) as error:  # ValidationError is a ValueError
        line = " ".join(str(error).split()).partition(" [type=")[0][:200]
        advice = _MAKE
        if kind is Plan:
            known = (path.parent / "manifest.json").exists()
            advice = "xkd-cache repair CACHE" if known else f"{_MAKE}; if it says this too, delete {path.parent}"
        raise BadData(f"{path} cannot be read as {kind.__name__.lower()}: {line}", fix=advice) from error


def record_or_none(path: Path, kind: type[M]) -> M | None:
    """The same, or None where it cannot be read or is damaged."""
    with contextlib.suppress(BadData, InputMissing):
        return read_record(path, kind)
    return None


def _parse(path: Path, content: bytes, kind: type[M]) -> M:
    data = json.loads(content, parse_constant=_finite, parse_float=_finite)
    own = data.pop(OWN, None) if kind is not Manifest else None  # none in caches of before
    whole = own is None or own == digest(data)
    needed = int(data.get("min_reader", 0)) if kind is not Commit and whole else 0
    if needed > FORMAT and "earlier" in data:
        raise Mismatch(
            f"{path}: documents were added to this cache, and this program reads no such cache",
            kept="the cache as it is",
            fix="make a cache of each corpus: xkd-cache preprocess RUN.toml, then xkd-train --shards a/ --shards b/",
        )
    if needed > FORMAT:
        raise Mismatch(f"{path}: format {needed}, this program reads up to {FORMAT}", fix="upgrade xkd-toolkit")
    record = kind.model_validate(data)
    if not (is_whole(record) if isinstance(record, Manifest) else whole):
        raise ValueError("it does not match its own digest")
    return record


def is_damaged(path: Path, plan: Plan) -> bool:
    """Whether a plan's file cannot be read and was once that of `plan`: it holds its digest, which is
    its second line, or all that comes after."""
    try:
        read_record(path, Plan)
        return False
    except BadData:
        found, meant = (content.split(b"\n") for content in (path.read_bytes(), to_json(plan)))
    return digest(plan.model_dump(mode="json")).encode() in b"\n".join(found) or found[2:] == meant[2:]


def record_paths(folder: Path) -> list[Path]:
    """Every commit record of a table, in order of the units."""
    return sorted((folder / "commits").glob("[0-9]*.json"))


def _finite(text: str) -> float:
    """A number of a record; NaN and infinite ones are no JSON."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is no JSON number")
    return value


@contextlib.contextmanager
def _collecting_nothing() -> Iterator[None]:
    """Without the cyclic collector: records hold no cycles, and every few hundred it would walk the whole program."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def differences(ours: Spec, theirs: Spec, prefix: str = "") -> list[tuple[str, str, str]]:
    """(dotted field, our value, their value) for every leaf that differs; of two lists, what only one of them has."""
    found: list[tuple[str, str, str]] = []
    for key in sorted(set(ours) | set(theirs)):
        a, b = ours.get(key, "absent"), theirs.get(key, "absent")
        if isinstance(a, list) and isinstance(b, list):
            if len(a) == len(b) and all(isinstance(item, dict) for item in a + b):
                a, b = ({str(at): item for at, item in enumerate(items)} for items in (a, b))
            elif any(item not in b for item in a) or any(item not in a for item in b):
                a, b = (_beyond(a, b), _beyond(b, a))
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append((prefix + key, _short(a), _short(b)))
    return found


def _beyond(items: list[Json], others: list[Json]) -> Json:
    """What of a list is not in another, by name where its items have one."""
    more = [
        item["name"] if isinstance(item, dict) and "name" in item else item for item in items if item not in others
    ]
    return more if more else "nothing else"


def _short(value: Json) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def refuse_differences(where: Path, ours: Spec, theirs: Spec, *, advice: str, what: str = "cache") -> None:
    """Raise Mismatch that names every differing field with both values, or do nothing; `where` holds a `what`."""
    rows = differences(ours, theirs)
    if rows:
        listed = "; ".join(f"{field}: {what} has {b}, this run has {a}" for field, a, b in rows[:6])
        more = f" (and {len(rows) - 6} more)" if len(rows) > 6 else ""
        raise Mismatch(f"{where} was made for something else: {listed}{more}", kept=f"the {what} as it is", fix=advice)


# Which files a cache may hold: plain files that its manifests name, and no link to anything outside.

KINDS: Final = ("teachers", "signals", "students")  # folders of a cache that hold table folders
ROOT_FILES: Final = ("README.md", "SHA256SUMS", "LOCK")

_LEFT = re.compile(r"plan\.json|commits/\d{5}\.json|(rejects/)?\d{5}-[0-9a-f]{12}\.(arrow|jsonl)")
"""Files of units that may lie in a table without its manifest naming them: of a worker
that came too late. No command reads them; gc removes them."""


def files_below(folder: Path) -> Iterator[Path]:
    """Every file below a folder, at any depth, sorted, or none; Refused where a link, a pipe or a device is there."""
    try:
        with os.scandir(folder) as entries:
            ordered = sorted(entries, key=lambda entry: entry.name)
    except (FileNotFoundError, NotADirectoryError):
        return
    for entry in ordered:
        if entry.is_symlink():
            raise Refused(f"{entry.path} is a symbolic link", fix="delete it, or copy what it names into the cache")
        if entry.is_dir():
            yield from files_below(Path(entry.path))
        elif entry.is_file():
            yield Path(entry.path)
        else:
            raise Refused(f"{entry.path} is neither a file nor a folder", fix="delete it")


def refuse_links(folder: Path) -> None:
    """Raise Refused, which names it, where a link is anywhere below the folder: nothing may be followed out of it."""
    for _ in files_below(folder):
        pass


def outside_tables(root: Path) -> Iterator[Path]:
    """Entries of a cache that belong to no table; hidden ones are left alone."""
    yield from (path for path in _visible(root) if path.name not in {*KINDS, "documents", *ROOT_FILES})
    yield from (path for kind in KINDS for path in _visible(root / kind) if not path.is_dir())


def _visible(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*") if not path.name.startswith("."))


def unnamed_files(folder: Path, manifest: Manifest) -> Iterator[Path]:
    """Files of a table's folder that its manifest does not name; hidden ones and quarantine are left alone."""
    named = {"plan.json", "manifest.json", *manifest.files, *(f"tokenizer/{name}" for name in manifest.files)}
    for number, commit in enumerate(manifest.commits):
        named |= {f"commits/{number:05d}.json", commit.file}
        named |= {f"rejects/{commit.rejects.file}"} if commit.rejects else set()
    for path in files_below(folder):
        parts = path.relative_to(folder).parts
        hidden = any(part.startswith(".") for part in parts)
        if parts[0] != "quarantine" and not hidden and "/".join(parts) not in named:
            yield path


def refuse_unnamed(root: Path, folder: Path, manifest: Manifest) -> None:
    """Raise Refused where a cache holds a file that no manifest names, beside its tables or in the one at `folder`."""
    strange = list(outside_tables(root))
    strange += [p for p in unnamed_files(folder, manifest) if not _LEFT.fullmatch(p.relative_to(folder).as_posix())]
    if strange:
        raise Refused(
            f"{strange[0]}: no manifest names it" + (f", nor {len(strange) - 1} more files" if strange[1:] else ""),
            kept="the cache as it is",
            fix="move it out of the cache, or copy the cache again from where it came",
        )

"""Read a sealed table: memory-mapped shards, opened when first needed, every byte checked when first touched."""

import contextlib
import functools
import mmap
from bisect import bisect_right
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any, Final

import pyarrow as pa

from xkd_schemas.cache.manifest import (
    KINDS,
    Commit,
    Manifest,
    Plan,
    RecordBatch,
    read_record,
    record_or_none,
    refuse_links,
    refuse_unnamed,
)
from xkd_schemas.codecs import CODECS, PLAIN, Codec
from xkd_schemas.durable_files import SAFE_NAME, inside, sha256_of, xxh3_of
from xkd_schemas.errors import BadData, InputMissing, Mismatch, UsageError
from xkd_schemas.ragged import UNREADABLE, Columns, check_schema, read_batch

OPEN_SHARDS: Final = 128  # of a table at once: each takes a file descriptor, of which a process often has 1024
READY_BATCHES: Final = 16  # record batches of an open shard whose columns stay ready: some KB each

Decoder = Callable[[Callable[[str], Any]], Any]  # given a reader of stored columns, the values of one coded column
_AGAIN = "run the same xkd-cache command again: it makes only what is missing or damaged"
TABLES: Final = ("documents", *(f"{kind}/*" for kind in KINDS))  # each after those that it is made from


class Row:
    """One document of one table; columns are read on demand as views into the mapped shard."""

    __slots__ = ("_beside", "_columns", "_decoders", "_row")

    def __init__(self, columns: Columns, row: int, decoders: Mapping[str, Decoder]) -> None:
        self._columns = columns
        self._row = row
        self._decoders = decoders
        self._beside: tuple[Row, ...] = ()

    def join(self, others: tuple["Row", ...]) -> "Row":
        """The same row, which has the columns of these rows too where it has none of that name."""
        self._beside = others
        return self

    def __getitem__(self, column: str) -> Any:
        for other in self._beside if column not in self._columns.names else ():
            if column in other._columns.names:
                return other[column]
        decoder = self._decoders.get(column)
        return self.stored(column) if decoder is None else decoder(self.stored)

    def get(self, column: str, default: Any) -> Any:
        """The column, or `default` where the table has none of that name."""
        return self[column] if any(column in row._columns.names for row in (self, *self._beside)) else default

    def stored(self, column: str) -> Any:
        """The column as it lies in the shard, before a codec has read it."""
        try:
            return self._columns.row(column, self._row)
        except KeyError:
            known = ", ".join(sorted(self._columns.names))
            fix = "name one of them; where none was named: xkd-cache verify CACHE --level deep"
            raise BadData(f"a shard lacks column {column}, it has {known}", fix=fix) from None


class Shard:
    """One Arrow IPC file whose size and digests are those of its commit record.

    `checked` are the record batches whose bytes were compared before; those that are compared now are added.
    """

    def __init__(self, path: Path, commit: Commit, checked: set[int] | None = None) -> None:
        try:
            with path.open("rb") as stream:
                size = stream.seek(0, 2)
                if size != commit.size:
                    raise BadData(f"{path} has {size} bytes, its record says {commit.size}", fix=_AGAIN)
                self._map = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError:
            raise BadData(f"{path} is missing", fix=_AGAIN) from None
        self.path = path
        self.commit = commit
        self._checked = set() if checked is None else checked
        self._bytes = memoryview(self._map)
        if xxh3_of(_frame(self._bytes, commit.batches)) != commit.frame_xxh3:
            raise BadData(f"{path} is corrupt: header or footer does not match its digest", fix=_AGAIN)
        try:
            self.schema: pa.Schema = pa.ipc.open_file(pa.BufferReader(pa.py_buffer(self._map))).schema
            check_schema(self.schema)
        except UNREADABLE as error:
            raise BadData(f"{path} is not an Arrow IPC file: {error}", fix=_AGAIN) from error
        self._columns: OrderedDict[int, Columns] = OrderedDict()
        self._decoders = _decoders(path, self.schema)
        self._ends = list(accumulate(b.rows for b in commit.batches))

    def batch(self, number: int) -> pa.RecordBatch:
        """Record batch `number`, after its bytes were compared with their digest once."""
        record = self.commit.batches[number]
        data = self._bytes[record.offset : record.offset + record.length]
        if number not in self._checked and xxh3_of(data) != record.xxh3:
            first = self._ends[number] - record.rows
            raise BadData(
                f"{self.path} is corrupt: record batch {number} (rows {first} to {first + record.rows - 1}) "
                "does not match its digest",
                fix=_AGAIN,
            )
        self._checked.add(number)
        try:
            return read_batch(data, self.schema, record.rows)
        except UNREADABLE as error:
            raise BadData(f"{self.path}: record batch {number} cannot be read: {error}", fix=_AGAIN) from error

    def row(self, row: int) -> Row:
        """Row `row` of this shard."""
        number = bisect_right(self._ends, row)
        if number in self._columns:
            self._columns.move_to_end(number)
        else:
            self._columns[number] = Columns(self.batch(number))
            if len(self._columns) > READY_BATCHES:
                self._columns.popitem(last=False)
        first = self._ends[number] - self.commit.batches[number].rows
        return Row(self._columns[number], row - first, self._decoders)


def _decoders(path: Path, schema: pa.Schema) -> dict[str, Decoder]:
    """The coded columns of a shard; columns stored as they are have no decoder."""
    found: dict[str, Decoder] = {}
    for field in schema:
        name = (field.metadata or {}).get(b"codec", b"").decode()
        if name in CODECS and name != PLAIN:
            found[field.name] = functools.partial(_decode, path, CODECS[name], field.name, schema.metadata or {})
    return found


def _decode(path: Path, codec: Codec, column: str, metadata: Mapping[bytes, bytes], read: Callable[[str], Any]) -> Any:
    try:
        return codec.decode(column, read, metadata)
    except BadData as error:
        raise BadData(f"{path}: {error}", fix=_AGAIN) from error


def _frame(data: memoryview, batches: tuple[RecordBatch, ...]) -> bytes:
    if not batches:
        return bytes(data)
    end = batches[-1].offset + batches[-1].length
    return bytes(data[: batches[0].offset]) + bytes(data[end:])


class Table:
    """A sealed table of a cache.

    Args:
        root: The cache folder.
        name: "documents", "teachers/NAME" or "students/NAME".
        beside: Tables of the same documents; a row has their columns too.

    Raises:
        InputMissing: There is no manifest.
        BadData: The manifest does not match its own digest.
        Refused: There is a link, or a file that no manifest names.
    """

    def __init__(self, root: Path, name: str, beside: Iterable["Table"] = ()) -> None:
        self.name = name
        self._beside = tuple(beside)
        check_cache(root)
        self.folder = inside(root, *name.split("/"))
        refuse_links(self.folder)  # before anything is read: a pipe would be waited for
        path = self.folder / "manifest.json"
        if not path.exists():
            raise InputMissing(f"{path} is not there", fix=_how_to_make(root, name))
        self.manifest = read_record(path, Manifest)
        if self.manifest.table != name:
            raise BadData(f"{path} is that of {self.manifest.table}", fix=_AGAIN)
        refuse_unnamed(root, self.folder, self.manifest)
        self._ends = list(accumulate(c.rows for c in self.manifest.commits))
        self._shards: OrderedDict[int, Shard] = OrderedDict()
        self._checked: defaultdict[int, set[int]] = defaultdict(set)
        self._first: tuple[str, pa.Schema] | None = None

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def expect(self, schema: pa.Schema) -> None:
        """Refuse shards of another schema; without this call, of another than the shard that was opened first."""
        self._first = "its manifest", schema

    def path(self, number: int) -> Path:
        """Where shard `number` lies."""
        return inside(self.folder, self.manifest.commits[number].file)

    def shard(self, number: int) -> Shard:
        """Shard `number`, checked once; OPEN_SHARDS stay open, those used last."""
        if number in self._shards:
            self._shards.move_to_end(number)
            return self._shards[number]
        shard = Shard(self.path(number), self.manifest.commits[number], self._checked[number])
        mark = (shard.schema.metadata or {}).get(b"unit")
        if mark != str(number).encode():
            raise BadData(f"{shard.path} is shard {(mark or b'?').decode()}, expected {number}", fix=_AGAIN)
        name, schema = self._first = self._first or (shard.path.name, shard.schema)
        if not shard.schema.equals(schema):
            raise Mismatch(f"{shard.path} has another schema than {name}", fix=_AGAIN)
        self._shards[number] = shard
        if len(self._shards) > OPEN_SHARDS:
            self._shards.popitem(last=False)
        return shard

    def __getitem__(self, index: int) -> Row:
        """Row `index` of the table, in the order of the plan; BadData where one beside holds another document."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = bisect_right(self._ends, index)
        row = self.shard(number).row(index - (self._ends[number] - self.manifest.commits[number].rows))
        others = tuple(table[index] for table in self._beside)
        for table, other in zip(self._beside, others, strict=True):
            if other["doc_id"] != row["doc_id"]:
                raise BadData(
                    f"{table.folder}: row {index} is another document than in {self.folder}",
                    fix=f"delete {table.folder} and add its signals again",
                )
        return row.join(others) if others else row

    def __iter__(self) -> Iterator[Row]:
        return (self[i] for i in range(len(self)))


def check_tokenizer(folder: Path) -> None:
    """Raise BadData where a file of the tokenizer in a table's folder is missing, changed or not the table's.

    Where there is no whole manifest, SHA256SUMS says what the files were. Any other folder is left alone.
    """
    table = folder.absolute().parent
    root, kind = table.parent.parent, table.parent.name
    if folder.name != "tokenizer" or not any((table / name).is_file() for name in ("manifest.json", "plan.json")):
        return
    refuse_links(inside(root, kind, table.name, "tokenizer"))
    known = _tokenizer_digests(table)
    there = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    for name in sorted(known.keys() | there):
        path = inside(folder, name)
        if name not in there or name not in known or sha256_of(path) != known[name]:
            what = "does not match its digest" if name in known else "is a file that no manifest vouches for"
            again = f"xkd-cache repair {root} --model PATH_OF_{table.name}"
            if kind == "students":
                again = f"xkd-cache align {root} --student PATH_OF_ITS_TOKENIZER --name {table.name}"
            raise BadData(f"{path} {what if name in there else 'is not there'}", fix=again)


def _tokenizer_digests(table: Path) -> dict[str, str]:
    if manifest := record_or_none(table / "manifest.json", Manifest):
        return {name: digest for name, digest in manifest.files.items() if not name.endswith(".safetensors")}
    prefix = f"{table.parent.name}/{table.name}/tokenizer/"
    with contextlib.suppress(OSError, UnicodeDecodeError):
        lines = (table.parent.parent / "SHA256SUMS").read_bytes().decode().split("\n")
        pairs = (line.partition("  ") for line in lines)
        return {name.removeprefix(prefix): digest for digest, _, name in pairs if name.startswith(prefix)}
    return {}


def sealed_tables(root: Path) -> list[str]:
    """Every finished table of a cache, documents first; documents stands in it even where it is not there."""
    return ["documents", *(f"{kind}/{name}" for kind in KINDS for name in names_in(root, kind))]


def names_in(root: Path, kind: str) -> list[str]:
    """Names of the sealed tables below `root/kind`, sorted."""
    folder = root / kind
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted(path.name for path in found if (path / "manifest.json").is_file())


def check_cache(root: Path) -> None:
    """Raise InputMissing with the command that makes a cache where there is no such folder."""
    if not root.is_dir():
        raise InputMissing(f"cache {root} is not a folder", fix=_how_to_make(root, "documents"))


def check_name(name: str, flag: str) -> None:
    """Raise UsageError where a table cannot have that name; "" is left to whoever chooses one."""
    if name and not SAFE_NAME.fullmatch(name):
        raise UsageError(
            f"{flag} {name}: not a name for a table", fix="use letters, digits, dots, dashes and underscores"
        )


def _how_to_make(root: Path, name: str) -> str:
    kind, _, own = name.partition("/")
    commands = {
        "documents": f"xkd-cache documents CORPUS --out {root}",
        "teachers": f"xkd-cache teacher {root} --model PATH_OF_{own} --name {own}",
        "students": f"xkd-cache align {root} --student PATH_OF_{own} --name {own}",
    }
    return commands.get(kind, f"xkd-cache add {root} --model PATH_OF_THE_TEACHER --for LOSS")


def only_teacher(root: Path) -> str:
    """The teacher of a cache; InputMissing where there is none yet, UsageError where there are several."""
    check_cache(root)
    names = names_in(root, "teachers")
    if not names:
        raise InputMissing(f"{root} has no finished teacher table", fix=f"xkd-cache teacher {root} --model MODEL")
    return _only(root, "teacher", names)


def only_student(root: Path, teacher: str) -> str:
    """The student that was aligned with a teacher, "" where there is none; UsageError where there are several."""
    plans = {name: inside(root, "students", name, "plan.json") for name in names_in(root, "students")}
    names = [name for name, path in plans.items() if read_record(path, Plan).spec["teacher"] == teacher]
    return _only(root, "student", names) if names else ""


def _only(root: Path, what: str, names: list[str]) -> str:
    if len(names) > 1:
        raise UsageError(f"{root} has {what}s {', '.join(names)}", fix=f"choose one with --{what} NAME")
    return names[0]

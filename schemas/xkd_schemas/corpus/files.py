r"""One file of a corpus: counted and fingerprinted once, then read from any row on, in bounded memory.

A part remembers size and time of the file, so that a reader in another process notices a change
instead of pairing new rows with old numbers. A row of a Parquet or Arrow file is a dict; where its text is not UTF-8
(neither format checks), it is the bytes of that text, and the rows beside it are not lost.
"""

import contextlib
import gzip
import hashlib
import io
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from xkd_schemas.durable_files import sha256_of
from xkd_schemas.errors import BadData, InputMissing, Mismatch, Refused, UsageError

COMPRESSED: Final = (".gz", ".zst")
TABLES: Final = (".parquet", ".arrow")
SUFFIXES: Final = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".ndjson", ".json", ".json.gz", ".json.zst", *TABLES)
FOLDER_SUFFIXES: Final = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".ndjson", *TABLES)
"""Those that are taken from a folder, where a .json is something else more often than rows."""
MAX_LINE_BYTES: Final = 64 << 20  # a longer line is kept as its length, digest and head only
HEAD_BYTES: Final = 256  # how much of such a line is kept
MAX_RATIO: Final = 200  # expanded bytes a compressed byte may stand for, once FREE_BYTES have been expanded
FREE_BYTES: Final = 64 << 20  # expanded bytes before the ratio is looked at: a small file of equal lines is no bomb
MAX_EXPANDED_BYTES: Final = 64 << 30  # expanded size of one compressed file
BATCH_ROWS: Final = 256  # rows of a table turned into Python objects at once
STREAM_END: Final = b"\xff\xff\xff\xff\0\0\0\0"  # of an Arrow stream; without them a cut one reads as a shorter table
BOM: Final = b"\xef\xbb\xbf"


@dataclass(frozen=True, kw_only=True, slots=True)
class LongLine:
    """A line above the limit; its bytes were read and dropped."""

    num_bytes: int
    sha256: str
    head: bytes  # the first HEAD_BYTES bytes


Line = bytes | LongLine
Content = Line | dict[str, object]


@dataclass(frozen=True, kw_only=True, slots=True)
class CorpusFile:
    """One file of a source, or one data set."""

    path: str  # file, or NAME@COMMIT:SUBSET:SPLIT of a data set on the hub
    kind: str  # lines, table or hub
    num_rows: int
    state: tuple[int, int] = (0, 0)  # bytes and time of change in nanoseconds when it was counted; of a file only
    num_boms: int = 0  # 1 where the file began with a byte order mark


def count_file(path: Path) -> tuple[CorpusFile, str]:
    """The part that a file is, and its sha256; blank lines after the last row are no rows.

    Raises:
        InputMissing: the file cannot be read.
        BadData: it is broken or was cut off.
        Refused: it expands beyond MAX_RATIO or MAX_EXPANDED_BYTES.
        UsageError: a .json file that holds one list.
    """
    with _file_errors(path):
        state, digest = _state(path), sha256_of(path)
        if path.suffix in TABLES:
            return CorpusFile(path=str(path), kind="table", num_rows=_count_table(path), state=state), digest
    num_rows = num_boms = 0
    for number, line in enumerate(_read_lines(path)):
        if number == 0:
            num_boms, line = _without_bom(line)
            if ".json" in path.suffixes[-2:] and isinstance(line, bytes) and line.lstrip().startswith(b"["):
                raise UsageError(
                    f"{path} begins with a list; rows are objects, one on each line",
                    fix=f"jq -c '.[]' {path.name} > rows.jsonl",
                )
        if isinstance(line, LongLine) or line.strip():
            num_rows = number + 1
    return CorpusFile(path=str(path), kind="lines", num_rows=num_rows, state=state, num_boms=num_boms), digest


def file_rows(part: CorpusFile, first: int, columns: Sequence[str] | None) -> Iterator[Content]:
    """Rows of a part of kind lines or table from row `first` on (0 is the first).

    There may be more than were counted: blank lines at the end of a file.

    Args:
        part: What `count_file` gave.
        first: Rows to leave out.
        columns: Of a table, the only columns to read; None: all.

    Raises:
        Mismatch: the file was changed after it was counted.
        InputMissing, BadData, Refused: as `count_file`.
    """
    path = Path(part.path)
    _check_unchanged(part, path)
    if part.kind == "table":
        yield from _table_rows(path, first, columns)
        return
    for number, line in enumerate(_read_lines(path)):
        if number >= first:
            line = _without_bom(line)[1] if number == 0 else line
            yield line.removesuffix(b"\r") if isinstance(line, bytes) else line  # files written on Windows


def _state(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _without_bom(line: Line) -> tuple[int, Line]:
    if isinstance(line, bytes) and line.startswith(BOM):
        return 1, line.removeprefix(BOM)
    return 0, line


def _check_unchanged(part: CorpusFile, path: Path) -> None:
    try:
        state = _state(path)
    except OSError as error:
        raise InputMissing(f"{path}: {error.strerror}", fix="put the file back and run again") from error
    if state != part.state:
        raise Mismatch(f"{path} was changed after it was counted", fix="run again when nothing writes to it")


@contextlib.contextmanager
def _file_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError, zlib.error, pa.ArrowException, UnicodeError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # those about the content have none
            raise InputMissing(
                f"{path}: {error.strerror or error}", fix="check the path and its permissions"
            ) from error
        line = " ".join(str(error).split())[:200]
        raise BadData(f"{path} is broken or cut off: {line}", fix="copy or download it again") from error


def _read_lines(path: Path) -> Iterator[Line]:
    r"""Every line without its `\n`; bytes after the last one are a line too.

    Text mode and `splitlines` also cut at lone CR, NEL, VT and U+2028, which are ordinary characters in JSON strings.
    """
    pieces = _read_pieces(path)
    for piece in pieces:
        if len(piece) <= MAX_LINE_BYTES or piece.endswith(b"\n"):
            yield piece.removesuffix(b"\n")
            continue
        head, digest, num_bytes = piece[:HEAD_BYTES], hashlib.sha256(piece), len(piece)
        while not piece.endswith(b"\n") and (piece := next(pieces, b"")):
            rest = piece.removesuffix(b"\n")
            digest.update(rest)
            num_bytes += len(rest)
        yield LongLine(num_bytes=num_bytes, sha256=digest.hexdigest(), head=head)


def _read_pieces(path: Path) -> Iterator[bytes]:
    """The expanded content: lines with their ends, those above MAX_LINE_BYTES in pieces."""
    num_read = 0
    with _file_errors(path), path.open("rb", buffering=0) as file:
        stream = _expand(path.suffix, file)
        while piece := stream.readline(MAX_LINE_BYTES + 1):
            num_read += len(piece)
            most = min(MAX_EXPANDED_BYTES, max(FREE_BYTES, MAX_RATIO * file.tell()))
            if path.suffix in COMPRESSED and num_read > most:
                raise Refused(
                    f"{path}: {file.tell():,} compressed bytes have grown to more than {num_read:,}",
                    fix="if you trust the file, expand it yourself and name the plain .jsonl",
                )
            yield piece


def _expand(suffix: str, file: io.FileIO) -> io.BufferedReader:
    """The content as a stream; Arrow's zstd takes 128 MiB for a window at most."""
    raw: Any = file
    if suffix == ".gz":
        raw = gzip.GzipFile(fileobj=raw)
    elif suffix == ".zst":
        raw = pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), "zstd")
    return io.BufferedReader(raw, 1 << 20)


def _table_rows(path: Path, first: int, columns: Sequence[str] | None) -> Iterator[dict[str, object] | bytes]:
    """Rows of a .parquet or .arrow file; columns that are not there are left out."""
    with _file_errors(path):
        batches = _parquet_batches(path, first, columns) if path.suffix == ".parquet" else _arrow_batches(path, first)
        for batch in batches:
            kept = batch if columns is None else batch.select([n for n in batch.schema.names if n in columns])
            yield from _objects(kept)


def _count_table(path: Path) -> int:
    if path.suffix == ".parquet":
        with pq.ParquetFile(path) as file:
            return int(file.metadata.num_rows)
    return sum(batch.num_rows for batch in _arrow_batches(path, 0))


def _parquet_batches(path: Path, first: int, columns: Sequence[str] | None) -> Iterator[pa.RecordBatch]:
    with pq.ParquetFile(path) as file:
        names = None if columns is None else [n for n in file.schema_arrow.names if n in columns]
        yield from _behind(first, file.iter_batches(batch_size=BATCH_ROWS, columns=names))


def _arrow_batches(path: Path, first: int) -> Iterator[pa.RecordBatch]:
    if path.stat().st_size == 0:
        raise BadData(f"{path} is empty, which no Arrow file is", fix="copy or download it again")
    with pa.memory_map(str(path)) as source:
        if source.read(6) == b"ARROW1":  # the file format; the stream format begins otherwise
            reader = pa.ipc.open_file(source)
            yield from _behind(first, map(reader.get_batch, range(reader.num_record_batches)))
            return
        source.seek(max(0, source.size() - len(STREAM_END)))
        if source.read() != STREAM_END:
            raise BadData(f"{path}: the Arrow stream has no end; it was cut off", fix="copy it again")
        source.seek(0)
        yield from _behind(first, pa.ipc.open_stream(source))


def _behind(skip: int, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    for batch in batches:
        if skip < batch.num_rows:
            yield batch.slice(skip)
        skip = max(0, skip - batch.num_rows)


def _objects(batch: pa.RecordBatch) -> Iterator[dict[str, object] | bytes]:
    for at in range(0, batch.num_rows, BATCH_ROWS):
        piece = batch.slice(at, BATCH_ROWS)
        try:
            piece.validate(full=True)  # offsets that leave the data would be read all the same
            yield from piece.to_pylist()
        except (UnicodeDecodeError, pa.ArrowInvalid):
            yield from map(_object, (piece.slice(i, 1) for i in range(piece.num_rows)))


def _object(row: pa.RecordBatch) -> dict[str, object] | bytes:
    try:
        row.validate(full=True)
    except pa.ArrowInvalid as error:
        if "UTF8" not in str(error):
            raise
    try:
        return dict(row.to_pylist()[0])
    except UnicodeDecodeError as error:
        return error.object

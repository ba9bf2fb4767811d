"""Parquet and Arrow files as rows: counted without reading the values, read batch by batch.

A row comes out as a plain dict. Text in it that is not UTF-8 (neither format checks) does not
lose the rows beside it: that row comes out as the bytes of the text.
"""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import pyarrow as pa
import pyarrow.parquet as pq

from xkd_schemas.errors import BadData, InputMissing

BATCH_ROWS: Final = 256
"""Rows turned into Python objects at once."""
FILE_MAGIC: Final = b"ARROW1"
"""First bytes of the Arrow file format; the stream format has none."""
STREAM_END: Final = b"\xff\xff\xff\xff\0\0\0\0"
"""Last bytes of an Arrow stream that was written to its end. Without them a cut stream reads as a shorter table."""


@contextlib.contextmanager
def _name_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, UnicodeError) as error:  # names in a header that are not UTF-8
        raise _broken(path, error) from error
    except OSError as error:
        if error.errno is None:  # Arrow's own, about the content
            raise _broken(path, error) from error
        raise InputMissing(f"{path}: {error.strerror or error}", fix="check the path and its permissions") from error


def _broken(path: Path, error: Exception) -> BadData:
    line = " ".join(str(error).split())[:200]
    return BadData(f"{path} cannot be read as a table: {line}", fix="copy or download it again")


def table_rows(
    path: Path, *, first: int = 0, columns: Sequence[str] | None = None
) -> Iterator[dict[str, object] | bytes]:
    """Rows of a .parquet or .arrow file from row `first` on (0 is the first).

    Args:
        path: A Parquet file, or an Arrow file or stream.
        first: Rows to leave out; whole groups and batches are skipped unread.
        columns: The only columns to read; those that are not there are left out. None: all.

    Raises:
        BadData: broken, or a stream that was cut off.
        InputMissing: cannot be read.
    """
    with _name_errors(path):
        batches = _parquet_batches(path, first, columns) if path.suffix == ".parquet" else _arrow_batches(path, first)
        for batch in batches:
            kept = batch if columns is None else batch.select([n for n in batch.schema.names if n in columns])
            yield from _objects(kept)


def count_table_rows(path: Path) -> int:
    """Rows of a .parquet or .arrow file; raises as `table_rows` does."""
    with _name_errors(path):
        if path.suffix == ".parquet":
            with pq.ParquetFile(path) as file:
                return int(file.metadata.num_rows)
        return sum(batch.num_rows for batch in _arrow_batches(path, 0))


def _parquet_batches(path: Path, first: int, columns: Sequence[str] | None) -> Iterator[pa.RecordBatch]:
    with pq.ParquetFile(path) as file:
        names = None if columns is None else [n for n in file.schema_arrow.names if n in columns]
        skip, groups = first, list(range(file.num_row_groups))
        while groups and skip >= file.metadata.row_group(groups[0]).num_rows:
            skip -= file.metadata.row_group(groups.pop(0)).num_rows
        for batch in file.iter_batches(batch_size=BATCH_ROWS, row_groups=groups, columns=names):
            if skip < batch.num_rows:
                yield batch.slice(skip)
            skip = max(0, skip - batch.num_rows)


def _arrow_batches(path: Path, first: int) -> Iterator[pa.RecordBatch]:
    if path.stat().st_size == 0:
        raise BadData(f"{path} is empty, which no Arrow file is", fix="copy or download it again")
    with pa.memory_map(str(path)) as source:
        if source.read(len(FILE_MAGIC)) == FILE_MAGIC:
            reader = pa.ipc.open_file(source)
            batches: Iterator[pa.RecordBatch] = map(reader.get_batch, range(reader.num_record_batches))
        else:
            source.seek(max(0, source.size() - len(STREAM_END)))
            if source.read() != STREAM_END:
                raise BadData(f"{path}: the Arrow stream has no end; it was cut off", fix="copy it again")
            source.seek(0)
            batches = iter(pa.ipc.open_stream(source))
        skip = first
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
        (value,) = row.to_pylist()
    except UnicodeDecodeError as error:
        return error.object
    return dict(value)

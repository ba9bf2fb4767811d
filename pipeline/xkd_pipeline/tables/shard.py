"""Write one unit as one Arrow IPC file, named by its content, and describe it in a commit record.

This runs in workers: it writes into the table's folder and commits nothing. A file that no
record names is garbage, so a worker that dies or comes too late harms nobody.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import xxhash

from xkd_schemas.cache.manifest import Commit, RecordBatch, Reject
from xkd_schemas.durable_files import disk_errors, rename, sync_folder, write_beside, xxh3_of
from xkd_schemas.ragged import batch_of
from xkd_schemas.tokens import OK

ROWS_PER_BATCH = 32
"""Rows of a record batch: the piece that is checked and mapped at once."""

Columns = Mapping[str, Sequence[Any]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Totals:
    """What a unit adds up to; the driver sums it over all units."""

    counts: dict[str, int]
    sums: dict[str, float] = field(default_factory=dict)


class _Marked:
    """A binary sink that knows how far it is; pyarrow's own files cannot be fsynced."""

    closed = False

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self.position = 0

    def write(self, data: Any) -> int:
        self._stream.write(data)
        self.position += len(data)
        return len(data)

    def flush(self) -> None:
        self._stream.flush()

    def tell(self) -> int:
        return self.position

    def writable(self) -> bool:
        return True

    def readable(self) -> bool:
        return False

    def seekable(self) -> bool:
        return False

    def close(self) -> None:
        """The stream belongs to the caller."""


def _batches(schema: pa.Schema, columns: Columns, rows: int) -> Iterator[pa.RecordBatch]:
    for first in range(0, rows, ROWS_PER_BATCH):
        yield batch_of(schema, {n: columns[n][first : first + ROWS_PER_BATCH] for n in schema.names})


def write_shard(
    folder: Path,
    unit: int,
    schema: pa.Schema,
    columns: Columns,
    *,
    rejects: Sequence[Mapping[str, Any]] = (),
    totals: Totals | None = None,
) -> Commit:
    """Write the rows of one unit and return the record that the driver commits.

    Args:
        folder: The table's folder.
        unit: Number of the unit; it stands in the shard's metadata, so that swapped files are found.
        schema: Columns to write, in this order.
        columns: One sequence for each column, all of the same length.
        rejects: Rows that could not be used; each has at least a "reason".
        totals: Named counts and sums for the record.

    Raises:
        DiskFailed: The disk is full or failing; no file is left behind.
    """
    rows = len(columns["doc_id"])
    marked = schema.with_metadata({**(schema.metadata or {}), b"unit": str(unit).encode()})
    spans: list[tuple[int, int, int]] = []

    def write(stream: IO[bytes]) -> None:
        sink = _Marked(stream)
        with pa.ipc.new_file(pa.PythonFile(sink, mode="w"), marked) as writer:
            for batch in _batches(marked, columns, rows):
                before = sink.position
                writer.write_batch(batch)
                spans.append((before, sink.position - before, batch.num_rows))

    with disk_errors(folder):
        temporary = write_beside(folder, write)
        data = memoryview(temporary.read_bytes())
        sha256 = hashlib.sha256(data).hexdigest()
        name = f"{unit:05d}-{sha256[:12]}.arrow"
        rename(temporary, folder / name)
        sync_folder(folder)
    start = spans[0][0] if spans else len(data)
    end = spans[-1][0] + spans[-1][1] if spans else len(data)
    frame = xxhash.xxh3_64(data[:start])
    frame.update(data[end:])
    batches = tuple(
        RecordBatch(offset=o, length=n, rows=r, xxh3=xxh3_of(data[o : o + n])) for o, n, r in spans
    )  # fmt: skip
    return Commit(
        unit=unit,
        file=name,
        rows=rows,
        size=len(data),
        sha256=sha256,
        frame_xxh3=frame.hexdigest(),
        batches=batches,
        rejects=_write_rejects(folder / "rejects", unit, rejects),
        counts=totals.counts if totals else {},
        sums=totals.sums if totals else {},
        unusable=tuple(i for i, status in enumerate(columns.get("status", ())) if status != OK),
    )


def _write_rejects(folder: Path, unit: int, rejects: Sequence[Mapping[str, Any]]) -> Reject | None:
    if not rejects:
        return None
    content = "".join(json.dumps(dict(r), sort_keys=True, ensure_ascii=True) + "\n" for r in rejects).encode()
    sha256 = hashlib.sha256(content).hexdigest()
    name = f"{unit:05d}-{sha256[:12]}.jsonl"
    with disk_errors(folder):
        rename(write_beside(folder, lambda stream: _write_all(stream, content)), folder / name)
        sync_folder(folder)
    reasons: dict[str, int] = {}
    for reject in rejects:
        reasons[str(reject["reason"])] = reasons.get(str(reject["reason"]), 0) + 1
    return Reject(file=name, rows=len(rejects), sha256=sha256, reasons=dict(sorted(reasons.items())))


def _write_all(stream: IO[bytes], content: bytes) -> None:
    stream.write(content)

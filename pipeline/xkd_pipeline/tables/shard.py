"""Write one shard as one Arrow IPC file, named by its content, and describe it in a commit record.

This runs in workers: it writes into the table's folder and commits nothing. A file that no
record names is garbage, so a worker that dies or comes too late harms nobody.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import xxhash

from xkd_schemas.cache.manifest import Commit, RecordBatch, Reject
from xkd_schemas.durable_files import replace, xxh3_of
from xkd_schemas.ragged import batch_of
from xkd_schemas.tokens import OK

ROWS_PER_BATCH = 32
"""Rows of a record batch: the piece that is checked and mapped at once."""

Columns = Mapping[str, Sequence[Any]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Totals:
    """What a shard adds up to; the driver sums it over all shards."""

    counts: dict[str, int]
    sums: dict[str, float] = field(default_factory=dict)


def write_shard(
    folder: Path,
    unit: int,
    schema: pa.Schema,
    columns: Columns,
    *,
    rejects: Sequence[Mapping[str, Any]] = (),
    totals: Totals | None = None,
) -> Commit:
    """Write the rows of one shard and return the record that the driver commits.

    Its number stands in its metadata, so that swapped files are found.

    Raises:
        DiskFailed: The disk is full or failing; no file is left behind.
    """
    rows = len(columns["doc_id"])
    marked = schema.with_metadata({**(schema.metadata or {}), b"unit": str(unit).encode()})
    spans: list[tuple[int, int, int]] = []
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, marked) as writer:
        for first in range(0, rows, ROWS_PER_BATCH):
            batch = batch_of(marked, {n: columns[n][first : first + ROWS_PER_BATCH] for n in marked.names})
            before = sink.tell()
            writer.write_batch(batch)
            spans.append((before, sink.tell() - before, batch.num_rows))
    data = memoryview(sink.getvalue())
    sha256 = hashlib.sha256(data).hexdigest()
    name = f"{unit:05d}-{sha256[:12]}.arrow"
    replace(folder / name, sink.getvalue())
    start = spans[0][0] if spans else len(data)
    end = spans[-1][0] + spans[-1][1] if spans else len(data)
    frame = xxhash.xxh3_64(data[:start])
    frame.update(data[end:])
    batches = tuple(RecordBatch(offset=o, length=n, rows=r, xxh3=xxh3_of(data[o : o + n])) for o, n, r in spans)
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
    replace(folder / name, content)
    reasons = Counter(str(reject["reason"]) for reject in rejects)
    return Reject(file=name, rows=len(rejects), sha256=sha256, reasons=dict(sorted(reasons.items())))

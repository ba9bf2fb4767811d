"""How many bytes a table takes on disk, from what its rows hold and without making it.

An Arrow file is a frame (schema, footer), and for every record batch a header whose size depends on the schema only
and a body of buffers, each padded to PAD bytes. All of it can be counted beforehand; only what a codec compresses is
estimated, by trying it on made-up states.

Legend for this file
    T tokens    R kept rows    N predicted targets    K words or phrases of a document (see xkd_schemas.signals)
"""

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pyarrow as pa

from xkd_schemas.codecs import CODECS, bits_of
from xkd_schemas.errors import UsageError
from xkd_schemas.ragged import batch_of
from xkd_schemas.signals import Signal, teacher_schema
from xkd_schemas.tokens import Tokens, kept_rows, predictors

PAD: Final = 8
"""Buffers of a record batch end at multiples of it: the writer's default alignment."""
OFFSET_BYTES: Final = 8
"""Of a large list; it has one more offset than rows."""
BLOCK_BYTES: Final = 24
"""What the footer says about one record batch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Counts:
    """What the signals of one document are counted in; all 0 for a document that the teacher cannot read."""

    tokens: int
    kept: int
    targets: int
    spans: Mapping[str, int]
    """"word" and "phrase" -> K."""


def counts_of(tokens: Tokens, words: int, phrases: int) -> Counts:
    """The counts of a document with so many words and phrases."""
    spans = {"word": words, "phrase": phrases} if len(tokens.ids) else {"word": 0, "phrase": 0}
    return Counts(
        tokens=len(tokens.ids),
        kept=len(kept_rows(tokens.targets)) if len(tokens.ids) else 0,
        targets=len(predictors(tokens.targets)),
        spans=spans,
    )


def _pairs(number: int) -> int:
    return number * (number - 1) // 2


PER: Final[Mapping[str, Callable[[Counts, str | None], int]]] = {
    "T": lambda counts, _: counts.tokens,
    "R": lambda counts, _: counts.kept,
    "N": lambda counts, _: counts.targets,
    "K": lambda counts, unit: counts.spans[unit or "word"],
    "K(K-1)/2": lambda counts, unit: _pairs(counts.spans[unit or "word"]),
}
"""Every `Kind.per`, as a number of values of one document."""


def number_of(signal: Signal, counts: Counts) -> int:
    """How many values (or vectors) of a signal one document has.

    >>> document = Counts(tokens=9, kept=5, targets=4, spans={"word": 4, "phrase": 2})
    >>> number_of(Signal("span_geometry", 3, "word"), document)
    6

    Raises:
        UsageError: The signal is counted in something that this module does not know.
    """
    if signal.kind.per not in PER:
        raise UsageError(f"the plan does not know how to count {signal.column} (per {signal.kind.per})")
    return PER[signal.kind.per](counts, signal.unit)


def padded(size: int) -> int:
    """The size of a buffer in a file.

    >>> padded(9), padded(16), padded(0)
    (16, 16, 0)
    """
    return -(-size // PAD) * PAD


def width_of(kind: pa.DataType) -> int:
    """Bits of one value of a fixed size.

    >>> width_of(pa.list_(pa.uint16(), 4096))
    65536

    Raises:
        UsageError: It has no fixed size.
    """
    if pa.types.is_fixed_size_list(kind):
        return int(kind.list_size) * width_of(kind.value_type)
    try:
        return int(kind.bit_width)
    except ValueError:
        raise UsageError(f"the plan does not know the size of a column of {kind}") from None


def column_bytes(kind: pa.DataType, numbers: Sequence[int], rows_per_batch: int) -> int:
    """Bytes of a list column in a table, offsets and padding included, its numbers of values per row given.

    >>> column_bytes(pa.large_list(pa.float32()), [3, 0, 2], rows_per_batch=2)
    64

    Two batches: 3 offsets and 3 numbers (24 + 16 bytes), then 2 offsets and 2 numbers (16 + 8).
    """
    bits = width_of(kind.value_type)
    sizes = np.asarray(numbers, np.int64)
    total = 0
    for first in range(0, len(sizes), rows_per_batch):
        part = sizes[first : first + rows_per_batch]
        total += padded(OFFSET_BYTES * (len(part) + 1)) + padded(-(-int(part.sum()) * bits // 8))
    return total


def body_bytes(schema: pa.Schema, columns: Mapping[str, Sequence[Any]], rows_per_batch: int) -> int:
    """Bytes of the buffers of a table, without headers, from its columns as `write_shard` takes them."""
    rows = len(columns[schema.names[0]])
    total = 0
    for first in range(0, rows, rows_per_batch):
        batch = batch_of(schema, {name: columns[name][first : first + rows_per_batch] for name in schema.names})
        total += int(pa.ipc.read_message(batch.serialize()).body.size)
    return total


def header_bytes(schema: pa.Schema) -> int:
    """Bytes of the header of one record batch that has rows."""
    arrays = [pa.array([_least(field.type)], field.type) for field in schema]
    data = pa.RecordBatch.from_arrays(arrays, schema=schema).serialize()
    return int(data.size - pa.ipc.read_message(data).body.size)


def _least(kind: pa.DataType) -> Any:
    if pa.types.is_large_list(kind):
        return []
    return "" if pa.types.is_string(kind) or pa.types.is_large_string(kind) else 0


def frame_bytes(schema: pa.Schema) -> int:
    """Bytes of a shard without any record batch."""
    stream = io.BytesIO()
    with pa.ipc.new_file(stream, schema.with_metadata({**(schema.metadata or {}), b"unit": b"0"})):
        pass
    return len(stream.getvalue())


def overhead(schema: pa.Schema, shards: int, batches: int) -> int:
    """Bytes of a table that are not its columns: frames, headers and what the footers say of each batch."""
    return shards * frame_bytes(schema) + batches * (header_bytes(schema) + BLOCK_BYTES)


def written(signal: Signal, width: int, codec: str, vectors: int) -> tuple[dict[str, float], dict[bytes, bytes]]:
    """Values for each number of `number_of` in every column of a signal, and what its codec adds to the metadata.

    A codec is asked by encoding made-up states, of `vectors` vectors a document as the corpus has them: what it
    compresses depends on the numbers, and the exponents of states are spread about as those of a normal draw.
    """
    if not signal.kind.wide:
        return {signal.column: 1.0}, {}
    states = np.random.default_rng(0).standard_normal((max(1, vectors), width)).astype(np.float32)
    encoded = CODECS[codec].encode(signal.column, [bits_of(states)])
    shares = {name: len(rows[0]) / len(states) for name, rows in encoded.columns.items()}
    return shares, encoded.metadata


def signal_bytes(signal: Signal, width: int, codec: str, counts: Sequence[Counts], rows_per_batch: int) -> int:
    """Bytes of one signal's columns in the teacher table of these documents.

    Raises:
        UsageError: A column has a type that this module does not know.
    """
    numbers = [number_of(signal, one) for one in counts]
    schema = teacher_schema([signal], width, codec)
    shares, _ = written(signal, width, codec, sum(numbers) // max(1, sum(n > 0 for n in numbers)))
    return sum(
        column_bytes(schema.field(name).type, [round(share * n) for n in numbers], rows_per_batch)
        for name, share in shares.items()
    )

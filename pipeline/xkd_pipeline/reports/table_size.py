"""How many bytes a table takes on disk, from what its rows hold and without making it.

The columns of signals are counted: values of a document times bytes of a value. A codec is tried on made-up states.

Legend for this file
    T tokens    R kept rows    N predicted targets    K words or phrases of a document (see xkd_schemas.signals)
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pyarrow as pa

from xkd_pipeline.tables.shard import ROWS_PER_BATCH
from xkd_schemas.codecs import CODECS, bits_of
from xkd_schemas.ragged import batch_of
from xkd_schemas.signals import Signal
from xkd_schemas.tokens import Tokens, kept_rows, predictors

VALUE_BYTES: Final = {"bf16": 2, "float16": 2, "float32": 4, "int32": 4}
OFFSET_BYTES: Final = 8
"""A list column has one offset for each row."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Counts:
    """What the signals of one document are counted in; all 0 for a document that the teacher cannot read."""

    tokens: int
    kept: int
    targets: int
    spans: Mapping[str, int]
    """"word" and "phrase" -> K."""


def counts_of(tokens: Tokens, words: Iterable[Any], phrases: Iterable[Any]) -> Counts:
    """The counts of a document; intervals count up to where the teacher reads (see `spans_read`)."""
    end = tokens.num_chars if len(tokens.ids) else 0
    return Counts(
        tokens=len(tokens.ids), kept=len(kept_rows(tokens.targets)), targets=len(predictors(tokens.targets)),
        spans={"word": sum(start < end for start, _ in words), "phrase": sum(start < end for start, _ in phrases)},
    )  # fmt: skip


def number_of(signal: Signal, counts: Counts) -> int:
    """How many values (or vectors) of a signal one document has.

    >>> document = Counts(tokens=9, kept=5, targets=4, spans={"word": 4, "phrase": 2})
    >>> number_of(Signal("span_geometry", 3, "word"), document)
    6
    """
    spans = counts.spans[signal.unit or "word"]
    pairs = spans * (spans - 1) // 2
    numbers = {"T": counts.tokens, "R": counts.kept, "N": counts.targets, "K": spans, "K(K-1)/2": pairs}
    return numbers[signal.kind.per]


def signal_bytes(signal: Signal, width: int, codec: str, counts: Sequence[Counts]) -> int:
    """Bytes of one signal's columns in the teacher table of these documents."""
    numbers = [number_of(signal, one) for one in counts]
    total = sum(numbers)
    if signal.kind.wide:
        size = vector_bytes(codec, width, total // max(1, sum(n > 0 for n in numbers)))
    else:
        size = VALUE_BYTES[signal.kind.dtype] * (signal.top or 1)
    return round(size * total) + OFFSET_BYTES * len(counts)


def vector_bytes(codec: str, width: int, vectors: int) -> float:
    """Bytes of one vector, measured on made-up states of a document with `vectors` of them.

    What a codec compresses depends on the numbers; the exponents of states are spread about as those of a normal draw.
    """
    states = np.random.default_rng(0).standard_normal((max(1, vectors), width)).astype(np.float32)
    encoded = CODECS[codec].encode("states", [bits_of(states)])
    return float(sum(rows[0].nbytes for rows in encoded.columns.values()) / len(states))


def frame_bytes(schema: pa.Schema, shards: int, batches: int = 0) -> int:
    """Bytes of a table without rows: the schema at both ends of each shard, and the headers of record batches."""
    header = pa.RecordBatch.from_pylist([], schema).serialize().size
    return int(shards * 2 * schema.serialize().size + batches * header)


def batches_bytes(schema: pa.Schema, columns: Mapping[str, Sequence[Any]]) -> int:
    """Bytes of the record batches of a table, from its columns as `write_shard` takes them."""
    total = 0
    for first in range(0, len(columns[schema.names[0]]), ROWS_PER_BATCH):
        part = {name: columns[name][first : first + ROWS_PER_BATCH] for name in schema.names}
        total += int(batch_of(schema, part).serialize().size)
    return total

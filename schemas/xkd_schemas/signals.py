"""What can be kept of a teacher: the names of the signals, their columns, their shapes and their sizes.

Shape legend for this file
    T tokens    R kept rows (targets and the position before each run)    N predicted targets
    K words or phrases of the document    D teacher width    k classes kept of each prediction
A column is named like the signal: `hidden_last`, `centrality@22`, `span_geometry@15:word`, `topk_ids#64`. Layers are
Hugging Face indices: 0 is the embedding output, l the output of block l, the last one is final-normed.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from xkd_schemas.codecs import CODECS, PLAIN, bits_of
from xkd_schemas.errors import UsageError
from xkd_schemas.ragged import flat_list
from xkd_schemas.tokens import TOKEN_FIELDS, Tokens, kept_rows, predictors

TEACHERS_VERSION = 1  # bump on any change here, and add tests/golden/teachers_v<N>.txt

Int64s = npt.NDArray[np.int64]
Dtype = Literal["bf16", "float16", "float32", "int32"]
Unit = Literal["word", "phrase"]
VALUE_BYTES: Final = {"bf16": 2, "float16": 2, "float32": 4, "int32": 4}
OFFSET_BYTES: Final = 8  # a list column has one offset for each row
_PATTERN = re.compile(r"([a-z_]+)(?:@(\d+))?(?::(word|phrase))?(?:#([1-9]\d*))?")


@dataclass(frozen=True, slots=True)
class Kind:
    """How one kind of signal is stored."""

    dtype: Dtype
    per: Literal["T", "R", "N", "K", "K(K-1)/2"]  # what the first dimension of a row counts
    wide: bool  # True where each of those is a vector of D numbers
    layer: bool = False
    unit: bool = False
    top: bool = False  # True where each of those is k numbers, k being the signal's `top`
    drawn: bool = False  # True where those k are drawn, not the largest


KINDS: Final[dict[str, Kind]] = {
    "hidden_last": Kind("bf16", "R", wide=True),  # final-normed, so that the head applies directly
    "attention_last": Kind("float32", "T", wide=False),  # last token's row in the last block, heads summed, sum 1
    "hidden": Kind("bf16", "T", wide=True, layer=True),  # output of block L; not normed, but for the last one
    "attention": Kind("float32", "T", wide=False, layer=True),  # last token's row in block L, heads summed, sum 1
    "attention_text": Kind("float32", "T", wide=False, layer=True),  # the same of the last text token, in any block
    "centrality": Kind("float32", "T", wide=False, layer=True),  # MTA eq. 5-7
    "span_mass": Kind("float32", "K", wide=False, layer=True, unit=True),  # sum of centrality inside the span
    "span_vectors": Kind("bf16", "K", wide=True, layer=True, unit=True),  # MTA eq. 8
    "span_geometry": Kind("float16", "K(K-1)/2", wide=False, layer=True, unit=True),  # cosines, upper triangle
    "entropy": Kind("float32", "N", wide=False),  # nats, temperature 1
    "argmax": Kind("int32", "N", wide=False),
    "logsumexp": Kind("float32", "N", wide=False),
    "target_logprob": Kind("float32", "N", wide=False),  # of the token that is predicted, nats, temperature 1
    "topk_ids": Kind("int32", "N", wide=False, top=True),  # classes of the k largest logits, the largest first
    "topk_logits": Kind("float32", "N", wide=False, top=True),  # their logits; minus logsumexp: log-probabilities
    "sampled": Kind("int32", "N", wide=False, top=True, drawn=True),  # k drawn classes and their shares, codecs.py
}

GEOMETRY_SPANS: Final = 2048
"""Spans of one document whose cosines are kept; of a document with more so many are drawn."""


def draw_spans(count: int, most: int = GEOMETRY_SPANS) -> Int64s | None:
    """Which of `count` spans are compared with each other, ascending: drawn by a seed of their number; None for all.

    >>> draw_spans(3, 3), draw_spans(9, 3).tolist()
    (None, [2, 5, 8])
    """
    if count <= most:
        return None
    return np.sort(np.random.Generator(np.random.PCG64(count)).permutation(count)[:most])


def count_pairs(count: int) -> int:
    """Cosines that are kept of a document with `count` spans.

    >>> count_pairs(4)
    6
    """
    kept = min(count, GEOMETRY_SPANS)
    return kept * (kept - 1) // 2


@dataclass(frozen=True, slots=True, order=True)
class Signal:
    """One thing that is kept of the teacher, at one layer and for one kind of span where it has them."""

    name: str
    layer: int | None = None
    unit: str | None = None
    top: int | None = None  # k of the top-k and drawn signals; None where a loss takes the k of the cache

    @property
    def kind(self) -> Kind:
        """How it is stored."""
        return KINDS[self.name]

    @property
    def column(self) -> str:
        """Name of its column."""
        layer = "" if self.layer is None else f"@{self.layer}"
        unit = "" if self.unit is None else f":{self.unit}"
        return f"{self.name}{layer}{unit}" + ("" if self.top is None else f"#{self.top}")


def signal_named(column: str) -> Signal:
    """The signal of a column name; UsageError lists the known ones."""
    match = _PATTERN.fullmatch(column)
    kind = KINDS.get(match[1]) if match else None
    if match is None or kind is None or [match[n] is not None for n in (2, 3, 4)] != [kind.layer, kind.unit, kind.top]:
        known = ", ".join(
            name + ("@LAYER" if k.layer else "") + (":word|:phrase" if k.unit else "") + ("#K" if k.top else "")
            for name, k in KINDS.items()
        )
        raise UsageError(f"signal {column!r} is not known", fix=f"use one of: {known}")
    return Signal(match[1], int(match[2]) if match[2] else None, match[3], int(match[4]) if match[4] else None)


def teacher_schema(signals: Iterable[Signal], width: int, codec: str = PLAIN) -> pa.Schema:
    """Arrow schema of a teacher table: tokens, then the columns of each signal in sorted order.

    `codec` (see codecs.py) is that of the wide bfloat16 signals.
    """
    fields = list(TOKEN_FIELDS)
    for signal in sorted(set(signals), key=lambda s: s.column):
        if signal.kind.wide:
            columns, written = CODECS[codec].fields(signal.column, width), codec
        else:
            bits = signal.kind.dtype == "bf16"  # Arrow has no bfloat16: the bits, viewed back without a copy
            item = pa.uint16() if bits else pa.type_for_alias(signal.kind.dtype)
            if signal.top is not None:
                item = pa.list_(pa.field("item", item, nullable=False), signal.top)
            columns, written = [(signal.column, flat_list(item))], str(signal.kind.dtype)
        for name, kind in columns:
            about = {b"codec": written.encode(), b"per": signal.kind.per.encode()} if name == signal.column else None
            fields.append(pa.field(name, kind, nullable=False, metadata=about))
    return pa.schema(fields, metadata={b"xkd_table": b"teachers", b"xkd_schema": str(TEACHERS_VERSION).encode()})


def signals_schema(schema: pa.Schema) -> pa.Schema:
    """The schema of a table of signals beside a teacher's: doc_id and the columns of the signals, no tokens."""
    tokens = {field.name for field in TOKEN_FIELDS[1:]}
    kept = [field for field in schema if field.name not in tokens]
    return pa.schema(kept, metadata={**(schema.metadata or {}), b"xkd_table": b"signals"})


def count_values(tokens: Tokens, words: Iterable[Any], phrases: Iterable[Any]) -> Counter[str]:
    """How many values each kind of signal has of a document, by T, R, N, "word K", "phrase K(K-1)/2" and so on.

    Nothing of a document that the teacher cannot read; intervals count up to where it reads (see `spans_read`).
    """
    end = tokens.num_chars if len(tokens.ids) else 0
    found = Counter(T=len(tokens.ids), R=len(kept_rows(tokens.targets)), N=len(predictors(tokens.targets)))
    for unit, spans in (("word", words), ("phrase", phrases)):
        k = sum(start < end for start, _ in spans)
        found.update({f"{unit} K": k, f"{unit} K(K-1)/2": count_pairs(k)})
    return found


def signal_bytes(signal: Signal, width: int, codec: str, counts: Mapping[str, int], documents: int) -> int:
    """Bytes of one signal's columns in the teacher table of so many documents, which have `counts` together."""
    values = counts.get(f"{signal.unit} {signal.kind.per}" if signal.unit else signal.kind.per, 0)
    if signal.kind.wide:
        size = vector_bytes(codec, width, values // max(1, documents))
    else:
        size = VALUE_BYTES[signal.kind.dtype] * (signal.top or 1)
    return round(size * values) + OFFSET_BYTES * documents


def vector_bytes(codec: str, width: int, vectors: int) -> float:
    """Bytes of one vector, measured on made-up states of a document with `vectors` of them.

    What a codec compresses depends on the numbers; the exponents of states are spread about as those of a normal draw.
    """
    states = np.random.default_rng(0).standard_normal((max(1, vectors), width)).astype(np.float32)
    encoded = CODECS[codec].encode("states", [bits_of(states)])
    return float(sum(rows[0].nbytes for rows in encoded.columns.values()) / len(states))

"""A cache of last hidden states alone, of any size and number of shards, made without a model.

Every document has one prompt and one response; both models cut it at the same characters. What the states are does not
matter to a reader, so they are random bits.

Shape legend for this file
    T tokens of one document    R kept rows    D width
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from xkd_pipeline.parsing.stage import columns_of
from xkd_pipeline.tables.shard import write_shard
from xkd_pipeline.tables.writer import Store
from xkd_schemas.cache.manifest import Commit, Manifest, Unit
from xkd_schemas.documents import DOCUMENTS, DOCUMENTS_VERSION, Document, Spans, document_of
from xkd_schemas.signals import TEACHERS_VERSION, Signal, teacher_schema
from xkd_schemas.tokens import CONTENT, STUDENTS, STUDENTS_VERSION

HIDDEN: Final = Signal("hidden_last")
PROMPT: Final = 8
"""Tokens of every prompt."""
CHARACTERS: Final = 4
"""Of every token."""
NO_SPANS: Final = Spans(words=(), phrases=(), labels=())


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """What is made."""

    lengths: tuple[int, ...]
    """Tokens of each document's response."""
    width: int
    rows_per_shard: int


def states_cache(root: Path, sizes: Sizes) -> list[npt.NDArray[np.uint16]]:
    """Make the three tables; the states [R, D] of every document, as bits of bfloat16."""
    rng = np.random.default_rng(0)
    starts = range(0, len(sizes.lengths), sizes.rows_per_shard)
    units = tuple(
        Unit(source="made", first=at, rows=min(sizes.rows_per_shard, len(sizes.lengths) - at)) for at in starts
    )
    documents = [_document(number, length) for number, length in enumerate(sizes.lengths)]
    states = [rng.integers(0, 0x4000, (length + 1, sizes.width), np.uint16) for length in sizes.lengths]
    tokens = [_tokens(length) for length in sizes.lengths]
    common = {"doc_id": [d.doc_id for d in documents]} | {name: [t[name] for t in tokens] for name in tokens[0]}
    described = columns_of(documents, [NO_SPANS] * len(documents))
    first = write_table(root, "documents", {"schema": DOCUMENTS_VERSION}, DOCUMENTS, described, units)
    encoder = {"tokenizer": {}, "template": "none", "max_tokens": 4096}
    spec = {"schema": TEACHERS_VERSION, "documents": first.root, "signals": [HIDDEN.column], "encoder": encoder}
    spec |= {"weights": {}, "dtype": "bfloat16", "codec": "bf16"}
    schema = teacher_schema([HIDDEN], sizes.width)
    second = write_table(root, "teachers/made", spec, schema, common | {HIDDEN.column: states}, units)
    empty = [np.zeros((0, 2), np.int32)] * len(documents)
    ranges = [_ranges(length) for length in sizes.lengths]
    aligned = {"student_spans": ranges, "teacher_spans": ranges, "word_tokens": empty, "phrase_tokens": empty}
    spec = {
        "schema": STUDENTS_VERSION, "documents": first.root, "teacher": "made", "teacher_root": second.root,
        "encoder": encoder,
    }  # fmt: skip
    write_table(root, "students/made", spec, STUDENTS, common | aligned, units)
    return states


def _document(number: int, length: int) -> Document:
    prompt, response = (f"{number:08d} " + "abc " * (length + PROMPT) for _ in range(2))
    parts = [("prompt", prompt[: PROMPT * CHARACTERS], False), ("response", response[: length * CHARACTERS], True)]
    return document_of(parts, source="made", line=number + 1)


def _ranges(length: int) -> npt.NDArray[np.int32]:
    first = np.arange(PROMPT + length, dtype=np.int32)
    return np.stack([first, first + 1], axis=1)


def _tokens(length: int) -> dict[str, Any]:
    ranges_T2 = _ranges(length)
    return {
        "status": "ok",
        "num_chars": len(ranges_T2) * CHARACTERS,
        "token_ids": ranges_T2[:, 0] % 1000,
        "token_spans": ranges_T2 * CHARACTERS,
        "token_kinds": np.full(len(ranges_T2), CONTENT, np.uint8),
        "targets": np.arange(len(ranges_T2)) >= PROMPT,
    }


def write_table(
    root: Path,
    name: str,
    spec: dict[str, Any],
    schema: Any,
    columns: Mapping[str, Sequence[Any]],
    units: tuple[Unit, ...],
) -> Manifest:
    """Make one table of these units, each a shard of its rows."""
    store = Store(root, name, spec, units)
    commits: dict[int, Commit] = {}
    for number, unit in enumerate(units):
        part = {column: values[unit.first : unit.first + unit.rows] for column, values in columns.items()}
        commits[number] = write_shard(store.folder, number, schema, part)
        store.commit(commits[number])
    width = next((field.type.value_type.list_size for field in schema if field.name == HIDDEN.column), 1)
    constants = {"num_layers": 1, "hidden_size": width, "vocab_size": 1000, "logit_scale": 1.0, "softcap": None}
    constants |= {"tied": False, "hidden_std": 1.0, "embedding_std": 1.0}
    return store.seal(commits, constants, {})

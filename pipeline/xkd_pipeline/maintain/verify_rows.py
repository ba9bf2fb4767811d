"""What the bytes of a table mean: its schema, Arrow's full validation, and what must hold of every row.

Shape legend for this file
    T tokens    K spans, words or phrases    R kept rows    N predicted targets    D width
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from xkd_pipeline.tables.shard import documents_of, token_counts, tokens_of
from xkd_pipeline.workers.contract import first_line
from xkd_schemas.cache.table import Row, Shard, Table
from xkd_schemas.codecs import CODECS, find_class_fault
from xkd_schemas.documents import schema_of
from xkd_schemas.errors import BadData, InputMissing, Mismatch, XkdError
from xkd_schemas.signals import count_pairs
from xkd_schemas.tokens import CONTENT, END, OK, STUDENTS, TEMPLATE, kept_rows, predictors, spans_read

BF16_EXPONENT = 0x7F80
PER_TOKEN = ("attention_last", "attention", "attention_text", "centrality")
"""Signals that are weights of a document's tokens: none below 0, their sum 1."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One problem of a cache."""

    table: str  # "" for files of the cache itself
    unit: int | None  # number of the shard; None where it is not about one
    file: str  # relative to the cache
    reason: str

    @property
    def line(self) -> str:
        """For people."""
        unit = "" if self.unit is None else f" (shard {self.unit})"
        return f"{self.file}{unit}: {self.reason}"


def open_table(root: Path, name: str) -> Table:
    """The table, or BadData that says to verify first."""
    try:
        return Table(root, name)
    except (InputMissing, Mismatch) as error:
        raise BadData(error.what, fix=f"xkd-cache verify {root}") from error


def verify_rows(root: Path, name: str) -> Iterator[Finding]:
    """What is wrong with the rows of one table whose bytes are what they were when written."""
    table = open_table(root, name)
    for number in range(len(table.manifest.commits)):
        file = table.path(number).relative_to(root).as_posix()
        try:
            faults = list(find_faults(root, table, number))
        except XkdError as error:
            faults = [error.what]
        except Exception as error:  # a shard that Arrow reads may be made to raise anything
            faults = [f"cannot be read: {type(error).__name__}: {first_line(error)}"]
        for fault in faults:
            yield Finding(table=name, unit=number, file=file, reason=fault)


def find_faults(root: Path, table: Table, number: int) -> Iterator[str]:
    """What is wrong with the rows of one shard."""
    shard, commit = table.shard(number), table.manifest.commits[number]
    kind, _, name = table.name.partition("/")
    expected = {"documents": schema_of(table.manifest.spec), "students": STUDENTS}.get(kind)
    if expected is not None and not shard.schema.equals(expected):
        yield "its schema is not the one of this version"
        return
    for batch in range(len(commit.batches)):
        shard.batch(batch).validate(full=True)
    rows = [shard.row(i) for i in range(commit.rows)]
    teacher = name if kind == "teachers" else table.manifest.spec.get("teacher")
    documents = rows if kind == "documents" else _read_rows(root, "documents", number)
    teachers = _read_rows(root, f"teachers/{teacher}", number) if teacher else documents
    classes = int(open_table(root, f"teachers/{teacher}").manifest.constants["vocab_size"]) if teacher else 0
    for at, row in enumerate(rows):
        if fault := _check_row(table, row, teachers[at], documents[at], shard.schema, classes):
            yield f"row {at} ({row['doc_id']}): {fault}"
    if kind != "signals":
        yield from _check_counts(shard, [] if kind == "documents" else documents)


def _check_row(table: Table, row: Row, teacher: Row, document: Row, schema: pa.Schema, classes: int) -> str:
    """What is wrong with one row; `teacher` is itself in a teacher's table, `classes` the rows of the head."""
    kind = table.name.partition("/")[0]
    if kind == "documents":
        return _check_document(row)
    if row["doc_id"] != teacher["doc_id"]:
        return f"the teacher table has {teacher['doc_id']} here"
    if kind == "signals":
        return _check_signals(row, teacher, document, schema, classes)
    return _check_tokens(row, document, table) or (
        _check_signals(row, row, document, schema, classes)
        if kind == "teachers"
        else _check_alignment(row, teacher, document)
    )


def _read_rows(root: Path, name: str, number: int) -> list[Row]:
    table = open_table(root, name)
    return [table.shard(number).row(i) for i in range(table.manifest.commits[number].rows)]


def _check_ranges(name: str, ranges_K2: Any, end: int) -> str:
    """Half-open ranges inside [0, end), each start not before the last."""
    if len(ranges_K2) and (ranges_K2.min() < 0 or ranges_K2.max() > end or (ranges_K2[:, 0] > ranges_K2[:, 1]).any()):
        return f"{name} leave [0, {end}] or are reversed"
    return f"{name} are not in order" if (np.diff(ranges_K2[:, 0]) < 0).any() else ""


def _check_document(row: Row) -> str:
    text, segments_G2 = row["text"], row["segments"]
    if segments_G2[:, 0].tolist() != [0, *segments_G2[:-1, 1].tolist()] or segments_G2[-1, 1] != len(text):
        return "segments do not cover the text"
    if not len(segments_G2) == len(row["roles"]) == len(row["targets"]) or len(row["phrases"]) != len(row["labels"]):
        return "columns have different lengths"
    return next(filter(None, (_check_ranges(name, row[name], len(text)) for name in ("words", "phrases"))), "")


def _check_tokens(row: Row, document: Row, table: Table) -> str:
    if row["doc_id"] != document["doc_id"]:
        return f"the documents table has {document['doc_id']} here"
    ids_T, spans_T2, kinds_T = row["token_ids"], row["token_spans"], row["token_kinds"]
    if not len(ids_T) == len(spans_T2) == len(kinds_T) == len(row["targets"]):
        return "token columns have different lengths"
    if (row["status"] == OK) != bool(len(ids_T)):
        return f"status {row['status']} with {len(ids_T)} tokens"
    vocabulary = int(table.manifest.constants["vocab_size"])
    if len(ids_T) and not 0 <= ids_T.min() <= ids_T.max() < vocabulary:
        return f"a token id is not below {vocabulary}"
    if not np.isin(kinds_T, (TEMPLATE, CONTENT, END)).all() or (spans_T2[kinds_T == TEMPLATE] != -1).any():
        return "token kinds are wrong"
    if not 0 <= row["num_chars"] <= len(document["text"]):
        return "num_chars is not inside the text"
    return _check_ranges("token spans", spans_T2[kinds_T != TEMPLATE], row["num_chars"])


def _check_signals(row: Row, tokens: Row, document: Row, schema: pa.Schema, classes: int) -> str:
    targets_T = tokens["targets"]
    end = tokens["num_chars"] if len(targets_T) else 0
    read = {name: len(spans_read(document[name], end)) for name in ("words", "phrases")}
    lengths = {"T": len(targets_T), "R": len(kept_rows(targets_T)), "N": len(predictors(targets_T))}
    for field in schema:
        metadata = field.metadata or {}
        if b"per" not in metadata:
            continue
        values, per = row[field.name], metadata[b"per"].decode()
        spans = read["words" if field.name.endswith(":word") else "phrases"]
        wanted = (lengths | {"K": spans, "K(K-1)/2": count_pairs(spans)}).get(per)
        of_all = spans * (spans - 1) // 2  # earlier versions kept all cosines of any document
        if wanted is not None and len(values) not in ((wanted, of_all) if per == "K(K-1)/2" else (wanted,)):
            return f"{field.name} has {len(values)} entries for {wanted}"
        if fault := _check_values(field.name, values, metadata.get(b"codec", b"").decode()):
            return fault
        if field.name.startswith("sampled#") and (fault := find_class_fault(values, classes)):
            return f"{field.name}: {fault}"
    return ""


def _check_values(name: str, values: Any, codec: str) -> str:
    if codec in CODECS and ((values & BF16_EXPONENT) == BF16_EXPONENT).any():
        return f"{name} is not finite"
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        return f"{name} is not finite"
    kind = name.partition("@")[0]
    if kind in (*PER_TOKEN, "span_mass", "entropy") and len(values) and values.min() < -1e-4:
        return f"{name} is negative"
    if kind in PER_TOKEN and len(values) and abs(float(values.sum()) - 1) > 1e-2:
        return f"{name} adds up to {float(values.sum()):.4f}"
    if kind == "span_geometry" and len(values) and np.abs(values).max() > 1:
        return f"{name} has a cosine outside [-1, 1]"
    return ""


def _check_alignment(row: Row, teacher: Row, document: Row) -> str:
    if len(row["student_spans"]) != len(row["teacher_spans"]):
        return "student and teacher spans differ in number"
    ends = {"student_spans": len(row["token_ids"]), "teacher_spans": len(teacher["token_ids"])}
    for name, end in ends.items():
        if fault := _check_ranges(name, row[name], end):
            return fault
    for name, of in (("word_tokens", "words"), ("phrase_tokens", "phrases")):
        if row["status"] == OK and len(row[name]) != len(document[of]):
            return f"{name} has {len(row[name])} ranges for {len(document[of])}"
        if len(row[name]) and not 0 <= row[name].min() <= row[name].max() <= len(row["token_ids"]):
            return f"{name} leave the tokens"
    return ""


def _check_counts(shard: Shard, documents: Sequence[Row]) -> Iterator[str]:
    """The record's counts are those of the columns; `documents` are empty for those of the documents themselves."""
    commit = shard.commit
    if documents:
        tokens = tokens_of(shard)
        found = token_counts([document["text"] for document in documents], tokens)
        if commit.unusable != tuple(at for at, status in enumerate(tokens.statuses) if status != OK):
            yield "the record's unusable rows are not those of the column"
    else:
        rows = documents_of(shard)
        found = {"words": len(rows.words.values), "phrases": len(rows.phrases.values)}
        found["characters"] = sum(map(len, rows.block.texts))
    for name, number in found.items():
        if commit.counts.get(name, 0) != number:
            yield f"the record counts {commit.counts.get(name, 0)} {name}, the columns hold {number}"

"""One shard: written as an Arrow IPC file named by its content, and read at once as flat arrays.

Workers write: into the table's folder, and they commit nothing. A file that no record names is garbage, so a worker
that dies or comes too late harms nobody.

Shape legend for this file
    R documents    G segments    T tokens    K words or phrases
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from xkd_schemas.cache.manifest import Commit, RecordBatch, Reject
from xkd_schemas.cache.table import Row, Shard, Table
from xkd_schemas.config import StudentSection, TeacherSection
from xkd_schemas.documents import POLICY, Document, DocumentBatch, Segment
from xkd_schemas.durable_files import replace, xxh3_of
from xkd_schemas.ragged import Ragged, batch_of, lists_of
from xkd_schemas.text.encode import TRIED, Encoder
from xkd_schemas.text.templates import chosen_template
from xkd_schemas.tokens import OK, TokenBatch

ROWS_PER_BATCH = 32  # rows of a record batch: the piece that is checked and mapped at once

Columns = Mapping[str, Sequence[Any]]


def write_shard(
    folder: Path,
    unit: int,
    schema: pa.Schema,
    columns: Columns,
    *,
    rejects: Sequence[Mapping[str, Any]] = (),
    counts: Mapping[str, int] | None = None,
) -> Commit:
    """Write the rows of one shard and return the record that the driver commits.

    Its number stands in its metadata, so that swapped files are found. The driver adds up the counts of all shards.
    DiskFailed where the disk is full or failing; no file is left behind.
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
        unit=unit, file=name, rows=rows, size=len(data), sha256=sha256, frame_xxh3=frame.hexdigest(), batches=batches,
        rejects=_write_rejects(folder / "rejects", unit, rejects), counts=dict(counts or {}),
        unusable=tuple(i for i, status in enumerate(columns.get("status", ())) if status != OK),
    )  # fmt: skip


def _write_rejects(folder: Path, unit: int, rejects: Sequence[Mapping[str, Any]]) -> Reject | None:
    if not rejects:
        return None
    content = "".join(json.dumps(dict(r), sort_keys=True, ensure_ascii=True) + "\n" for r in rejects).encode()
    sha256 = hashlib.sha256(content).hexdigest()
    name = f"{unit:05d}-{sha256[:12]}.jsonl"
    replace(folder / name, content)
    reasons = Counter(str(reject["reason"]) for reject in rejects)
    return Reject(file=name, rows=len(rejects), sha256=sha256, reasons=dict(sorted(reasons.items())))


@dataclass(frozen=True, kw_only=True, slots=True)
class DocumentRows:
    """Documents as a shard of the documents table holds them."""

    doc_ids: Sequence[str]
    block: DocumentBatch
    words: Ragged  # [K, 2] int32 characters
    phrases: Ragged  # [K, 2] int32 characters

    @staticmethod
    def of(rows: Sequence[Row]) -> "DocumentRows":
        """Rows of the documents table side by side."""
        words, phrases = (Ragged.of([row[name] for row in rows], np.int32, 2) for name in ("words", "phrases"))
        block = DocumentBatch.of(map(document_at, rows))
        return DocumentRows(doc_ids=[row["doc_id"] for row in rows], block=block, words=words, phrases=phrases)

    def part(self, first: int, end: int) -> "DocumentRows":
        """The documents from `first` up to `end`."""
        return DocumentRows(
            doc_ids=self.doc_ids[first:end], block=self.block.take(range(first, end)), words=self.words[first:end],
            phrases=self.phrases[first:end],
        )  # fmt: skip


def documents_of(shard: Shard, killers: Iterable[int] = ()) -> DocumentRows:
    """All rows of a shard of the documents table, or BadData; `killers` are those that kill their process."""
    columns = _columns(shard, shard.schema.names)
    return DocumentRows(
        doc_ids=columns["doc_id"].to_pylist(),
        block=DocumentBatch(
            texts=columns["text"].to_pylist(),
            segments=lists_of(columns["segments"]),
            roles=columns["roles"].flatten().to_pylist(),
            targets_G=lists_of(columns["targets"]).values,
            places=list(zip(columns["source"].to_pylist(), columns["line"].to_pylist(), strict=True)),
            messages=columns["messages"].to_pylist() if "messages" in columns else [""] * shard.commit.rows,
            killers=frozenset(killers),
        ),
        words=lists_of(columns["words"]),
        phrases=lists_of(columns["phrases"]),
    )


def tokens_of(shard: Shard) -> TokenBatch:
    """All rows of a shard of a teacher or student table, their tokens alone; raises as `documents_of`."""
    columns = _columns(shard, ("status", "num_chars", "token_ids", "token_spans", "token_kinds", "targets"))
    ids = lists_of(columns["token_ids"])
    spans, kinds, targets = (lists_of(columns[name]).values for name in ("token_spans", "token_kinds", "targets"))
    return TokenBatch(
        statuses=columns["status"].to_pylist(), num_chars=columns["num_chars"].to_numpy(), first=ids.first,
        ids=ids.values, spans=spans, kinds=kinds, targets=targets, extended=np.zeros(len(ids), np.int32),
    )  # fmt: skip


def _columns(shard: Shard, names: Sequence[str]) -> dict[str, pa.Array]:
    """Columns of all rows, with the record batches joined."""
    batches = [shard.batch(number) for number in range(len(shard.commit.batches))]
    whole = pa.Table.from_batches(batches, shard.schema).select(names)
    return {name: whole.column(name).combine_chunks() for name in names}


def document_at(row: Row) -> Document:
    """The document of one row of the documents table."""
    parts = zip(row["segments"].tolist(), row["roles"], row["targets"].tolist(), strict=True)
    segments = tuple(Segment(role=role, start=start, end=end, target=target) for (start, end), role, target in parts)
    messages = row.get("messages", "")  # none in a table of version 1
    return Document(
        text=row["text"], segments=segments, source=row["source"], line=row["line"], messages=messages,
        policy=row.get(POLICY, ""),
    )  # fmt: skip


def encoder_for(tokenizer: str, section: TeacherSection | StudentSection, documents: Table | None = None) -> Encoder:
    """How the model with this tokenizer reads a document; loads it, and tries it on the first ones of a table."""
    from xkd_trainer.models.loading import load_tokenizer  # torch, which documents do without

    loaded = load_tokenizer(tokenizer)
    encoder = Encoder(
        tokenizer=loaded, template=chosen_template(section.template, loaded), max_tokens=section.max_tokens,
        enable_thinking=section.enable_thinking,
    )  # fmt: skip
    if documents:
        encoder.check([document_at(documents[n]) for n in range(min(len(documents), TRIED))])
    return encoder


def token_columns(tokens: TokenBatch) -> dict[str, Any]:
    """The columns that teacher and student tables share, without doc_id."""
    return {
        "status": tokens.statuses,
        "num_chars": tokens.num_chars,
        "token_ids": Ragged(tokens.ids, tokens.first),
        "token_spans": Ragged(tokens.spans, tokens.first),
        "token_kinds": Ragged(tokens.kinds, tokens.first),
        "targets": Ragged(tokens.targets, tokens.first),
    }


def extended_counts(tokens: TokenBatch) -> dict[str, int]:
    """Tokens with characters that a normaliser merged, swapped or deleted, and the documents these are in."""
    return {"extended": int(tokens.extended.sum()), "extended_documents": int((tokens.extended > 0).sum())}


def token_counts(texts: Sequence[str], tokens: TokenBatch) -> dict[str, int]:
    """Totals over one shard: tokens, targets, cut documents, documents by status, and extended intervals if any."""
    lengths = zip(tokens.statuses, tokens.num_chars.tolist(), texts, strict=True)
    counts = {
        "tokens": len(tokens.ids),
        "targets": int(tokens.targets.sum()),
        "cut": sum(status == OK and num_chars < len(text) for status, num_chars, text in lengths),
    }
    if tokens.extended.any():
        counts |= extended_counts(tokens)
    counts |= Counter(f"status:{status}" for status in tokens.statuses)
    return dict(sorted(counts.items()))

"""Columns and counts that the teacher and student tables share."""

import contextlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xkd_schemas.additions import plans_of
from xkd_schemas.documents import Document
from xkd_schemas.encode import Encoder, unusable
from xkd_schemas.errors import BadData, InputMissing
from xkd_schemas.manifest import Unit
from xkd_schemas.rows import WORKER_KILLED
from xkd_schemas.table import Table
from xkd_schemas.tokens import OK, Tokens


@dataclass(frozen=True, slots=True)
class Basis:
    """The state of the documents that a table is made from."""

    root: str
    units: tuple[Unit, ...]


def basis_of(table: Path, documents: Table, *, more: bool = False) -> Basis:
    """What the plan of a table that was begun names, or with `more` and for a new table all documents there are."""
    root = documents.manifest.root
    if not more:
        with contextlib.suppress(InputMissing, BadData):  # a new table, or one whose plan is reported elsewhere
            root = plans_of(table)[-1].spec["documents"]
    return documents_at(documents, root)


def documents_at(documents: Table, root: str) -> Basis:
    """The units of the documents in the state with that root; all of them where no state has it."""
    units, roots = plans_of(documents.folder)[-1].units, documents.manifest.roots
    known = root if root in roots else documents.manifest.root
    return Basis(root=known, units=units[: roots[known]])


def encoded_but(
    encoder: Encoder,
    documents: Sequence[Document],
    lost: Collection[int],
    limits: Sequence[int | None] | None = None,
) -> list[Tokens]:
    """`encoder.encode_batch`; the tokenizer does not see the rows of `lost`, whose status is worker_killed."""
    kept = [at for at in range(len(documents)) if at not in lost]
    found = encoder.encode_batch([documents[at] for at in kept], limits and [limits[at] for at in kept])
    tokens = dict(zip(kept, found, strict=True))
    return [
        tokens[at] if at in tokens else unusable(WORKER_KILLED, len(document.text))
        for at, document in enumerate(documents)
    ]


def token_columns(tokens: Sequence[Tokens]) -> dict[str, list[Any]]:
    """The columns that teacher and student tables share, without doc_id."""
    return {
        "status": [t.status for t in tokens],
        "num_chars": [t.num_chars for t in tokens],
        "token_ids": [t.ids for t in tokens],
        "token_spans": [t.spans for t in tokens],
        "token_kinds": [t.kinds for t in tokens],
        "targets": [t.targets for t in tokens],
    }


def token_counts(documents: Table, unit: int, tokens: Sequence[Tokens]) -> dict[str, int]:
    """Totals over one unit: tokens, targets, cut documents, and documents by status."""
    lengths = [len(documents.shard(unit).row(i)["text"]) for i in range(len(tokens))]
    counts = {
        "tokens": sum(len(t.ids) for t in tokens),
        "targets": sum(int(t.targets.sum()) for t in tokens),
        "cut": sum(t.status == OK and t.num_chars < n for t, n in zip(tokens, lengths, strict=True)),
    }
    for t in tokens:
        counts[f"status:{t.status}"] = counts.get(f"status:{t.status}", 0) + 1
    return dict(sorted(counts.items()))

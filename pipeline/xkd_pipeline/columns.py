"""Columns and counts that the teacher and student tables share."""

from collections.abc import Sequence
from typing import Any

from xkd_schemas.manifest import Plan, Unit, read_record
from xkd_schemas.table import Table
from xkd_schemas.tokens import OK, Tokens


def documents_units(documents: Table) -> tuple[Unit, ...]:
    """The units of a table that is made from the documents: the same shards."""
    return read_record(documents.folder / "plan.json", Plan).units


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

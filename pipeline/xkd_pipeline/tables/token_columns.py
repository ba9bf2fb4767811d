"""Columns and counts that the teacher and student tables share."""

from collections.abc import Sequence
from typing import Any

from xkd_schemas.cache.manifest import Plan, Unit, read_record
from xkd_schemas.cache.table import Table
from xkd_schemas.ragged import Ragged
from xkd_schemas.text.batches import TokenBatch
from xkd_schemas.tokens import OK


def units_like(documents: Table) -> tuple[Unit, ...]:
    """The units of a table whose rows are those of the documents."""
    return read_record(documents.folder / "plan.json", Plan).units


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
    """Totals over one unit: tokens, targets, cut documents, documents by status, and extended intervals if any."""
    lengths = zip(tokens.statuses, tokens.num_chars.tolist(), texts, strict=True)
    counts = {
        "tokens": len(tokens.ids),
        "targets": int(tokens.targets.sum()),
        "cut": sum(status == OK and num_chars < len(text) for status, num_chars, text in lengths),
    }
    if tokens.extended.any():
        counts |= extended_counts(tokens)
    for status in tokens.statuses:
        counts[f"status:{status}"] = counts.get(f"status:{status}", 0) + 1
    return dict(sorted(counts.items()))

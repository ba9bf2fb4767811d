"""Find one document in a cache and draw it."""

import shutil
from pathlib import Path

from xkd_pipeline.reports.render import bracket_phrases, escape_text, render
from xkd_pipeline.tables.shard import document_at, tokens_at
from xkd_schemas.cache.table import Table
from xkd_schemas.documents import Spans
from xkd_schemas.errors import InputMissing, UsageError


def find(documents: Table, doc: str) -> int:
    """Row number of a document, by number or by the beginning of its doc_id; refused where that is not one text."""
    if doc.isdecimal() and int(doc) < len(documents):
        return int(doc)
    found = [(i, row["doc_id"]) for i, row in enumerate(documents) if doc and row["doc_id"].startswith(doc)]
    if not found:
        raise InputMissing(
            f"no document {doc!r} among {len(documents)}", fix="give a row number from 0 on, or a doc_id"
        )
    if len({doc_id for _, doc_id in found}) > 1:
        raise UsageError(f"{len(found)} documents begin with {doc!r}", fix="give more digits of the doc_id")
    return found[0][0]


def draw(root: Path, doc: str, *, teacher: str, student: str, width: int) -> list[str]:
    """Lines of the drawing of a row number or doc_id; "" is no teacher or student, width 0 fits the terminal."""
    documents = Table(root, "documents")
    number = find(documents, doc)
    row = documents[number]
    document = document_at(row)
    words, phrases = (tuple((int(a), int(b)) for a, b in row[name]) for name in ("words", "phrases"))
    spans = Spans(words=words, phrases=phrases, labels=tuple(row["labels"]))
    columns = width or shutil.get_terminal_size().columns
    if not teacher:
        text = bracket_phrases(document.text, spans.phrases, spans.labels)
        return [f"{document.doc_id}  {document.source}:{document.line}", *map(escape_text, text.split("\n"))]
    taught = tokens_at(Table(root, f"teachers/{teacher}")[number])
    if not student:
        return render(document, spans, None, taught, None, columns).split("\n")
    learned = Table(root, f"students/{student}")[number]
    aligned = (learned["student_spans"], learned["teacher_spans"])
    return render(document, spans, tokens_at(learned), taught, aligned, columns).split("\n")

"""Held-out rows for evaluation: one file, read whole, with the same forms and rejects as a corpus."""

import hashlib
from pathlib import Path
from typing import Final

from xkd_schemas.documents import Document
from xkd_schemas.errors import BadData, InputMissing
from xkd_schemas.forms import AUTO, choose_form
from xkd_schemas.parts import SUFFIXES, count_file, file_rows
from xkd_schemas.rows import RawRow, parsed_row, read_documents, references_of

MAX_CHARS: Final = 1_000_000
"""A longer text counts as unusable."""


def held_out_documents(path: Path) -> tuple[list[Document], int, dict[int, list[str]]]:
    """Documents of a .jsonl(.gz, .zst), .parquet or .arrow file, and how many rows could not be used.

    Also, by their line, all the references of rows that have a list of them; the document has the first.

    Raises:
        InputMissing: The file is not there or cannot be read.
        UsageError: Its rows fit no form.
        BadData: It has no rows, or is broken.
    """
    if not path.is_file() or not path.name.endswith(SUFFIXES):
        raise InputMissing(f"held-out rows {path}: no such file of rows", next=f"name one of {' '.join(SUFFIXES)}")
    part = count_file(path, hashlib.sha256())
    contents = list(file_rows(part))[: part.num_rows]
    if not contents:
        raise BadData(f"{path} has no rows")
    sample = [row for row in map(parsed_row, contents) if row is not None]
    form, columns, _ = choose_form(str(path), AUTO, {}, sample)
    rows = [RawRow(line=number, content=content) for number, content in enumerate(contents, start=1)]
    documents, rejected = read_documents(path.name, form, columns, rows, max_chars=MAX_CHARS)
    references = {row.line: references_of(form, columns, parsed_row(row.content) or {}) for row in rows}
    return documents, len(rejected), {line: texts for line, texts in references.items() if texts}

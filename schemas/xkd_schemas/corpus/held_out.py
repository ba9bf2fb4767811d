"""Held-out rows for evaluation, read whole: any source, form and reject of a corpus."""

from collections.abc import Mapping
from pathlib import Path
from typing import Final

from xkd_schemas.corpus.formats import AUTO
from xkd_schemas.corpus.rows import RejectedRow, parsed_row, read_documents, references_of
from xkd_schemas.corpus.sources import open_source
from xkd_schemas.documents import Document
from xkd_schemas.errors import BadData

MAX_CHARS: Final = 1_000_000
"""A longer text counts as unusable."""


def held_out_documents(
    name: Path | str, form: str = AUTO, columns: Mapping[str, str] | None = None
) -> tuple[list[Document], list[RejectedRow], dict[int, list[str]]]:
    """Documents of a source, and the rows that could not be used; arguments and errors as `open_source`.

    Also, by their line, all the references of rows that have a list of them; the document has the first.

    Raises:
        BadData: It has no rows, or is broken.
    """
    source = open_source(str(name), form=form, columns=columns or {})
    rows = list(source.rows())
    if not rows:
        raise BadData(f"{name} has no rows", fix="check the path")
    documents, rejected = read_documents(
        Path(source.name).name, source.form, source.columns, rows, max_chars=MAX_CHARS
    )
    references = {r.line: references_of(source.form, source.columns, parsed_row(r.content) or {}) for r in rows}
    return documents, rejected, {line: texts for line, texts in references.items() if texts}

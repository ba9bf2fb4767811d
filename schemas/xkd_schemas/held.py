"""Held-out rows for evaluation, read whole: any source, form and reject of a corpus."""

from collections.abc import Mapping
from pathlib import Path
from typing import Final

from xkd_schemas.corpus import open_source
from xkd_schemas.documents import Document
from xkd_schemas.errors import BadData
from xkd_schemas.forms import AUTO
from xkd_schemas.rows import RejectedRow, read_documents

MAX_CHARS: Final = 1_000_000
"""A longer text counts as unusable."""


def held_out_documents(
    name: Path | str, form: str = AUTO, columns: Mapping[str, str] | None = None
) -> tuple[list[Document], list[RejectedRow]]:
    """Documents of a source, and the rows that could not be used; arguments and errors as `open_source`.

    Raises:
        BadData: It has no rows, or is broken.
    """
    source = open_source(str(name), form=form, columns=columns or {})
    rows = list(source.rows())
    if not rows:
        raise BadData(f"{name} has no rows", next="check the path")
    return read_documents(Path(source.name).name, source.form, source.columns, rows, max_chars=MAX_CHARS)

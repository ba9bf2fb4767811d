"""One file of a corpus: counted and fingerprinted once, then read from any row on.

A part remembers size and time of the file, so that a reader in another process notices a change
instead of pairing new rows with old numbers.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Final

from xkd_schemas.corpus.columnar import count_table_rows, table_rows
from xkd_schemas.corpus.line_reader import BOM, Line, LongLine, expand, read_chunks, split_lines
from xkd_schemas.errors import InputMissing, Mismatch, UsageError

MARK_EVERY: Final = 4096
"""Rows between two remembered places of a plain JSONL file."""
COMPRESSED: Final = (".gz", ".zst")
TABLES: Final = (".parquet", ".arrow")
SUFFIXES: Final = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".ndjson", ".json", ".json.gz", ".json.zst", *TABLES)
"""File endings that can be read."""
FOLDER_SUFFIXES: Final = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".ndjson", *TABLES)
"""Those that are taken from a folder, where a .json is something else more often than rows."""

Content = bytes | LongLine | dict[str, object]


@dataclass(frozen=True, kw_only=True, slots=True)
class CorpusFile:
    """One file of a source, or one data set."""

    path: str
    """File, or NAME@COMMIT:SUBSET:SPLIT of a data set on the hub."""
    kind: str
    """lines, table or hub."""
    num_rows: int
    state: tuple[int, int] = (0, 0)
    """Size in bytes and time of change in nanoseconds when it was counted; of a file only."""
    marks: tuple[int, ...] = ()
    """Byte offset of every MARK_EVERY-th row of a plain JSONL file."""
    num_boms: int = 0
    """1 where the file began with a byte order mark."""


def count_file(path: Path, digest: "hashlib._Hash") -> CorpusFile:
    """The part that a file is; its raw bytes go through `digest` on the way.

    Blank lines after the last row are no rows.

    Raises:
        InputMissing, BadData, Refused: as `read_chunks`, `expand` and `table_rows`.
        UsageError: a .json file that holds one list.
    """
    status = path.stat()
    state = (status.st_size, status.st_mtime_ns)
    chunks = read_chunks(path, digest=digest)
    if path.suffix in TABLES:
        for _ in chunks:
            pass
        return CorpusFile(path=str(path), kind="table", num_rows=count_table_rows(path), state=state)
    num_rows, num_boms, marks = 0, 0, []
    for number, (at, line) in enumerate(split_lines(expand(path, chunks))):
        if number == 0:
            num_boms, line = _without_bom(line)
            _refuse_list(path, line)
        if number % MARK_EVERY == 0:
            marks.append(at)
        if isinstance(line, LongLine) or line.strip():
            num_rows = number + 1
    kept = () if path.suffix in COMPRESSED else tuple(marks)
    return CorpusFile(path=str(path), kind="lines", num_rows=num_rows, state=state, marks=kept, num_boms=num_boms)


def file_rows(part: CorpusFile, *, first: int = 0, columns: Sequence[str] | None = None) -> Iterator[Content]:
    """Rows of a part of kind lines or table from row `first` on (0 is the first).

    There may be more than were counted: blank lines at the end of a file.

    Args:
        part: What `count_file` gave.
        first: Rows to leave out.
        columns: Of a table, the only columns to read; None: all.

    Raises:
        Mismatch: the file was changed after it was counted.
        InputMissing, BadData, Refused: as `count_file`.
    """
    _check_unchanged(part)
    path = Path(part.path)
    if part.kind == "table":
        yield from table_rows(path, first=first, columns=columns)
        return
    mark = first // MARK_EVERY if part.marks else 0
    chunks = read_chunks(path, first_byte=part.marks[mark] if part.marks else 0)
    for number, (_, line) in enumerate(split_lines(expand(path, chunks)), start=mark * MARK_EVERY):
        if number >= first:
            line = _without_bom(line)[1] if number == 0 else line
            yield line.removesuffix(b"\r") if isinstance(line, bytes) else line  # files written on Windows


def take_exactly(part: CorpusFile, rows: Iterator[Content], first: int) -> Iterator[Content]:
    """The `part.num_rows - first` rows that were counted, or Mismatch where there are fewer."""
    wanted = part.num_rows - first
    number = 0
    for number, content in enumerate(islice(rows, wanted), start=1):  # noqa: B007 # the count is used after the loop
        yield content
    if number != wanted:
        raise Mismatch(
            f"{part.path} had {part.num_rows} rows when it was counted and has {first + number} now",
            fix="run again when nothing writes to it",
        )


def _without_bom(line: Line) -> tuple[int, Line]:
    if isinstance(line, bytes) and line.startswith(BOM):
        return 1, line.removeprefix(BOM)
    return 0, line


def _refuse_list(path: Path, line: Line) -> None:
    """A .json file is one list more often than rows: say so at once, and how to cut it."""
    if ".json" in path.suffixes[-2:] and isinstance(line, bytes) and line.lstrip().startswith(b"["):
        raise UsageError(
            f"{path} begins with a list; rows are objects, one on each line",
            fix=f"jq -c '.[]' {path.name} > rows.jsonl",
        )


def _check_unchanged(part: CorpusFile) -> None:
    try:
        status = Path(part.path).stat()
    except OSError as error:
        raise InputMissing(f"{part.path}: {error.strerror}", fix="put the file back and run again") from error
    if (status.st_size, status.st_mtime_ns) != part.state:
        raise Mismatch(f"{part.path} was changed after it was counted", fix="run again when nothing writes to it")

"""A sealed cache, document by document, as a notebook wants it: `open_cache("cache/")[5].text`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np

from xkd_schemas.cache.table import Row, Table, check_cache, names_in, only_student, only_teacher
from xkd_schemas.codecs import numbers_of
from xkd_schemas.errors import UsageError


@dataclass(frozen=True, slots=True)
class ModelRow:
    """What a cache holds of one document for one model."""

    text: str
    row: Row

    def __getitem__(self, column: str) -> Any:
        """A column as it is stored, with bfloat16 as float32."""
        values = self.row[column]
        return numbers_of(values) if getattr(values, "dtype", None) == np.uint16 else values

    @property
    def tokens(self) -> list[str]:
        """The text of each token; "" for tokens of the template and for the end of a turn."""
        return _pieces(self.text, self.row["token_spans"])


@dataclass(frozen=True, slots=True)
class CacheRow:
    """One document of a cache."""

    document: Row
    teacher: ModelRow | None  # None where the cache has no teacher yet
    student: ModelRow | None  # None where the cache was aligned for no student yet

    @property
    def text(self) -> str:
        """The canonical text."""
        return str(self.document["text"])

    @property
    def words(self) -> list[str]:
        """The text of each word."""
        return _pieces(self.text, self.document["words"])

    @property
    def phrases(self) -> list[tuple[str, str]]:
        """Label (NP or VP) and text of each phrase."""
        return list(zip(self.document["labels"], _pieces(self.text, self.document["phrases"]), strict=True))


class OpenCache(Sequence[CacheRow]):
    """A cache for reading; see `open_cache`."""

    def __init__(self, documents: Table, teachers: Table | None, students: Table | None) -> None:
        self._documents = documents
        self._models = (teachers, students)

    def __len__(self) -> int:
        return len(self._documents)

    @overload
    def __getitem__(self, index: int) -> CacheRow: ...
    @overload
    def __getitem__(self, index: slice) -> list[CacheRow]: ...
    def __getitem__(self, index: int | slice) -> CacheRow | list[CacheRow]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        place = index + len(self) if index < 0 else index
        document = self._documents[place]
        text = str(document["text"])
        teacher, student = (None if table is None else ModelRow(text, table[place]) for table in self._models)
        return CacheRow(document, teacher, student)


def open_cache(path: str | Path, *, teacher: str = "", student: str = "") -> OpenCache:
    """Open a cache for reading; every byte is checked when it is first touched.

    Args:
        path: The cache folder.
        teacher: Name of a teacher's table; may be left out where there is one or none.
        student: Name of a student's table; may be left out where the teacher has one or none.

    Raises:
        InputMissing: There is no such cache or table.
        UsageError: Several tables could be meant, or the student was aligned with another teacher.
        BadData: A file does not match its digest.
    """
    root = Path(path)
    check_cache(root)
    documents = Table(root, "documents")
    taught = teacher or (only_teacher(root) if student or names_in(root, "teachers") else "")
    if not taught:
        return OpenCache(documents, None, None)
    name = student or only_student(root, taught)
    students = Table(root, f"students/{name}") if name else None
    if students is not None and students.manifest.spec["teacher"] != taught:
        raise UsageError(
            f"students/{name} was aligned with teacher {students.manifest.spec['teacher']}, not with {taught}",
            fix="name another student or teacher",
        )
    tables = [Table(root, f"signals/{further}") for further in names_in(root, "signals")]
    beside = [table for table in tables if table.manifest.spec["teacher"] == taught]
    return OpenCache(documents, Table(root, f"teachers/{taught}", beside), students)


def _pieces(text: str, spans_K2: Any) -> list[str]:
    return [text[start:end] for start, end in spans_K2.tolist()]

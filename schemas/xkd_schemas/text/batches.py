"""Documents and tokens of many documents in flat arrays: the form in which whole units are encoded and aligned.

numpy's cost per call is that of some hundred tokens, so what is asked of each document alone costs as much as the
tokenizer. Both batches are built from objects or from a table's columns, and give the objects back one by one.

Shape legend for this file
    R documents    G segments of all documents    T tokens of all documents
"""

import functools
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, overload

import numpy as np
import numpy.typing as npt

from xkd_schemas.documents import Document, Segment
from xkd_schemas.ragged import Ragged, row_offsets
from xkd_schemas.tokens import CONTENT, OK, Bools, Int32s, Int64s, Tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class DocumentBatch:
    """Documents side by side. Segments must be adjacent and cover their text."""

    texts: Sequence[str]
    segments: Ragged  # [G, 2] int32 characters of the document's own text
    roles: Sequence[str]  # [G] of each segment
    targets_G: Bools
    places: Sequence[tuple[str, int]]  # source and line of each document
    messages: Sequence[str]  # as `Document.messages`

    @staticmethod
    def of(documents: Iterable[Document]) -> "DocumentBatch":
        """The batch of these documents."""
        documents = list(documents)
        segments = [s for d in documents for s in d.segments]
        return DocumentBatch(
            texts=[d.text for d in documents],
            segments=Ragged.of(([(s.start, s.end) for s in d.segments] for d in documents), np.int32, 2),
            roles=[s.role for s in segments],
            targets_G=np.array([s.target for s in segments], np.bool_),
            places=[(d.source, d.line) for d in documents],
            messages=[d.messages for d in documents],
        )

    def __len__(self) -> int:
        return len(self.texts)

    def document(self, number: int) -> Document:
        """One document of the batch."""
        own = slice(self.segments.first[number], self.segments.first[number + 1])
        parts = zip(self.segments[number].tolist(), self.roles[own], self.targets_G[own].tolist(), strict=True)
        segments = tuple(Segment(role=role, start=at, end=end, target=target) for (at, end), role, target in parts)
        text, messages, (source, line) = self.texts[number], self.messages[number], self.places[number]
        return Document(text=text, segments=segments, source=source, line=line, messages=messages)

    def take(self, numbers: Sequence[int]) -> "DocumentBatch":
        """The batch of some of the documents."""
        return DocumentBatch.of(self.document(n) for n in numbers)


class Line(NamedTuple):
    """Content tokens of all documents on one line of characters, a character left free between two documents."""

    base_R: Int64s  # where each document begins on the line, and where the next one would: [R + 1]
    at_S: Int64s  # which tokens they are
    start_S: Int64s
    end_S: Int64s


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenBatch(Sequence[Tokens]):
    """Many documents as one model reads them; row r is `Tokens`, of views into the flat arrays."""

    statuses: Sequence[str]
    num_chars: Int32s  # [R]
    first: Int64s  # [R + 1]; document r has the tokens first[r] to first[r + 1]
    ids: Int32s  # [T]
    spans: Int32s  # [T, 2] characters of the document's own text
    kinds: npt.NDArray[np.uint8]  # [T]
    targets: Bools  # [T]
    extended: Int32s  # [R] as `Tokens.extended`

    @staticmethod
    def of(rows: Iterable[Tokens]) -> "TokenBatch":
        """The batch of these rows; a batch is returned as it is."""
        if isinstance(rows, TokenBatch):
            return rows
        rows = list(rows)
        return TokenBatch(
            statuses=[row.status for row in rows],
            num_chars=np.array([row.num_chars for row in rows], np.int32),
            first=row_offsets([len(row.ids) for row in rows]),
            ids=np.concatenate([np.zeros(0, np.int32), *(row.ids for row in rows)]),
            spans=np.concatenate([np.zeros((0, 2), np.int32), *(row.spans for row in rows)]),
            kinds=np.concatenate([np.zeros(0, np.uint8), *(row.kinds for row in rows)]),
            targets=np.concatenate([np.zeros(0, np.bool_), *(row.targets for row in rows)]),
            extended=np.array([row.extended for row in rows], np.int32),
        )

    def __len__(self) -> int:
        return len(self.statuses)

    @overload
    def __getitem__(self, index: int) -> Tokens: ...
    @overload
    def __getitem__(self, index: slice) -> list[Tokens]: ...
    def __getitem__(self, index: int | slice) -> Tokens | list[Tokens]:
        if isinstance(index, slice):
            return [self[n] for n in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        number = index % len(self)
        own = slice(self.first[number], self.first[number + 1])
        return Tokens(
            status=self.statuses[number], num_chars=int(self.num_chars[number]), ids=self.ids[own],
            spans=self.spans[own], kinds=self.kinds[own], targets=self.targets[own],
            extended=int(self.extended[number]),
        )  # fmt: skip

    @functools.cached_property
    def line(self) -> Line:
        """Where the content tokens stand, all documents in one order."""
        base_R = row_offsets(self.num_chars.astype(np.int64) + 1)
        at_S = np.flatnonzero(self.kinds == CONTENT)
        base_S = np.repeat(base_R[:-1], np.diff(np.searchsorted(at_S, self.first)))  # where its document begins
        return Line(base_R, at_S, *(self.spans[at_S] + base_S[:, None]).T)

    def with_statuses(self, statuses: Sequence[str]) -> "TokenBatch":
        """The batch with other statuses, in which documents that are not "ok" have no tokens."""
        counts, usable_R = np.diff(self.first), np.array([status == OK for status in statuses], np.bool_)
        keep_T = np.repeat(usable_R, counts)
        return TokenBatch(
            statuses=statuses, num_chars=self.num_chars, first=row_offsets(counts * usable_R), ids=self.ids[keep_T],
            spans=self.spans[keep_T], kinds=self.kinds[keep_T], targets=self.targets[keep_T],
            extended=self.extended * usable_R,
        )  # fmt: skip


def pieces_of(sizes: Sequence[int], most: int) -> list[tuple[int, int]]:
    """Consecutive stretches of rows, each of one row or of sizes that add up to at most `most`; none if no rows.

    >>> pieces_of([2, 2, 3, 9, 1], most=5)
    [(0, 2), (2, 3), (3, 4), (4, 5)]
    """
    cuts, total = [0], 0
    for row, size in enumerate(sizes):
        if total + size > most and row > cuts[-1]:
            cuts.append(row)
            total = 0
        total += size
    return list(itertools.pairwise([*cuts, len(sizes)])) if sizes else []

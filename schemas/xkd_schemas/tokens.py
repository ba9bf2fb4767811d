"""How one model's tokens of a document are written down: columns, token kinds, and which positions predict.

Shape legend for this file
    T tokens of one row, template included, or of all rows of a batch    N predicted targets
    R kept rows of a document, or documents of a batch    K aligned spans    W words    P phrases    S content tokens
Token ranges are half open indices into the row's own T tokens.
"""

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, overload

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from xkd_schemas.documents import INTERVALS
from xkd_schemas.ragged import flat_list, row_offsets

STUDENTS_VERSION = 1  # bump on any change to STUDENTS, and add tests/golden/students_v<N>.txt

TEMPLATE: Final = 0  # a token of the template or a start token: no interval, (-1, -1), and in no loss
CONTENT: Final = 1  # a token of the text; its interval leaves out the blanks glued to its front
END: Final = 2  # the end-of-turn token after a segment; its interval is empty and stands at the segment's end

OK: Final = "ok"  # `status` of a row that can be used; any other value is the reason why the row has no tokens
WORKER_KILLED: Final = "worker_killed"  # such a reason: a process that worked on the row died, every time

Int32s = npt.NDArray[np.int32]
Int64s = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

TOKEN_FIELDS: Final = (
    pa.field("doc_id", pa.string(), nullable=False),
    pa.field("status", pa.string(), nullable=False),  # "ok", or why the row has no tokens
    pa.field("num_chars", pa.int32(), nullable=False),  # the text is read up to here; less than its length if cut
    pa.field("token_ids", flat_list(pa.int32()), nullable=False),  # [T]
    pa.field("token_spans", INTERVALS, nullable=False),  # [T, 2] characters, (-1, -1) for template tokens
    pa.field("token_kinds", flat_list(pa.uint8()), nullable=False),  # [T] TEMPLATE, CONTENT or END
    pa.field("targets", flat_list(pa.bool_()), nullable=False),  # [T] True: a loss may ask for this token
)

STUDENTS = pa.schema(
    [
        *TOKEN_FIELDS,
        pa.field("student_spans", INTERVALS, nullable=False),  # [K, 2] ranges of this table's tokens
        pa.field("teacher_spans", INTERVALS, nullable=False),  # [K, 2] ranges of the teacher table's tokens
        pa.field("word_tokens", INTERVALS, nullable=False),  # [W, 2] ranges, start == end for a word without token
        pa.field("phrase_tokens", INTERVALS, nullable=False),  # [P, 2]
    ],
    metadata={b"xkd_table": b"students", b"xkd_schema": str(STUDENTS_VERSION).encode()},
)


class NotUsable(ValueError):
    """Why a document gets no tokens; `reason` becomes the `status` of its row."""

    def __init__(self, reason: str, what: str) -> None:
        super().__init__(what)
        self.reason = reason


@dataclass(frozen=True, kw_only=True, slots=True)
class Tokens:
    """One document as one model reads it. A row that cannot be used has `status` != "ok" and T = 0."""

    status: str
    num_chars: int  # characters of the text that were encoded
    ids: Int32s  # [T]
    spans: Int32s  # [T, 2] characters
    kinds: npt.NDArray[np.uint8]  # [T]
    targets: Bools  # [T]
    extended: int = 0  # tokens with characters that the normaliser merged, swapped or deleted; not stored


def tokens_at(row: Any) -> Tokens:
    """The tokens of one row of a teacher or student table, a `cache.table.Row`."""
    return Tokens(
        status=row["status"], num_chars=row["num_chars"], ids=row["token_ids"], spans=row["token_spans"],
        kinds=row["token_kinds"], targets=row["targets"],
    )  # fmt: skip


def spans_read(intervals_K2: Int32s, num_chars: int) -> Int32s:
    """The words or phrases that begin before `num_chars`: a prefix, since they are sorted by their start.

    Signals of spans are kept of these alone: of a long document that is cut, the spans behind the cut have no token,
    and cosines between all of them would fill a disk.

    >>> spans_read(np.array([[0, 3], [4, 9], [10, 12]]), 10).tolist()
    [[0, 3], [4, 9]]
    """
    return intervals_K2[: int(np.searchsorted(intervals_K2[:, 0], num_chars))]


def last_text(kinds_T: npt.NDArray[np.uint8]) -> int:
    """Place of the last token of the text, in front of the end token and the template; of a row without one, 0.

    >>> last_text(np.array([TEMPLATE, CONTENT, CONTENT, END, TEMPLATE], np.uint8))
    2
    """
    places = np.flatnonzero(kinds_T == CONTENT)
    return int(places[-1]) if len(places) else 0


def predictors(targets_T: Bools) -> npt.NDArray[np.int64]:
    """Positions whose state predicts a target: t - 1 for every target t > 0, [N], ascending.

    >>> predictors(np.array([False, False, True, True]))
    array([1, 2])
    """
    return np.flatnonzero(targets_T[1:])


def kept_rows(targets_T: Bools) -> npt.NDArray[np.int64]:
    """Positions whose last hidden state is stored: every target and the one before each run, [R], ascending.

    >>> kept_rows(np.array([False, False, True, True, False]))
    array([1, 2, 3])
    """
    return np.flatnonzero(kept_mask(targets_T))


def kept_mask(targets_T: Bools) -> Bools:
    """The same positions as a mask, [T]."""
    keep_T = targets_T.copy()
    keep_T[:-1] |= targets_T[1:]
    return keep_T


class Line(NamedTuple):
    """Content tokens of all documents on one line of characters, a character left free between two documents."""

    base_R: Int64s  # where each document begins on the line, and where the next one would: [R + 1]
    at_S: Int64s  # which tokens they are
    start_S: Int64s
    end_S: Int64s


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenBatch(Sequence[Tokens]):
    """Many documents as one model reads them, in flat arrays; row r is `Tokens`, of views into these."""

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

"""Alignment of many documents in one call: they are laid end to end on one line of characters.

numpy's cost per call is that of aligning a few hundred tokens, so a unit of short documents is joined, aligned as one
document, and cut apart again. The result is that of `alignment`, document by document; a test compares them.

Shape legend for this file
    T tokens of all documents    K spans or intervals of one document    G segments of one document
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from xkd_schemas.alignment import align, token_ranges
from xkd_schemas.tokens import CONTENT, END, OK, Int32s, Tokens

MOST_CHARS: Final = 2**30
"""Characters that one line may have, so that int32 holds them."""

Int64s = npt.NDArray[np.int64]
_NONE: Final = np.zeros((0, 2), np.int32)


@dataclass(frozen=True, slots=True)
class _Line:
    """Documents laid end to end."""

    tokens: Tokens
    first: Int64s
    """Where each document's tokens begin, and the end of the last: [documents + 1]."""


def _bases(num_chars: Sequence[int]) -> Int64s:
    """First character of each document on the line; one character is left free between two."""
    return np.concatenate([[0], np.cumsum(np.asarray(num_chars, np.int64) + 1)])


def _joined(rows: Sequence[Tokens], bases: Int64s) -> _Line:
    counts = [len(row.ids) for row in rows]
    kinds = np.concatenate([row.kinds for row in rows])
    spans = np.concatenate([row.spans for row in rows])
    on_text = (kinds == CONTENT) | (kinds == END)
    spans = np.where(on_text[:, None], spans + np.repeat(bases[: len(rows)], counts)[:, None], -1).astype(np.int32)
    joined = Tokens(
        status=OK, num_chars=int(bases[len(rows)]), ids=np.zeros(0, np.int32), spans=spans, kinds=kinds,
        targets=np.zeros(0, np.bool_),
    )  # fmt: skip
    return _Line(joined, np.concatenate([[0], np.cumsum(counts)]))


def _blocks(sizes: Sequence[int]) -> list[list[int]]:
    """Consecutive documents whose characters fit on one line."""
    blocks: list[list[int]] = [[]]
    total = 0
    for index, size in enumerate(sizes):
        if total + size + 1 > MOST_CHARS and blocks[-1]:
            blocks.append([])
            total = 0
        blocks[-1].append(index)
        total += size + 1
    return [block for block in blocks if block]


def align_all(
    students: Sequence[Tokens], teachers: Sequence[Tokens], segment_ends: Sequence[Int32s]
) -> list[tuple[Int32s, Int32s]]:
    """`alignment.align` of every document, in order.

    Args:
        students: One row per document.
        teachers: The other model's rows.
        segment_ends: [G] characters at which each document's segments end.
    """
    aligned: list[tuple[Int32s, Int32s]] = [(_NONE, _NONE)] * len(students)
    plain = []
    for index, (student, teacher) in enumerate(zip(students, teachers, strict=True)):
        if student.status == OK and teacher.status == OK:
            if student.num_chars == teacher.num_chars:
                plain.append(index)
            else:  # cut at two places: the shorter one limits both, which a shared line cannot say
                aligned[index] = align(student, teacher, segment_ends[index])
    for block in _blocks([students[i].num_chars for i in plain]):
        chosen = [plain[i] for i in block]
        bases = _bases([students[i].num_chars for i in chosen])
        ours, theirs = _joined([students[i] for i in chosen], bases), _joined([teachers[i] for i in chosen], bases)
        # a segment that goes on behind the cut ends at the cut, so that it stays on its own document's stretch
        ends = [
            np.minimum(segment_ends[i], students[i].num_chars) + base for i, base in zip(chosen, bases, strict=False)
        ]
        student_K2, teacher_K2 = align(ours.tokens, theirs.tokens, np.concatenate(ends).astype(np.int32))
        borders = np.searchsorted(student_K2[:, 0], ours.first)
        for place, index in enumerate(chosen):
            part = slice(borders[place], borders[place + 1])
            shifts = ours.first[place], theirs.first[place]
            aligned[index] = (_shifted(student_K2[part], shifts[0]), _shifted(teacher_K2[part], shifts[1]))
    return aligned


def token_ranges_all(rows: Sequence[Tokens], intervals: Sequence[Int32s]) -> list[Int32s]:
    """`alignment.token_ranges` of every document, in order.

    Args:
        rows: One per document; a row without tokens gives empty ranges.
        intervals: Character intervals [K, 2] of each document.
    """
    found: list[Int32s] = []
    sizes = [max(row.num_chars, int(np.max(spans, initial=0))) for row, spans in zip(rows, intervals, strict=True)]
    for block in _blocks(sizes):
        bases = _bases([sizes[i] for i in block])
        line = _joined([rows[i] for i in block], bases)
        counts = [len(intervals[i]) for i in block]
        shifted = np.concatenate([intervals[i] for i in block]) + np.repeat(bases[:-1], counts)[:, None]
        ranges_K2 = token_ranges(line.tokens, shifted.astype(np.int32)).astype(np.int64)
        ranges_K2 = np.clip(
            ranges_K2 - np.repeat(line.first[:-1], counts)[:, None], 0, np.repeat(np.diff(line.first), counts)[:, None]
        )
        found += [part.astype(np.int32) for part in np.split(ranges_K2, np.cumsum(counts)[:-1])]
    return found


def _shifted(ranges_K2: Int32s, by: int) -> Int32s:
    return (ranges_K2 - by).astype(np.int32)

"""Alignment of many documents in one call, on the flat arrays of their blocks.

numpy's cost per call is that of aligning a few hundred tokens, so a unit of short documents is aligned at once. The
result is that of `alignment`, document by document; a test compares them.

Shape legend for this file
    R documents    S, T student and teacher tokens of all documents    G segments    K spans or intervals
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from xkd_schemas.ragged import Ragged
from xkd_schemas.text.alignment import grouped_spans, in_rows
from xkd_schemas.text.batches import Line, TokenBatch
from xkd_schemas.tokens import END, Int32s, Tokens

Int64s = npt.NDArray[np.int64]


def align_all(
    students: Sequence[Tokens], teachers: Sequence[Tokens], segment_ends: Sequence[Int32s]
) -> tuple[Ragged, Ragged]:
    """`alignment.align` of every document: student and teacher token ranges, both [R rows of [K, 2]] int32.

    Args:
        students: One row per document, or their TokenBlock.
        teachers: The other model's rows.
        segment_ends: [G] characters at which each document's segments end, or their Lists.
    """
    ours, theirs = TokenBatch.of(students), TokenBatch.of(teachers)
    ends = Ragged.of(segment_ends, np.int32)
    limit_R = np.minimum(ours.num_chars, theirs.num_chars)
    student_at_S, student_first = content_of(ours, ends)
    teacher_at_T, teacher_first = content_of(theirs, ends)
    spans_K4 = grouped_spans(
        ours.spans[student_at_S], student_first, theirs.spans[teacher_at_T], teacher_first,
        np.repeat(limit_R, ends.counts),
    )  # fmt: skip
    aligned_K4 = in_rows(spans_K4, _end_pairs(ours, theirs, limit_R), student_at_S, teacher_at_T)
    first = np.searchsorted(aligned_K4[:, 0], ours.first)
    return tuple(
        Ragged((part_K2 - np.repeat(block.first[:-1], np.diff(first))[:, None]).astype(np.int32), first)
        for part_K2, block in ((aligned_K4[:, :2], ours), (aligned_K4[:, 2:], theirs))
    )  # type: ignore[return-value]


def token_ranges_all(rows: Sequence[Tokens], intervals: Sequence[Int32s]) -> Ragged:
    """`alignment.token_ranges` of every document, in order: [R rows of [K, 2]] int32.

    Args:
        rows: One per document, or their TokenBlock; a row without tokens gives empty ranges.
        intervals: Character intervals [K, 2] of each document, or their Lists.
    """
    block, wanted = TokenBatch.of(rows), Ragged.of(intervals, np.int32, 2)
    line = block.line
    solid_S = line.end_S > line.start_S
    whole = bool(solid_S.all())
    at_S, start_S, end_S = (part if whole else part[solid_S] for part in line[1:])
    document_K = _documents(wanted.first)
    values_K2 = wanted.values[wanted.first[0] : wanted.first[-1]]
    first_K = np.searchsorted(start_S, _on_line(line, document_K, values_K2[:, 0]), side="left")
    behind_K = np.searchsorted(end_S, _on_line(line, document_K, values_K2[:, 1]), side="right")
    low_K, high_K = block.first[document_K], block.first[document_K + 1]
    token_first_K = np.clip(np.append(at_S, len(block.kinds))[first_K], low_K, high_K)
    token_end_K = np.clip(np.append(0, at_S + 1)[behind_K], token_first_K, high_K)
    ranges_K2 = np.stack([token_first_K - low_K, token_end_K - low_K], axis=1).astype(np.int32)
    return Ragged(ranges_K2, wanted.first - wanted.first[0])


def _documents(first: Int64s) -> Int64s:
    """The row of each value."""
    return np.repeat(np.arange(len(first) - 1), np.diff(first))


def _on_line(line: Line, documents: Int64s, characters: Int32s) -> Int32s | Int64s:
    """Characters of documents as places on the line; those behind a document's cut stand between it and the next."""
    places: Int32s | Int64s = np.minimum(line.base_R[documents] + characters, line.base_R[documents + 1])
    return places


def content_of(block: TokenBatch, ends: Ragged) -> tuple[Int64s, Int64s]:
    """Indices [S] of the content tokens, and where each segment's begin among them [G + 1].

    A token belongs to the segment it starts in; an empty interval at a border to the segment behind the border.
    """
    borders_G = _on_line(block.line, _documents(ends.first), ends.values[ends.first[0] : ends.first[-1]])
    last_R = np.flatnonzero(ends.counts)
    borders_G[ends.first[last_R + 1] - ends.first[0] - 1] = block.line.base_R[last_R + 1]
    return block.line.at_S, np.append(0, np.searchsorted(block.line.start_S, borders_G, side="left"))


def _places(documents: Int64s, characters: Int32s) -> Int64s:
    """A document's number and a character of its text in one number."""
    return (documents << 32) + characters


def _end_pairs(ours: TokenBatch, theirs: TokenBatch, limit_R: Int32s) -> Int64s:
    """Indices [E, 2] of the end tokens that both models have at the same character."""
    (our_E, ours_E), (their_E, theirs_E) = (_last_ends(block) for block in (ours, theirs))
    at_E = np.minimum(np.searchsorted(theirs_E, ours_E), max(0, len(theirs_E) - 1))
    if not len(theirs_E):
        return np.zeros((0, 2), np.int64)
    kept_E = (theirs_E[at_E] == ours_E) & ((ours_E & 0xFFFFFFFF) <= limit_R[ours_E >> 32])
    return np.stack([our_E[kept_E], their_E[at_E[kept_E]]], axis=1)


def _last_ends(block: TokenBatch) -> tuple[Int64s, Int64s]:
    """Indices of the end tokens and their places, ascending; of several at one place the last."""
    at_E = np.flatnonzero(block.kinds == END)
    places_E = _places(_documents(block.first)[at_E], block.spans[at_E, 1])
    last_E = np.append(places_E[1:] != places_E[:-1], True)[: len(places_E)]
    return at_E[last_E], places_E[last_E]

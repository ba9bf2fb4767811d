"""Which tokens of two models end at the same character, and which tokens lie in a word or phrase.

The character is the only shared coordinate: no token string is ever compared. The pieces between shared token ends
are the spans of SRA (arXiv 2605.01205; a merge of two sorted sequences, where the paper says "longest common
subsequence" of the offsets) and the chunks of ALM (arXiv 2503.20083); the pieces with one token on each side are the
exact token alignments of DSKDv2-ETA (arXiv 2504.11426). All documents of a batch are aligned in one call.

Shape legend for this file
    R documents    S, T student and teacher tokens    G segments or other groups of tokens
    B boundaries    K aligned spans, words or phrases    E pairs of end tokens
"""

from collections.abc import Sequence
from typing import Final

import numpy as np

from xkd_schemas.ragged import Ragged
from xkd_schemas.tokens import END, Int32s, Int64s, Line, TokenBatch, Tokens

_FAR: Final = np.iinfo(np.int32).max


def common_boundaries(student_spans: Int32s, teacher_spans: Int32s) -> Int32s:
    """Pairs of token counts [K, 2] int32: the first i student and the first j teacher tokens end at one character.

    A count is a boundary at character c only if all its tokens end at or before c, one of them at c, and every later
    token starts at or after c; so there is none inside a character whose pieces share an interval. Both columns
    strictly increase. Where several counts end at one c (tokens with empty intervals) the first is paired with the
    first, the second with the second.

    Args:
        student_spans: Character intervals [S, 2] int32.
        teacher_spans: Character intervals [T, 2] int32.

    Example: "unhappy" cut as un|happy and as u|n|hap|py

        >>> common_boundaries(np.array([[0, 2], [2, 7]]), np.array([[0, 1], [1, 2], [2, 5], [5, 7]])).tolist()
        [[1, 2], [2, 4]]
    """
    student_first, teacher_first = np.array([0, len(student_spans)]), np.array([0, len(teacher_spans)])
    return grouped_spans(student_spans, student_first, teacher_spans, teacher_first)[:, 1::2]


def grouped_spans(
    student_spans: Int32s,
    student_first: Int64s,
    teacher_spans: Int32s,
    teacher_first: Int64s,
    limits: Int32s | Int64s | int = _FAR,
) -> Int32s:
    """Aligned spans of many groups of tokens (documents, segments) in one call, [K, 4] int32.

    A row is [student first, student end, teacher first, teacher end], half-open indices into the given tokens. The
    spans of a group follow each other without a hole from the group's first token; what is left over after its last
    common boundary is in no span.

    Args:
        student_spans: Character intervals [S, 2] int32, none negative, group after group.
        student_first: [G + 1] int64; group g holds tokens student_first[g] to student_first[g + 1].
        teacher_spans: Character intervals [T, 2] int32.
        teacher_first: [G + 1] int64.
        limits: [G] or one for all; boundaries of the group behind this character do not count.
    """
    sides = [(student_spans, student_first), (teacher_spans, teacher_first)]
    width = 1 + max((int(spans.max()) for spans, _ in sides if len(spans)), default=0)
    (ours_B2, our_ends), (theirs_B2, their_ends) = (_boundaries(*side, limits, width) for side in sides)
    ranks = 1 + max((int(keys_B2[:, 1].max()) for keys_B2 in (ours_B2, theirs_B2) if len(keys_B2)), default=0)
    our_keys, their_keys = (keys_B2[:, 0] * ranks + keys_B2[:, 1] for keys_B2 in (ours_B2, theirs_B2))
    keys_K, at, other = np.intersect1d(our_keys, their_keys, assume_unique=True, return_indices=True)
    group_K = keys_K // (width * ranks)
    begins_K = np.diff(group_K, prepend=-1) > 0  # the first span of its group
    spans_K4 = np.empty((len(keys_K), 4), np.int32)
    for column, ends_K, first in ((0, our_ends[at], student_first), (2, their_ends[other], teacher_first)):
        spans_K4[:, column + 1] = ends_K
        spans_K4[1:, column] = ends_K[:-1]  # a span begins where the one before it ends
        spans_K4[begins_K, column] = np.asarray(first)[group_K[begins_K]]
    return spans_K4


def _boundaries(spans_S2: Int32s, first: Int64s, limits: Int32s | Int64s | int, width: int) -> tuple[Int64s, Int64s]:
    """Boundaries of all groups: [B, 2] place and rank among the boundaries at that place, and [B] index behind each.

    A place is the group's number times `width`, which is more than any character, plus the character.
    """
    counts_G = np.diff(first)
    group_S = np.repeat(np.arange(len(counts_G)), counts_G)
    places_S2 = np.asarray(spans_S2, np.int64).reshape(-1, 2) + (group_S * width)[:, None]
    end_S = np.maximum.accumulate(places_S2[:, 1])  # how far this and all earlier tokens reach
    next_S = np.append(np.minimum.accumulate(places_S2[::-1, 0])[::-1], np.iinfo(np.int64).max)[1:]  # later starts
    limit_S = group_S * width + np.broadcast_to(limits, len(counts_G))[group_S]
    at_B = np.flatnonzero((end_S <= next_S) & (end_S <= limit_S))
    place_B = end_S[at_B]
    rank_B = np.arange(len(at_B)) - np.searchsorted(place_B, place_B, side="left")
    return np.stack([place_B, rank_B], axis=1), at_B + 1


def align(
    students: Sequence[Tokens], teachers: Sequence[Tokens], segment_ends: Sequence[Int32s]
) -> tuple[Ragged, Ragged]:
    """Aligned spans of documents as two models read them: student and teacher token ranges, [R rows of [K, 2]] int32.

    Ranges count all tokens of the row, template tokens included, and hold content tokens of one segment, or are the
    one end token each model has after that segment. Rows are sorted, ranges disjoint. Spans cover every segment; the
    `targets` of the two rows say which are in a target. No span reaches behind the cut of either model.

    Args:
        students: One row per document, or their TokenBatch; a row that is not usable has no token and gives K = 0.
        teachers: The other model's rows.
        segment_ends: [G] characters at which each document's segments end, ascending, or their Ragged.
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
    size, pairs_E2 = len(spans_K4), _end_pairs(ours, theirs, limit_R)
    aligned_K4 = np.empty((size + len(pairs_E2), 4), np.int64)  # ranges of all tokens of the batch
    for column, at in ((0, student_at_S), (2, teacher_at_T)):
        aligned_K4[:size, column] = at[spans_K4[:, column]]
        aligned_K4[:size, column + 1] = at[spans_K4[:, column + 1] - 1] + 1
    aligned_K4[size:, 0::2], aligned_K4[size:, 1::2] = pairs_E2, pairs_E2 + 1
    aligned_K4 = aligned_K4[np.argsort(aligned_K4[:, 0], kind="stable")]  # end tokens behind their segments
    first = np.searchsorted(aligned_K4[:, 0], ours.first)
    student_K2, teacher_K2 = (
        (part_K2 - np.repeat(batch.first[:-1], np.diff(first))[:, None]).astype(np.int32)  # of the document's tokens
        for part_K2, batch in ((aligned_K4[:, :2], ours), (aligned_K4[:, 2:], theirs))
    )
    return Ragged(student_K2, first), Ragged(teacher_K2, first)


def token_ranges(rows: Sequence[Tokens], intervals: Sequence[Int32s]) -> Ragged:
    """For every word or phrase of each document the range of tokens that lie wholly inside: [R rows of [K, 2]] int32.

    A content token lies inside when it starts at or after the interval's start and ends at or before its end; its
    blanks in front do not count, as they are not in its interval (MTA's code, arXiv 2605.01374, allows one leading
    blank to the same end). Tokens with an empty interval lie in nothing. [a, a) where no token does.

    Args:
        rows: One per document, or their TokenBatch. Starts and ends of content tokens never decrease in a row.
        intervals: Character intervals [K, 2] of each document in any order, or their Ragged; none may cross a border
            of segments.
    """
    batch, wanted = TokenBatch.of(rows), Ragged.of(intervals, np.int32, 2)
    line = batch.line
    solid_S = line.end_S > line.start_S
    at_S, start_S, end_S = (part if solid_S.all() else part[solid_S] for part in line[1:])
    document_K = _documents(wanted.first)
    values_K2 = wanted.values[wanted.first[0] : wanted.first[-1]]
    first_K = np.searchsorted(start_S, _on_line(line, document_K, values_K2[:, 0]), side="left")  # of content tokens
    behind_K = np.searchsorted(end_S, _on_line(line, document_K, values_K2[:, 1]), side="right")
    low_K, high_K = batch.first[document_K], batch.first[document_K + 1]
    token_first_K = np.clip(np.append(at_S, len(batch.kinds))[first_K], low_K, high_K)  # of all tokens of the batch
    token_end_K = np.clip(np.append(0, at_S + 1)[behind_K], token_first_K, high_K)
    ranges_K2 = np.stack([token_first_K - low_K, token_end_K - low_K], axis=1).astype(np.int32)  # of the document's
    return Ragged(ranges_K2, wanted.first - wanted.first[0])


def _documents(first: Int64s) -> Int64s:
    return np.repeat(np.arange(len(first) - 1), np.diff(first))


def _on_line(line: Line, documents: Int64s, characters: Int32s) -> Int64s:
    """Characters of documents as places on the line; those behind a document's cut stand between it and the next."""
    places: Int64s = np.minimum(line.base_R[documents] + characters, line.base_R[documents + 1])
    return places


def content_of(batch: TokenBatch, ends: Ragged) -> tuple[Int64s, Int64s]:
    """Indices [S] of the content tokens, and where each segment's begin among them [G + 1].

    A token belongs to the segment it starts in; an empty interval at a border to the segment behind the border.
    """
    borders_G = _on_line(batch.line, _documents(ends.first), ends.values[ends.first[0] : ends.first[-1]])
    last_R = np.flatnonzero(ends.counts)
    borders_G[ends.first[last_R + 1] - ends.first[0] - 1] = batch.line.base_R[last_R + 1]  # whatever is left of a row
    return batch.line.at_S, np.append(0, np.searchsorted(batch.line.start_S, borders_G, side="left"))


def _end_pairs(ours: TokenBatch, theirs: TokenBatch, limit_R: Int32s) -> Int64s:
    """Indices [E, 2] of the end tokens that both models have at the same character; of several at one the last."""
    (our_E, ours_E), (their_E, theirs_E) = (_ends(batch) for batch in (ours, theirs))
    places_E, at, other = np.intersect1d(ours_E, theirs_E, return_indices=True)
    kept_E = (places_E & _FAR) <= limit_R[places_E >> 32]
    pairs_E2: Int64s = np.stack([our_E[at], their_E[other]], axis=1)[kept_E]
    return pairs_E2


def _ends(batch: TokenBatch) -> tuple[Int64s, Int64s]:
    """Indices of the end tokens, last first, and the document and character of each as one number."""
    at_E = np.flatnonzero(batch.kinds == END)[::-1]
    return at_E, (_documents(batch.first)[at_E] << 32) + batch.spans[at_E, 1]

"""Which tokens of two models end at the same character, and which tokens lie in a word or phrase.

The character is the only shared coordinate: no token string is ever compared. Nothing here knows models, Arrow or
Ray. The pieces between shared token ends are the spans of SRA (arXiv 2605.01205; a merge of two sorted sequences,
where the paper says "longest common subsequence" of the offsets) and the chunks of ALM (arXiv 2503.20083); the
pieces with one token on each side are the exact token alignments of DSKDv2-ETA (arXiv 2504.11426).

Shape legend for this file
    S student tokens    T teacher tokens    G segments    K aligned spans, words or phrases    E exact pairs
All intervals are half open. Character intervals may overlap and repeat: pieces of one emoji share its interval.

Numba, if installed, is loaded and compiles the merge at the first call (about 0.8 s); nothing is cached on
disk, because Numba's cache is pickle and wants a writable installation. Without Numba the same boundaries come from
numpy, some seven times slower. Both paths are tested equal.
"""

import functools
from collections.abc import Callable
from typing import Final

import numpy as np
import numpy.typing as npt

from xkd_schemas.tokens import CONTENT, END, Int32s, Tokens

Int64s = npt.NDArray[np.int64]
Merge = Callable[[Int32s, Int64s, Int32s, Int64s, Int64s], Int32s]

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
    student_first = np.array([0, len(student_spans)], dtype=np.int64)
    teacher_first = np.array([0, len(teacher_spans)], dtype=np.int64)
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
        student_spans: Character intervals [S, 2] int32, group after group.
        student_first: [G + 1] int64; group g holds tokens student_first[g] to student_first[g + 1].
        teacher_spans: Character intervals [T, 2] int32.
        teacher_first: [G + 1] int64.
        limits: [G] or one for all; boundaries of the group behind this character do not count.
    """
    return merge()(
        np.ascontiguousarray(student_spans, dtype=np.int32).reshape(-1, 2), student_first,
        np.ascontiguousarray(teacher_spans, dtype=np.int32).reshape(-1, 2), teacher_first,
        np.broadcast_to(np.asarray(limits, np.int64), len(student_first) - 1).copy(),
    )  # fmt: skip


def align(student: Tokens, teacher: Tokens, segment_ends: Int32s) -> tuple[Int32s, Int32s]:
    """Aligned spans of one document as two models read it: (student [K, 2], teacher [K, 2]) int32 token ranges.

    Ranges count all tokens of the row, template tokens included, and hold content tokens of one segment, or are the
    one end token each model has after that segment. Rows are sorted, ranges disjoint. Spans cover every segment; the
    `targets` of the two rows say which are in a target. No span reaches behind the cut of either model.

    Args:
        student: Tokens of the document; a row that is not usable has none and gives K = 0.
        teacher: Tokens of the same document.
        segment_ends: [G] characters at which the document's segments end, ascending.
    """
    limit = min(student.num_chars, teacher.num_chars)
    student_at_S, student_first = _content(student, segment_ends)
    teacher_at_T, teacher_first = _content(teacher, segment_ends)
    spans_K4 = grouped_spans(
        student.spans[student_at_S], student_first, teacher.spans[teacher_at_T], teacher_first, limit
    )
    ends_E2 = _end_pairs(student, teacher, limit)
    aligned_K4 = in_rows(spans_K4, ends_E2, student_at_S, teacher_at_T).astype(np.int32)
    return aligned_K4[:, :2], aligned_K4[:, 2:]


def in_rows(spans_K4: Int32s, ends_E2: Int32s | Int64s, student_at_S: Int64s, teacher_at_T: Int64s) -> Int64s:
    """Aligned spans as ranges of all tokens, sorted: spans of content tokens, and pairs of end tokens, [K + E, 4].

    Args:
        spans_K4: As `grouped_spans` gives them, counting content tokens.
        ends_E2: Indices of the end tokens that are a span of one token on each side.
        student_at_S: Index of each content token of the student among all its tokens.
        teacher_at_T: The same of the teacher.
    """
    size = len(spans_K4)
    aligned_K4 = np.empty((size + len(ends_E2), 4), dtype=np.int64)
    aligned_K4[:size, 0] = student_at_S[spans_K4[:, 0]]
    aligned_K4[:size, 1] = student_at_S[spans_K4[:, 1] - 1] + 1
    aligned_K4[:size, 2] = teacher_at_T[spans_K4[:, 2]]
    aligned_K4[:size, 3] = teacher_at_T[spans_K4[:, 3] - 1] + 1
    aligned_K4[size:, 0::2] = ends_E2
    aligned_K4[size:, 1::2] = ends_E2 + 1
    ordered_K4: Int64s = aligned_K4[np.argsort(aligned_K4[:, 0], kind="stable")]
    return ordered_K4


def exact_pairs(student_spans: Int32s, teacher_spans: Int32s) -> Int32s:
    """Token pairs [E, 2] int32 of the aligned spans that are one token on each side.

    >>> exact_pairs(np.array([[0, 1], [1, 3]]), np.array([[4, 5], [5, 6]])).tolist()
    [[0, 4]]
    """
    single_K = (np.diff(student_spans, axis=1) == 1) & (np.diff(teacher_spans, axis=1) == 1)
    pairs_E2: Int32s = np.stack([student_spans[:, 0], teacher_spans[:, 0]], axis=1)[single_K[:, 0]].astype(np.int32)
    return pairs_E2


def token_ranges(tokens: Tokens, intervals_K2: Int32s) -> Int32s:
    """For every word or phrase, the range [K, 2] int32 of the row's tokens that lie inside it whole.

    A content token lies inside when it starts at or after the interval's start and ends at or before its end; its
    blanks in front do not count, as they are not in its interval (MTA's code, arXiv 2605.01374, allows one leading
    blank to the same end). Tokens with an empty interval lie in nothing. [a, a) where no token does.

    Args:
        tokens: Starts and ends of its content tokens must never decrease, as the encoder guarantees.
        intervals_K2: Character intervals [K, 2] int32, in any order; none may cross a segment border.
    """
    spans_T2 = tokens.spans
    at_S = np.flatnonzero((tokens.kinds == CONTENT) & (spans_T2[:, 1] > spans_T2[:, 0]))
    intervals_K2 = np.asarray(intervals_K2, dtype=np.int32).reshape(-1, 2)
    first_K = np.searchsorted(spans_T2[at_S, 0], intervals_K2[:, 0], side="left")
    behind_K = np.searchsorted(spans_T2[at_S, 1], intervals_K2[:, 1], side="right")
    token_first_K = np.append(at_S, len(spans_T2))[first_K]
    token_end_K = np.append(0, at_S + 1)[behind_K]
    return np.stack([token_first_K, np.maximum(token_first_K, token_end_K)], axis=1).astype(np.int32)


def _content(tokens: Tokens, segment_ends: Int32s) -> tuple[Int64s, Int64s]:
    """Indices [S] of the content tokens, and where each segment's begin among them [G + 1].

    A token belongs to the segment it starts in; an empty interval at a border to the segment behind the border.
    """
    at_S = np.flatnonzero(tokens.kinds == CONTENT)
    first = np.zeros(len(segment_ends) + 1, dtype=np.int64)
    first[1:-1] = np.searchsorted(tokens.spans[at_S, 0], segment_ends[:-1], side="left")
    first[-1] = len(at_S) if len(segment_ends) else 0
    return at_S, first


def _end_pairs(student: Tokens, teacher: Tokens, limit: int) -> Int32s:
    """Indices [E, 2] of the end tokens that both models have at the same character."""
    ours, theirs = (
        {int(row.spans[at, 1]): int(at) for at in np.flatnonzero(row.kinds == END)} for row in (student, teacher)
    )
    pairs = [(at, theirs[char]) for char, at in ours.items() if char in theirs and char <= limit]
    return np.array(pairs, dtype=np.int32).reshape(-1, 2)


@functools.cache
def merge() -> Merge:
    """The compiled merge, or the numpy one where Numba is not installed. Decided once in a process."""
    try:
        import numba
    except ModuleNotFoundError:
        return merge_numpy
    table = numba.types.Array(numba.int32, 2, "C", readonly=True)
    numbers = numba.types.Array(numba.int64, 1, "C", readonly=True)
    group = numba.njit(nogil=True)(group_loop)
    compiled: Merge = numba.njit([(table, numbers, table, numbers, numbers)], nogil=True)(merge_loop(group))
    return compiled


def group_loop(spans_S2: Int32s, first: int, end: int, limit: int, out: Int32s) -> int:
    """Boundaries of tokens `first` to `end`, as a plain loop for Numba: writes [index behind the token, character].

    A token's end is a boundary until a later token of the group starts before it. Returns how many there are.
    """
    size, char = 0, -1
    for n in range(first, end):
        start = spans_S2[n, 0]
        while size > 0 and out[size - 1, 1] > start:
            size -= 1
        char = max(char, spans_S2[n, 1])
        if char <= limit:
            out[size, 0], out[size, 1] = n + 1, char
            size += 1
    return size


def merge_loop(group: Callable[[Int32s, int, int, int, Int32s], int]) -> Merge:
    """`grouped_spans` as a plain loop for Numba, given `group_loop` or what Numba made of it.

    The boundaries of one group at a time lie in two small arrays that are used again, since touching fresh memory
    costs more than the merge.
    """

    def merged(
        student_spans: Int32s, student_first: Int64s, teacher_spans: Int32s, teacher_first: Int64s, limits: Int64s
    ) -> Int32s:
        student_most, teacher_most = 0, 0
        for g in range(len(student_first) - 1):
            student_most = max(student_most, student_first[g + 1] - student_first[g])
            teacher_most = max(teacher_most, teacher_first[g + 1] - teacher_first[g])
        ours, theirs = np.empty((student_most, 2), np.int32), np.empty((teacher_most, 2), np.int32)
        out = np.empty((min(len(student_spans), len(teacher_spans)), 4), dtype=np.int32)
        k = 0
        for g in range(len(student_first) - 1):
            student_from, teacher_from = student_first[g], teacher_first[g]
            our_size = group(student_spans, student_from, student_first[g + 1], limits[g], ours)
            their_size = group(teacher_spans, teacher_from, teacher_first[g + 1], limits[g], theirs)
            i, j = 0, 0
            while i < our_size and j < their_size:
                ahead = ours[i, 1] - theirs[j, 1]
                if ahead == 0:
                    out[k, 0], out[k, 1] = student_from, ours[i, 0]
                    out[k, 2], out[k, 3] = teacher_from, theirs[j, 0]
                    student_from, teacher_from = ours[i, 0], theirs[j, 0]
                    k += 1
                i += ahead <= 0
                j += ahead >= 0
        return out[:k]

    return merged


def merge_numpy(
    student_spans: Int32s, student_first: Int64s, teacher_spans: Int32s, teacher_first: Int64s, limits: Int64s
) -> Int32s:
    """`grouped_spans` in numpy, one group at a time."""
    found = [np.empty((0, 4), dtype=np.int32)]
    for g in range(len(student_first) - 1):
        s, t = student_first[g], teacher_first[g]
        student_keys, student_counts = _boundary_keys(student_spans[s : student_first[g + 1]], int(limits[g]))
        teacher_keys, teacher_counts = _boundary_keys(teacher_spans[t : teacher_first[g + 1]], int(limits[g]))
        _, ours, theirs = np.intersect1d(student_keys, teacher_keys, assume_unique=True, return_indices=True)
        student_ends, teacher_ends = s + student_counts[ours], t + teacher_counts[theirs]
        if len(ours):
            student_from, teacher_from = np.append(s, student_ends[:-1]), np.append(t, teacher_ends[:-1])
            spans_K4 = np.stack([student_from, student_ends, teacher_from, teacher_ends], axis=1)
            found.append(spans_K4.astype(np.int32))
    return np.concatenate(found)


def _boundary_keys(spans_S2: Int32s, limit: int) -> tuple[Int64s, Int64s]:
    """Boundaries of one group: (keys, token counts); a key is the character and its rank among equal characters."""
    if not len(spans_S2):
        return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
    char_S = np.maximum.accumulate(spans_S2[:, 1].astype(np.int64))
    later_S = np.append(np.minimum.accumulate(spans_S2[::-1, 0])[::-1][1:], _FAR)
    counts = np.flatnonzero((char_S <= later_S) & (char_S <= limit)) + 1
    chars = char_S[counts - 1]
    rank = np.arange(len(chars)) - np.searchsorted(chars, chars, side="left")
    return (chars << 32) | rank, counts

"""Alignment of one document, and of its words, as their definitions say it: slow, token by token."""

import numpy as np

from xkd_schemas.text.alignment import common_boundaries
from xkd_schemas.tokens import CONTENT, END, Int32s, Tokens


def align_one(student: Tokens, teacher: Tokens, segment_ends: Int32s) -> tuple[Int32s, Int32s]:
    """Aligned spans of one document: (student [K, 2], teacher [K, 2]) int32 token ranges."""
    limit = min(student.num_chars, teacher.num_chars)
    found: list[tuple[int, int, int, int]] = []
    for number in range(len(segment_ends)):
        (ours, theirs) = (_content(row, segment_ends, number) for row in (student, teacher))
        i = j = 0
        for i_end, j_end in common_boundaries(student.spans[ours], teacher.spans[theirs]).tolist():
            if student.spans[ours[:i_end], 1].max() <= limit:
                found.append((ours[i], ours[i_end - 1] + 1, theirs[j], theirs[j_end - 1] + 1))
            i, j = i_end, j_end
    ours, theirs = (
        {int(row.spans[at, 1]): at for at in range(len(row.kinds)) if row.kinds[at] == END}
        for row in (student, teacher)
    )
    found += [(at, at + 1, theirs[c], theirs[c] + 1) for c, at in ours.items() if c in theirs and c <= limit]
    aligned_K4 = np.array(sorted(found), np.int32).reshape(-1, 4)
    return aligned_K4[:, :2], aligned_K4[:, 2:]


def _content(row: Tokens, segment_ends: Int32s, number: int) -> list[int]:
    """Content tokens that start in a segment; the last one has what starts behind it too."""
    low = segment_ends[number - 1] if number else -1
    high = segment_ends[number] if number + 1 < len(segment_ends) else 2**31
    return [t for t, kind in enumerate(row.kinds) if kind == CONTENT and low <= row.spans[t, 0] < high]


def exact_pairs(student_spans: Int32s, teacher_spans: Int32s) -> Int32s:
    """Token pairs [E, 2] int32 of the aligned spans that are one token on each side.

    >>> exact_pairs(np.array([[0, 1], [1, 3]]), np.array([[4, 5], [5, 6]])).tolist()
    [[0, 4]]
    """
    single_K = (np.diff(student_spans, axis=1) == 1) & (np.diff(teacher_spans, axis=1) == 1)
    pairs_E2: Int32s = np.stack([student_spans[:, 0], teacher_spans[:, 0]], axis=1)[single_K[:, 0]].astype(np.int32)
    return pairs_E2


def ranges_of(tokens: Tokens, intervals_K2: Int32s) -> Int32s:
    """For every word or phrase of one document the range [K, 2] int32 of the tokens that lie inside it whole."""
    spans_T2 = tokens.spans
    at_S = np.flatnonzero((tokens.kinds == CONTENT) & (spans_T2[:, 1] > spans_T2[:, 0]))
    intervals_K2 = np.asarray(intervals_K2, dtype=np.int32).reshape(-1, 2)
    first_K = np.searchsorted(spans_T2[at_S, 0], intervals_K2[:, 0], side="left")
    behind_K = np.searchsorted(spans_T2[at_S, 1], intervals_K2[:, 1], side="right")
    token_first_K = np.append(at_S, len(spans_T2))[first_K]
    token_end_K = np.append(0, at_S + 1)[behind_K]
    return np.stack([token_first_K, np.maximum(token_first_K, token_end_K)], axis=1).astype(np.int32)

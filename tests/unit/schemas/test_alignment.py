"""Boundaries, aligned spans and token ranges against their definitions written out the slow way."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xkd_schemas.text.alignment import align, common_boundaries, grouped_spans, token_ranges
from xkd_schemas.tokens import CONTENT, END, OK, TEMPLATE, Tokens


def as_spans(pairs: list[tuple[int, int]]) -> np.ndarray:
    return np.array(pairs, dtype=np.int32).reshape(-1, 2)


@st.composite
def tokenisation(draw, size: int = 12) -> np.ndarray:
    """Intervals over `size` characters: starts and ends never decrease, some overlap, some repeat, some are empty."""
    count = draw(st.integers(0, 10))
    starts = sorted(draw(st.lists(st.integers(0, size), min_size=count, max_size=count)))
    ends = sorted(draw(st.lists(st.integers(0, size), min_size=count, max_size=count)))
    return as_spans([(s, max(s, e)) for s, e in zip(starts, ends, strict=True)])


any_spans = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 4)), max_size=9).map(
    lambda pairs: as_spans([(start, start + length) for start, length in pairs])
)
"""Intervals in no order at all, which no tokenizer should give."""


def boundaries_by_definition(spans: np.ndarray) -> list[tuple[int, int]]:
    """(count, character) wherever no token of the first `count` ends behind the start of a later one."""
    found = []
    for count in range(1, len(spans) + 1):
        char = max(int(end) for _, end in spans[:count])
        if all(start >= char for start, _ in spans[count:]):
            found.append((count, char))
    return found


def common_by_definition(student: np.ndarray, teacher: np.ndarray) -> list[list[int]]:
    pairs = []
    ours, theirs = boundaries_by_definition(student), boundaries_by_definition(teacher)
    for char in sorted({c for _, c in ours} & {c for _, c in theirs}):
        pairs += zip([i for i, c in ours if c == char], [j for j, c in theirs if c == char], strict=False)
    return [list(pair) for pair in pairs]


@settings(deadline=None, max_examples=150)
@given(st.one_of(tokenisation(), any_spans), st.one_of(tokenisation(), any_spans))
def test_boundaries_are_the_ones_of_the_definition(student: np.ndarray, teacher: np.ndarray) -> None:
    pairs = common_boundaries(student, teacher)

    assert pairs.dtype == np.int32
    assert pairs.tolist() == common_by_definition(student, teacher)
    assert (np.diff(pairs, axis=0) > 0).all()


@settings(deadline=None, max_examples=100)
@given(st.lists(st.tuples(tokenisation(), tokenisation(), st.integers(0, 13)), max_size=4))
def test_the_spans_of_many_groups_are_those_of_each(groups: list[tuple[np.ndarray, np.ndarray, int]]) -> None:
    student, teacher = (np.concatenate([as_spans([]), *(g[side] for g in groups)]) for side in (0, 1))
    student_first, teacher_first = (np.cumsum([0, *(len(g[side]) for g in groups)]) for side in (0, 1))

    limits = np.array([limit for _, _, limit in groups], np.int64)
    found = grouped_spans(student, student_first, teacher, teacher_first, limits)

    expected = []
    for (ours, theirs, limit), s, t in zip(groups, student_first, teacher_first, strict=False):
        pairs = [p for p in common_by_definition(ours, theirs) if ours[: p[0], 1].max() <= limit]
        both = zip([[0, 0], *pairs], pairs, strict=False)
        expected += [[s + i, s + i_end, t + j, t + j_end] for (i, j), (i_end, j_end) in both]
    assert found.tolist() == expected


def row(*tokens: tuple[int, int, int], num_chars: int = 100, targets: bool = True) -> Tokens:
    kinds = np.array([kind for kind, _, _ in tokens], dtype=np.uint8)
    return Tokens(
        status=OK,
        num_chars=num_chars,
        ids=np.arange(len(tokens), dtype=np.int32),
        spans=as_spans([(start, end) for _, start, end in tokens]),
        kinds=kinds,
        targets=np.full(len(tokens), targets) & (kinds != TEMPLATE),
    )


GLUE = (TEMPLATE, -1, -1)


THREE = ((CONTENT, 0, 3), (END, 3, 3))


@pytest.mark.parametrize(
    ("student", "teacher", "ends", "ours", "theirs"),
    [
        pytest.param(
            row(GLUE, (CONTENT, 0, 5), (END, 5, 5), GLUE, (CONTENT, 5, 9), (END, 9, 9)),
            row((CONTENT, 0, 5), (CONTENT, 5, 7), (CONTENT, 7, 9), (END, 9, 9)), [5, 9],
            [[1, 2], [4, 5], [5, 6]], [[0, 1], [1, 3], [3, 4]], id="an end token of one model is in no span",
        ),
        pytest.param(
            row((CONTENT, 0, 3), (CONTENT, 3, 3), (CONTENT, 3, 6)), row((CONTENT, 0, 3), (CONTENT, 3, 6)), [3, 6],
            [[0, 1], [1, 3]], [[0, 1], [1, 2]], id="an empty token at a border belongs to what follows",
        ),
        pytest.param(
            row(*THREE, (END, 3, 3)), row(*THREE), [3],
            [[0, 1], [2, 3]], [[0, 1], [1, 2]], id="of several end tokens at one character the last is paired",
        ),
        pytest.param(row(*THREE, num_chars=3), row(*THREE, num_chars=2), [3], [], [], id="behind the cut is no pair"),
        pytest.param(row(), row(*THREE), [3], [], [], id="a row without tokens aligns with nothing"),
    ],
)  # fmt: skip
def test_spans_are_those_of_both_models(
    student: Tokens, teacher: Tokens, ends: list[int], ours: list[list[int]], theirs: list[list[int]]
) -> None:
    found = [side[0] for side in align([student], [teacher], [np.array(ends)])]

    assert [side.tolist() for side in found] == [ours, theirs]
    assert all(side.dtype == np.int32 and side.shape[1:] == (2,) for side in found)


@settings(deadline=None, max_examples=100)
@given(tokenisation(), st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), max_size=6), st.data())
def test_ranges_hold_the_tokens_inside(spans: np.ndarray, words: list[tuple[int, int]], data: st.DataObject) -> None:
    glue = data.draw(st.lists(st.booleans(), min_size=len(spans), max_size=len(spans)))
    tokens = row(*(t for g, s in zip(glue, spans.tolist(), strict=True) for t in ([GLUE] * g + [(CONTENT, *s)])))
    intervals = as_spans([(min(word), max(word)) for word in words])

    ranges = token_ranges([tokens], [intervals])[0]

    assert ranges.dtype == np.int32
    assert ranges.shape == (len(words), 2)
    for (first, end), (low, high) in zip(ranges.tolist(), intervals.tolist(), strict=True):
        inside = [
            t for t, (kind, (s, e)) in enumerate(zip(tokens.kinds, tokens.spans.tolist(), strict=True))
            if kind == CONTENT and s < e and low <= s and e <= high
        ]  # fmt: skip
        assert 0 <= first <= end <= len(tokens.ids)
        if inside:
            assert (first, end) == (inside[0], inside[-1] + 1)
        else:
            assert first == end


def test_no_documents_give_no_rows() -> None:
    assert [len(side) for side in align([], [], [])] == [0, 0]
    assert len(token_ranges([], [])) == 0

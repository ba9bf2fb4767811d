"""Blocks and Lists give back what was put into them, row by row and as columns."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xkd_schemas.ragged import Ragged
from xkd_schemas.tokens import OK, TokenBatch, Tokens

ROWS = st.lists(st.lists(st.tuples(st.integers(0, 99), st.integers(0, 99)), max_size=4), max_size=6)


def tokens(size: int, status: str = OK) -> Tokens:
    numbers = np.arange(size, dtype=np.int32)
    return Tokens(
        status=status, num_chars=2 * size, ids=numbers, spans=np.stack([numbers, numbers + 1], axis=1),
        kinds=(numbers % 3).astype(np.uint8), targets=numbers % 2 == 0, extended=size // 2,
    )  # fmt: skip


def plain(row: Tokens) -> tuple[object, ...]:
    arrays = (row.ids, row.spans, row.kinds, row.targets)
    return row.status, row.num_chars, row.extended, *(a.tolist() for a in arrays)


@settings(deadline=None)
@given(rows=ROWS, cut=st.slices(6))
def test_lists_and_their_slices_are_their_rows(rows: list[list[tuple[int, int]]], cut: slice) -> None:
    lists, cut = Ragged.of(rows, np.int32, 2), slice(cut.start, cut.stop)

    assert [row.tolist() for row in lists] == [[list(pair) for pair in row] for row in rows]
    assert [row.tolist() for row in lists[cut]] == [row.tolist() for row in list(lists)[cut]]
    assert lists.counts.tolist() == [len(row) for row in rows]


def test_a_row_behind_the_last_or_in_front_of_the_first_is_not_there() -> None:
    lists, block = Ragged.of([[1], [2, 3]], np.int32), TokenBatch.of([tokens(1), tokens(2)])

    assert (lists[-1].tolist(), block[-2].ids.tolist()) == ([2, 3], [0])
    for rows in (lists, block):
        for index in (2, -3):
            with pytest.raises(IndexError):
                rows[index]


@settings(deadline=None)
@given(sizes=st.lists(st.integers(0, 5), max_size=5), data=st.data())
def test_tokens_come_out_of_a_block_and_an_unusable_row_has_none(sizes: list[int], data: st.DataObject) -> None:
    rows = [tokens(n) for n in sizes]
    usable = np.array(data.draw(st.lists(st.booleans(), min_size=len(sizes), max_size=len(sizes))), bool)
    block = TokenBatch.of(rows)
    statuses = [OK if fine else "no_target" for fine in usable]

    assert [plain(row) for row in block] == [plain(row) for row in block[:]] == [plain(row) for row in rows]
    marked = block.with_statuses(statuses)
    assert [row.status for row in marked] == statuses
    for row, old, fine in zip(marked, rows, usable, strict=True):
        assert plain(row)[1:] == (plain(old) if fine else (OK, old.num_chars, *plain(tokens(0))[2:]))[1:]
    assert TokenBatch.of(marked) is marked

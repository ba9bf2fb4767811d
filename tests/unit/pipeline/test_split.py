"""Rows that kill their process are found, and no others."""

from hypothesis import given
from hypothesis import strategies as st

from xkd_pipeline.workers.scheduler import culprits


def searched(rows: range, kills, *, tries: int = 3, most: int = 99) -> tuple[tuple[int, ...], int]:
    """What a search finds, and how many groups it had tried; `kills` says whether a group kills."""
    search, count = culprits(rows, tries=tries, most=most), 0
    try:
        group = next(search)
        while True:
            count += 1
            group = search.send(kills(group))
    except StopIteration as end:
        return end.value, count


@given(st.integers(1, 300), st.sets(st.integers(0, 299), min_size=1, max_size=6))
def test_exactly_the_rows_that_kill_are_found(size: int, bad: set[int]) -> None:
    bad = {row % size for row in bad}

    found, tried = searched(range(size), lambda group: bad & set(group))

    assert set(found) == bad
    assert tried <= len(bad) * (2 * size.bit_length() + 3)


@given(st.integers(2, 100), st.data())
def test_rows_that_kill_only_in_company_are_no_culprits(size: int, data: st.DataObject) -> None:
    pair = {data.draw(st.integers(0, size - 2)), size - 1}

    found, _ = searched(range(size), lambda group: pair <= set(group))

    assert found == ()


@given(st.integers(1, 100), st.randoms())
def test_a_kill_from_outside_that_happens_twice_in_a_row_at_most_costs_no_row(size: int, chance) -> None:
    kills = 0

    def unlucky(_group: tuple[int, ...]) -> bool:
        nonlocal kills
        kills = kills + 1 if kills < 2 and chance.random() < 0.5 else 0
        return kills > 0

    assert searched(range(size), unlucky)[0] == ()


def test_the_search_ends_when_more_are_found_than_can_be_chance() -> None:
    found, _ = searched(range(512), lambda _group: True, most=16)

    assert len(found) == 17

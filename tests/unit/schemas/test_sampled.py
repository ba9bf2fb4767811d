"""Drawn classes and their shares as integers."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xkd_schemas.codecs import MOST_CLASSES, TOTAL, find_class_fault, pack_classes, unpack_classes


@given(st.lists(st.tuples(st.integers(0, MOST_CLASSES - 1), st.integers(0, TOTAL)), min_size=1, max_size=9))
def test_an_entry_says_class_and_share(pairs: list[tuple[int, int]]) -> None:
    classes, shares = np.array(pairs).T[:, None]

    entries = pack_classes(classes, shares)
    found, weights = unpack_classes(entries)

    assert entries.dtype == np.int32
    assert entries.min() >= 0
    assert found.tolist() == classes.tolist()
    assert np.rint(weights * TOTAL).tolist() == shares.tolist()


def test_what_capture_writes_has_no_fault() -> None:
    assert find_class_fault(pack_classes(np.array([[0, 5], [3, 9]]), np.array([[TOTAL, 0], [1, TOTAL - 1]])), 10) == ""
    assert find_class_fault(np.zeros((0, 4), np.int32), 10) == ""


@pytest.mark.parametrize(
    ("classes", "shares", "said"),
    [
        ([3, 10], [1, TOTAL - 1], "a class is not from 0 to 9"),
        ([-1, 3], [1, TOTAL - 1], "a class is not from 0 to 9"),
        ([5, 3], [1, TOTAL - 1], "not ascending"),
        ([5, 5], [1, TOTAL - 1], "not ascending"),
        ([3, 5], [2, TOTAL - 1], "shares add up to 4096, not to 4095"),
        ([3, 5], [1, TOTAL - 2], "shares add up to 4094, not to 4095"),
    ],
)
def test_a_fault_is_named(classes: list[int], shares: list[int], said: str) -> None:
    good = pack_classes(np.array([[0, 5]]), np.array([[1, TOTAL - 1]]))

    assert said in find_class_fault(np.concatenate([good, pack_classes(np.array([classes]), np.array([shares]))]), 10)

"""Drawn classes and their shares as integers."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xkd_schemas.sampled_classes import MOST_CLASSES, TOTAL, fault_of, packed, unpacked


@given(st.lists(st.tuples(st.integers(0, MOST_CLASSES - 1), st.integers(0, TOTAL)), min_size=1, max_size=9))
def test_an_entry_says_class_and_share(pairs: list[tuple[int, int]]) -> None:
    classes, shares = np.array(pairs).T[:, None]

    entries = packed(classes, shares)
    found, weights = unpacked(entries)

    assert entries.dtype == np.int32
    assert entries.min() >= 0
    assert found.tolist() == classes.tolist()
    assert np.rint(weights * TOTAL).tolist() == shares.tolist()


def test_what_capture_writes_has_no_fault() -> None:
    assert fault_of(packed(np.array([[0, 5], [3, 9]]), np.array([[TOTAL, 0], [1, TOTAL - 1]])), 10) == ""
    assert fault_of(np.zeros((0, 4), np.int32), 10) == ""


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
    good = packed(np.array([[0, 5]]), np.array([[1, TOTAL - 1]]))

    assert said in fault_of(np.concatenate([good, packed(np.array([classes]), np.array([shares]))]), 10)

"""Rows of different lengths in one flat array of numbers, and where each begins.

Shape legend for this file
    R rows    N values of all rows
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True, eq=False)
class Lists(Sequence[npt.NDArray[Any]]):
    """Rows of different lengths in one flat array; a row, and a slice of rows, is a view of it.

    >>> rows = Lists.of([np.array([1, 2]), np.array([], int), np.array([3])], np.int32)
    >>> rows.first.tolist(), rows[0].tolist(), [row.tolist() for row in rows[1:]]
    ([0, 2, 2, 3], [1, 2], [[], [3]])
    """

    values: npt.NDArray[Any]
    """[N] or [N, width]"""
    first: npt.NDArray[np.int64]
    """[R + 1]; row r is values[first[r] : first[r + 1]]."""

    @staticmethod
    def of(rows: Iterable[Any], dtype: npt.DTypeLike, width: int = 0) -> "Lists":
        """Copy rows, arrays [n] or [n, width], into one array of that type; Lists are returned as they are."""
        if isinstance(rows, Lists):
            return rows
        arrays = [np.asarray(row, dtype=dtype).reshape(-1, width) if width else np.asarray(row, dtype) for row in rows]
        none = np.empty((0, width) if width else 0, dtype)
        return Lists(np.concatenate([none, *arrays]), firsts([len(row) for row in arrays]))

    def __len__(self) -> int:
        return len(self.first) - 1

    @overload
    def __getitem__(self, index: int) -> npt.NDArray[Any]: ...
    @overload
    def __getitem__(self, index: slice) -> "Lists": ...
    def __getitem__(self, index: int | slice) -> "npt.NDArray[Any] | Lists":
        """Row `index`, or the rows of a slice without a step."""
        if isinstance(index, slice):
            start, stop, _ = index.indices(len(self))
            return Lists(self.values, self.first[start : max(start, stop) + 1])
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        at = index % len(self)
        row: npt.NDArray[Any] = self.values[self.first[at] : self.first[at + 1]]
        return row

    @property
    def counts(self) -> npt.NDArray[np.int64]:
        """Values of each row, [R]."""
        return np.diff(self.first)


def firsts(counts: Any) -> npt.NDArray[np.int64]:
    """Where each row begins if rows of these lengths stand end to end, and the end of the last: [R + 1].

    >>> firsts([2, 0, 1]).tolist()
    [0, 2, 2, 3]
    """
    first: npt.NDArray[np.int64] = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=first[1:])
    return first

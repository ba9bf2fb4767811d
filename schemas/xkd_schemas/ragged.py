"""Rows of different lengths in one flat array of numbers, and where each begins.

Shape legend for this file
    R rows    N values of all rows
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
import numpy.typing as npt
import pyarrow as pa


@dataclass(frozen=True, slots=True, eq=False)
class Ragged(Sequence[npt.NDArray[Any]]):
    """Rows of different lengths in one flat array; a row, and a slice of rows, is a view of it.

    >>> rows = Ragged.of([np.array([1, 2]), np.array([], int), np.array([3])], np.int32)
    >>> rows.first.tolist(), rows[0].tolist(), [row.tolist() for row in rows[1:]]
    ([0, 2, 2, 3], [1, 2], [[], [3]])
    """

    values: npt.NDArray[Any]  # [N] or [N, width]
    first: npt.NDArray[np.int64]  # [R + 1]; row r is values[first[r] : first[r + 1]]

    @staticmethod
    def of(rows: Iterable[Any], dtype: npt.DTypeLike, width: int = 0) -> "Ragged":
        """Copy rows, arrays [n] or [n, width], into one array of that type; a Ragged is returned as it is."""
        if isinstance(rows, Ragged):
            return rows
        arrays = [np.asarray(row, dtype=dtype).reshape(-1, width) if width else np.asarray(row, dtype) for row in rows]
        none = np.empty((0, width) if width else 0, dtype)
        return Ragged(np.concatenate([none, *arrays]), row_offsets([len(row) for row in arrays]))

    def __len__(self) -> int:
        return len(self.first) - 1

    @overload
    def __getitem__(self, index: int) -> npt.NDArray[Any]: ...
    @overload
    def __getitem__(self, index: slice) -> "Ragged": ...
    def __getitem__(self, index: int | slice) -> "npt.NDArray[Any] | Ragged":
        """Row `index`, or the rows of a slice without a step."""
        if isinstance(index, slice):
            start, stop, _ = index.indices(len(self))
            return Ragged(self.values, self.first[start : max(start, stop) + 1])
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        at = index % len(self)
        row: npt.NDArray[Any] = self.values[self.first[at] : self.first[at + 1]]
        return row

    @property
    def counts(self) -> npt.NDArray[np.int64]:
        """Values of each row, [R]."""
        return np.diff(self.first)


def row_offsets(counts: Any) -> npt.NDArray[np.int64]:
    """Where each row begins if rows of these lengths stand end to end, and the end of the last: [R + 1].

    >>> row_offsets([2, 0, 1]).tolist()
    [0, 2, 2, 3]
    """
    first: npt.NDArray[np.int64] = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=first[1:])
    return first


# Rows of different lengths in flat Arrow lists, and back as numpy views without a copy.


def flat_list(kind: pa.DataType) -> pa.DataType:
    """Arrow type of a flat list column without nulls and with 64-bit offsets."""
    return pa.large_list(pa.field("item", kind, nullable=False))


def column_of(rows: Sequence[Any], kind: pa.DataType) -> pa.Array:
    """Build a column from one value per row; numpy rows of a list column are joined into one flat buffer.

    Args:
        rows: Plain values for a scalar column; for a list column a Ragged, or arrays [n] or [n, width].
        kind: Type of the column: a scalar, `large_list<scalar>` or `large_list<fixed_size_list<scalar>>`.
    """
    item = kind.value_type if pa.types.is_large_list(kind) else kind
    if item is kind or pa.types.is_string(item):
        return pa.array(rows, kind)
    width = item.list_size if pa.types.is_fixed_size_list(item) else 0
    number = item.value_type if width else item
    dtype = number.to_pandas_dtype()
    ragged = Ragged.of(rows, dtype, width)
    first = ragged.first - ragged.first[0]
    part = np.asarray(ragged.values[ragged.first[0] : ragged.first[-1]], dtype)  # of all rows, end to end
    values = pa.array(part.reshape(-1), number)
    values = pa.FixedSizeListArray.from_arrays(values, type=item) if width else values
    return pa.LargeListArray.from_arrays(pa.array(first), values, type=kind)


def batch_of(schema: pa.Schema, columns: dict[str, Sequence[Any]]) -> pa.RecordBatch:
    """A record batch with exactly the columns of `schema`."""
    arrays = [column_of(columns[field.name], field.type) for field in schema]
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


class Columns:
    """Columns of a record batch, each made ready when first read, so that a row of it is no more than a slice."""

    __slots__ = ("_batch", "_readers", "names")

    def __init__(self, batch: pa.RecordBatch) -> None:
        self._batch = batch
        self._readers: dict[str, Callable[[int], Any]] = {}
        self.names = frozenset(batch.schema.names)

    def row(self, name: str, row: int) -> Any:
        """Row `row` of a column: a Python value, a list of strings, or a numpy view [n] or [n, width]."""
        reader = self._readers.get(name)
        if reader is None:
            reader = self._readers[name] = _reader(self._batch.column(name))
        return reader(row)


def _reader(column: pa.Array) -> Callable[[int], Any]:
    if not pa.types.is_large_list(column.type):
        return lambda row: column[row].as_py()
    offsets, values = column.offsets.to_numpy().tolist(), column.values
    if pa.types.is_string(values.type):
        return lambda row: values.slice(offsets[row], offsets[row + 1] - offsets[row]).to_pylist()
    if pa.types.is_fixed_size_list(values.type):
        rows_NW = values.values.to_numpy(zero_copy_only=True).reshape(-1, values.type.list_size)
        return lambda row: rows_NW[offsets[row] : offsets[row + 1]]
    packed = pa.types.is_boolean(values.type)  # bits in Arrow: the one kind that is copied
    flat = values.to_numpy(zero_copy_only=not packed)
    flat.flags.writeable = False
    return lambda row: flat[offsets[row] : offsets[row + 1]]

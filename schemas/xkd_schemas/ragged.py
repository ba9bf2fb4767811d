"""Rows of different lengths in flat Arrow lists, and back as numpy views without a copy."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from xkd_schemas.flat import Lists


def column_of(rows: Sequence[Any], kind: pa.DataType) -> pa.Array:
    """Build a column from one value per row; numpy rows of a list column are joined into one flat buffer.

    Args:
        rows: Plain values for a scalar column; for a list column Lists, or arrays [n] or [n, width].
        kind: Type of the column: a scalar, `large_list<scalar>` or `large_list<fixed_size_list<scalar>>`.
    """
    if not pa.types.is_large_list(kind):
        return pa.array(rows, kind)
    item = kind.value_type
    if isinstance(rows, Lists):
        return _flat_column(rows, kind)
    offsets = pa.array(np.concatenate([[0], np.cumsum([len(row) for row in rows], dtype=np.int64)]), pa.int64())
    if pa.types.is_fixed_size_list(item):
        flat = _joined([np.ascontiguousarray(row).reshape(-1) for row in rows], item.value_type)
        return pa.LargeListArray.from_arrays(offsets, pa.FixedSizeListArray.from_arrays(flat, type=item), type=kind)
    if pa.types.is_string(item):
        return pa.LargeListArray.from_arrays(offsets, pa.array([v for row in rows for v in row], item), type=kind)
    return pa.LargeListArray.from_arrays(offsets, _joined(list(rows), item), type=kind)


def _flat_column(rows: Lists, kind: pa.DataType) -> pa.Array:
    """The column of Lists whose values are numbers, without touching a row."""
    item = kind.value_type
    part = rows.values[rows.first[0] : rows.first[-1]].reshape(-1)
    offsets = pa.array(rows.first - rows.first[0], pa.int64())
    if not pa.types.is_fixed_size_list(item):
        return pa.LargeListArray.from_arrays(offsets, _joined([part], item), type=kind)
    values = pa.FixedSizeListArray.from_arrays(_joined([part], item.value_type), type=item)
    return pa.LargeListArray.from_arrays(offsets, values, type=kind)


def _joined(rows: list[npt.NDArray[Any]], item: pa.DataType) -> pa.Array:
    dtype = item.to_pandas_dtype()
    flat = np.concatenate([np.asarray(row, dtype=dtype) for row in rows]) if rows else np.empty(0, dtype)
    return pa.array(flat, item)


def batch_of(schema: pa.Schema, columns: dict[str, Sequence[Any]]) -> pa.RecordBatch:
    """A record batch with exactly the columns of `schema`."""
    arrays = [column_of(columns[field.name], field.type) for field in schema]
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


class Columns:
    """Columns of a record batch, each made ready when first read, so that a row of it is no more than a slice."""

    __slots__ = ("_batch", "_readers")

    def __init__(self, batch: pa.RecordBatch) -> None:
        self._batch = batch
        self._readers: dict[str, Callable[[int], Any]] = {}

    @property
    def names(self) -> list[str]:
        """Of all columns."""
        found: list[str] = self._batch.schema.names
        return found

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

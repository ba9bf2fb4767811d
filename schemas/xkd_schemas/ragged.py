"""Rows of different lengths in one flat array of numbers, and the record batches that hold such columns.

Shape legend for this file
    R rows    N values of all rows
"""

import itertools
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, overload

import numpy as np
import numpy.typing as npt
import pyarrow as pa

MAGIC: Final = 8  # bytes of an Arrow file before its first message, the schema
UNREADABLE: Final = (pa.ArrowException, OSError, EOFError, UnicodeDecodeError)  # what pyarrow raises for it


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


def lists_of(column: pa.Array) -> Ragged:
    """A list column of numbers, or of pairs of them; a view of it but for booleans, which are bits in Arrow."""
    first, items = row_offsets(column.value_lengths().to_numpy()), column.flatten()
    if pa.types.is_fixed_size_list(items.type):
        return Ragged(items.flatten().to_numpy().reshape(-1, items.type.list_size), first)
    return Ragged(items.to_numpy(zero_copy_only=not pa.types.is_boolean(items.type)), first)


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
    if not pa.types.is_large_list(column.type) or pa.types.is_string(column.type.value_type):
        return lambda row: column[row].as_py()
    lists = lists_of(column)
    flat, offsets = lists.values, lists.first.tolist()
    flat.flags.writeable = False
    return lambda row: flat[offsets[row] : offsets[row + 1]]


# A record batch of a shard that a stranger may have made: what it declares is checked before it is used.


def check_schema(schema: pa.Schema) -> None:
    """Raise pa.ArrowInvalid where a column has a type that no table of a cache has, or a name that is no text."""
    for name, kind in zip(schema.names, schema.types, strict=True):
        if not _is_known(kind):
            raise pa.ArrowInvalid(f"column {name} has the type {kind}")


def _is_known(kind: pa.DataType) -> bool:
    """Plain values and strings, and lists of plain values, of strings or of tuples."""
    item = kind.value_type if pa.types.is_large_list(kind) else kind
    if item is not kind and pa.types.is_fixed_size_list(item) and item.list_size > 0:
        item = item.value_type
    return pa.types.is_primitive(item) or pa.types.is_string(item) or (item is kind and pa.types.is_large_string(item))


def read_batch(data: memoryview, schema: pa.Schema, rows: int) -> pa.RecordBatch:
    """The record batch in `data`, as views of it: nothing is copied, so what it declares costs no memory.

    pa.ArrowInvalid where it is compressed, or has other rows, nulls, or offsets that do not fit its values.
    """
    stream = pa.BufferReader(pa.py_buffer(data[MAGIC:] if bytes(data[:6]) == b"ARROW1" else data))
    message = pa.ipc.read_message(stream)
    if message.type == "schema":  # the bytes of the first batch begin with the file
        message = pa.ipc.read_message(stream)
    if message.type != "record batch" or _is_compressed(message.metadata.to_pybytes()):
        raise pa.ArrowInvalid("a message that is no record batch, or a compressed one")
    batch = pa.ipc.read_record_batch(message, schema)
    if batch.num_rows != rows:
        raise pa.ArrowInvalid(f"{batch.num_rows} rows, its record says {rows}")
    batch.validate(full=True)
    if any(map(_has_nulls, batch.columns)):
        raise pa.ArrowInvalid("a value is null")
    return batch


def _has_nulls(column: pa.Array) -> bool:
    is_list = pa.types.is_large_list(column.type) or pa.types.is_fixed_size_list(column.type)
    return bool(column.null_count) or (is_list and _has_nulls(column.values))


def _is_compressed(message: bytes) -> bool:
    """Whether the flatbuffer of a record batch has the field `compression`; Arrow has verified the flatbuffer."""
    table = struct.unpack_from("<I", message)[0]
    header = _field(message, table, 2)
    table = header + struct.unpack_from("<I", message, header)[0]
    return _field(message, table, 3) != 0


def _field(message: bytes, table: int, number: int) -> int:
    """Where a field of a flatbuffer's table lies, 0 where the table has none."""
    names = table - struct.unpack_from("<i", message, table)[0]
    size = struct.unpack_from("<H", message, names)[0]
    at = 4 + 2 * number
    place = struct.unpack_from("<H", message, names + at)[0] if at < size else 0
    return table + place if place else 0


def pieces_of(sizes: Sequence[int], most: int) -> list[tuple[int, int]]:
    """Consecutive stretches of rows, each of one row or of sizes that add up to at most `most`; none if no rows.

    >>> pieces_of([2, 2, 3, 9, 1], most=5)
    [(0, 2), (2, 3), (3, 4), (4, 5)]
    """
    cuts, total = [0], 0
    for row, size in enumerate(sizes):
        if total + size > most and row > cuts[-1]:
            cuts.append(row)
            total = 0
        total += size
    return list(itertools.pairwise([*cuts, len(sizes)])) if sizes else []

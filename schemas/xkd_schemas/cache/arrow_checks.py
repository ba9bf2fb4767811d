"""Read one record batch of a shard that a stranger may have made: what it declares is checked before it is used."""

import struct
from typing import Final

import pyarrow as pa

MAGIC: Final = 8  # bytes of an Arrow file before its first message, the schema
UNREADABLE: Final = (pa.ArrowException, OSError, EOFError, UnicodeDecodeError)  # what pyarrow raises for it


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

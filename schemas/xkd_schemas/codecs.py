"""How wide signals (one vector of D numbers for each token or span) are stored, and read back as bfloat16 bits.

    codec        bytes a number   what is lost
    bf16         2                nothing that bfloat16 holds
    bf16-planes  about 1.4        nothing: sign and fraction as they are, the exponents compressed
    int8         1                see the manifest's `codec_error`; centred and scaled by channel, then by token

A plain int8 with one scale a token is not offered: a few large channels of final states take all of its range.
A codec is one class here and one line in CODECS.

Drawn classes of a prediction and their shares are one integer each: class * (TOTAL + 1) + share. The shares are whole
numbers that add up to TOTAL, so the classes make a distribution exactly; entries, and so classes, are ascending.

Shape legend for this file
    N tokens, spans or predictions of one document    D width    k classes kept of each prediction
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from xkd_schemas.errors import BadData
from xkd_schemas.ragged import flat_list

Bits = npt.NDArray[np.uint16]  # [N, D] bfloat16 numbers as their bits
Array = npt.NDArray[Any]
Read = Callable[[str], Any]  # column name -> what this row holds in it
TOTAL: Final = 4095  # what the shares of a prediction add up to
MOST_CLASSES: Final = 2**31 // (TOTAL + 1)  # a class is below it, so that an entry is an int32


class Encoded(NamedTuple):
    """The rows of one signal in one shard, ready to be written."""

    columns: dict[str, list[Any]]
    metadata: dict[bytes, bytes]  # for the schema of the shard


def _vectors(item: pa.DataType, width: int) -> pa.DataType:
    return flat_list(pa.list_(pa.field("item", item, nullable=False), width))


class Codec:
    """One way to store a wide signal; this one keeps the bits as they are, a row is a view into the mapped shard."""

    def fields(self, column: str, width: int) -> list[tuple[str, pa.DataType]]:
        """Columns it writes; the first is named like the signal."""
        return [(column, _vectors(pa.uint16(), width))]

    def encode(self, column: str, rows: Sequence[Bits]) -> Encoded:
        """All rows of one shard."""
        return Encoded({column: list(rows)}, {})

    def decode(self, column: str, read: Read, metadata: Mapping[bytes, bytes]) -> Bits:
        """One row, [N, D]; BadData where the stored parts do not fit together."""
        bits: Bits = read(column)
        return bits


class Bf16Planes(Codec):
    """Sign and fraction in one byte, the exponent in another; exponents are few different ones and shrink."""

    _zstd = pa.Codec("zstd", compression_level=3)

    def fields(self, column: str, width: int) -> list[tuple[str, pa.DataType]]:
        """Bytes of sign and fraction, and one compressed block of exponents for each document."""
        return [(column, _vectors(pa.uint8(), width)), (f"{column}.exponents", flat_list(pa.uint8()))]

    def encode(self, column: str, rows: Sequence[Bits]) -> Encoded:
        """Rotate the bits left by one: the exponent becomes the high byte."""
        rotated = [np.ascontiguousarray((row << 1) | (row >> 15)) for row in rows]
        blocks = [self._zstd.compress((row >> 8).astype(np.uint8).tobytes(), asbytes=True) for row in rotated]
        low = [(row & 0xFF).astype(np.uint8) for row in rotated]
        return Encoded({column: low, f"{column}.exponents": [np.frombuffer(b, np.uint8) for b in blocks]}, {})

    def decode(self, column: str, read: Read, metadata: Mapping[bytes, bytes]) -> Bits:
        """The same bits."""
        low: npt.NDArray[np.uint8] = read(column)
        try:
            plain = self._zstd.decompress(np.ascontiguousarray(read(f"{column}.exponents")), low.size, asbytes=True)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise BadData(f"column {column}: its exponents cannot be unpacked: {error}") from error
        if len(plain) != low.size:
            raise BadData(f"column {column}: {len(plain)} exponents for {low.size} numbers")
        rotated = (np.frombuffer(plain, np.uint8).reshape(low.shape).astype(np.uint16) << 8) | low
        return np.asarray((rotated >> 1) | (rotated << 15), np.uint16)


class Int8(Codec):
    """(x - centre) / spread of each channel over the unit, then one scale for each token.

    Centre and spread lie in the shard's metadata; so a shard can be read by itself and is still a pure function of
    its documents.
    """

    def fields(self, column: str, width: int) -> list[tuple[str, pa.DataType]]:
        """Integers, and one scale for each vector."""
        return [(column, _vectors(pa.int8(), width)), (f"{column}.scale", flat_list(pa.float32()))]

    def encode(self, column: str, rows: Sequence[Bits]) -> Encoded:
        """Round to the nearest of 255 steps."""
        if not rows:
            return Encoded({column: [], f"{column}.scale": []}, {})
        values = [numbers_of(row) for row in rows]
        every = np.concatenate(values, dtype=np.float32)
        if not np.isfinite(every).all():
            raise BadData(
                f"column {column} is not finite, which int8 cannot store", fix="capture with --codec bf16-planes"
            )
        width = every.shape[1]
        centre = every.mean(0, dtype=np.float64).astype(np.float32) if len(every) else np.zeros(width, np.float32)
        spread = every.std(0, dtype=np.float64).astype(np.float32) if len(every) else np.ones(width, np.float32)
        spread[spread == 0] = 1.0
        whitened = [(value - centre) / spread for value in values]
        scales = [np.abs(w).max(-1, initial=0.0).astype(np.float32) / np.float32(127) for w in whitened]
        steps = [
            np.rint(w / np.where(s > 0, s, np.float32(1))[:, None]).astype(np.int8)
            for w, s in zip(whitened, scales, strict=True)
        ]
        metadata = {_key(column, "centre"): _hex(centre), _key(column, "spread"): _hex(spread)}
        return Encoded({column: steps, f"{column}.scale": scales}, metadata)

    def decode(self, column: str, read: Read, metadata: Mapping[bytes, bytes]) -> Bits:
        """Integers times scales, rounded to bfloat16."""
        steps, scale = read(column), read(f"{column}.scale")
        centre, spread = (_unhex(column, metadata.get(_key(column, part))) for part in ("centre", "spread"))
        if len(scale) != len(steps) or centre.shape != spread.shape or centre.shape != steps.shape[1:]:
            raise BadData(f"column {column}: {steps.shape} numbers, {len(scale)} scales, {len(centre)} channels")
        return bits_of(steps * scale[:, None] * spread + centre)


def _key(column: str, part: str) -> bytes:
    return f"{column}.{part}".encode()


def _hex(values: npt.NDArray[np.float32]) -> bytes:
    return values.tobytes().hex().encode()


@functools.lru_cache(maxsize=256)
def _unhex(column: str, text: bytes | None) -> npt.NDArray[np.float32]:
    try:
        return np.frombuffer(bytes.fromhex((text or b"?").decode("ascii")), np.float32)
    except ValueError as error:
        raise BadData(f"column {column}: the shard lacks its centre or spread") from error


def numbers_of(bits: Bits) -> npt.NDArray[np.float32]:
    """bfloat16 bits as float32, exactly."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def bits_of(values: npt.NDArray[np.float32]) -> Bits:
    """Finite float32 rounded to bfloat16, half to even.

    >>> bits_of(np.array([1.5], np.float32)).tolist() == [0x3FC0]
    True
    """
    raw = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((raw + 0x7FFF + ((raw >> 16) & 1)) >> 16).astype(np.uint16)


CODECS: Final[Mapping[str, Codec]] = {"bf16": Codec(), "bf16-planes": Bf16Planes(), "int8": Int8()}
PLAIN: Final = "bf16"


def squared_error(rows: Sequence[Bits], again: Sequence[Bits]) -> tuple[float, float]:
    """(sum of squared differences, sum of squares) over the numbers of both; their ratio's root is the error.

    >>> squared_error([np.array([[0x3F80]], np.uint16)], [np.array([[0x3FC0]], np.uint16)])
    (0.25, 1.0)
    """
    lost = kept = 0.0
    for row, back in zip(rows, again, strict=True):
        exact = numbers_of(row).astype(np.float64)
        lost += float(np.square(exact - numbers_of(back)).sum())
        kept += float(np.square(exact).sum())
    return lost, kept


def pack_classes(classes_Nk: Array, shares_Nk: Array) -> npt.NDArray[np.int32]:
    """Entries in the order given, of classes from 0 to MOST_CLASSES - 1 and shares from 0 to TOTAL.

    >>> pack_classes(np.array([[2, 7]]), np.array([[4000, 95]]))
    array([[12192, 28767]], dtype=int32)
    """
    return (classes_Nk.astype(np.int64) * (TOTAL + 1) + shares_Nk).astype(np.int32)


def unpack_classes(entries_Nk: Array) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Classes, and shares divided by TOTAL."""
    classes_Nk, shares_Nk = np.divmod(entries_Nk, TOTAL + 1)
    return classes_Nk.astype(np.int64), shares_Nk.astype(np.float32) / np.float32(TOTAL)


def find_class_fault(entries_Nk: Array, classes: int) -> str:
    """What is wrong with stored entries of a teacher of so many classes; empty for nothing.

    >>> find_class_fault(np.array([[12192, 28767]], np.int32), 7)
    'a class is not from 0 to 6'
    """
    if entries_Nk.size == 0:
        return ""
    if entries_Nk.min() < 0 or int(entries_Nk.max()) // (TOTAL + 1) >= classes:
        return f"a class is not from 0 to {classes - 1}"
    if (np.diff(entries_Nk.astype(np.int64) // (TOTAL + 1), axis=1) <= 0).any():
        return "classes of a prediction are not ascending"
    sums_N = (entries_Nk % (TOTAL + 1)).sum(1)
    return f"shares add up to {int(sums_N[sums_N != TOTAL][0])}, not to {TOTAL}" if (sums_N != TOTAL).any() else ""

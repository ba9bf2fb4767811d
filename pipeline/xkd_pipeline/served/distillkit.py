"""The k largest log-probabilities of each position as DistillKit packs them, and back.

A position has, one after the other: the largest `exact_k` values; the coefficients of a curve through the others; then
for each bin a scale and small integers, which are what the curve misses. With delta encoding all this is of the
differences between neighbours. The formulas are those of arcee-ai/DistillKit, Apache-2.0; nothing of it is copied.

Shape legend for this file
    P positions    k values of one    X bytes
"""

import functools
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from xkd_schemas.errors import BadData, InputMissing

Bytes = npt.NDArray[np.uint8]
Dtype = Literal["float16", "bfloat16", "float32", "float64"]
CONFIG: Final = "compression_config.yaml"
_BYTES: Final[dict[Dtype, int]] = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}


class _Bin(BaseModel):
    model_config = ConfigDict(extra="forbid")

    scale_dtype: Dtype
    element_bits: int = Field(gt=0, le=32)
    num_elements: int = Field(gt=0)

    @property
    def size(self) -> int:
        """Bytes of the integers of a position."""
        return -(-self.num_elements * self.element_bits // 8)


class Compression(BaseModel):
    """What `compression_config.yaml` beside the rows says."""

    model_config = ConfigDict(extra="forbid")

    d: int = Field(gt=1)  # classes
    k: int = Field(gt=0)
    exact_k: int = Field(ge=0)
    exact_dtype: Dtype = "float32"
    polynomial_terms: list[int | Literal["sqrt", "exp"]] | None = None
    term_dtype: Dtype = "float32"
    residual_bins: list[_Bin] = []
    delta_encoding: bool = True
    error_diffusion: bool = False  # changes how it was written alone
    normalize_t: bool = False

    @property
    def sizes(self) -> list[int]:
        """Bytes of the parts of a position: exact values, curve, and for each bin scale and integers."""
        floats = [self.exact_k * _BYTES[self.exact_dtype], len(self.polynomial_terms or ()) * _BYTES[self.term_dtype]]
        return floats + [size for one in self.residual_bins for size in (_BYTES[one.scale_dtype], one.size)]


@functools.cache
def read_compression(folder: Path) -> Compression:
    """The settings of the rows in a folder; InputMissing where they are not there, BadData where they are none."""
    import yaml

    path = folder / CONFIG
    try:
        return Compression.model_validate(yaml.safe_load(path.read_text()))
    except OSError as error:
        raise InputMissing(
            f"{path}: {error.strerror}", fix="keep it beside the rows, as DistillKit writes it"
        ) from error
    except (ValidationError, yaml.YAMLError) as error:
        raise BadData(f"{path}: {' '.join(str(error).split())[:160]}", fix="copy it again") from error


def unpack_integers(packed_PX: Bytes, bits: int, count: int) -> npt.NDArray[np.int64]:
    """Integers of so many bits, the highest bit first, end to end: [P, count].

    >>> unpack_integers(np.array([[0b10101100]], np.uint8), 3, 2).tolist()
    [[5, 3]]
    """
    bits_PB = np.unpackbits(packed_PX, axis=-1)[:, : bits * count].reshape(len(packed_PX), count, bits)
    weights: npt.NDArray[np.int64] = bits_PB.astype(np.int64) @ (1 << np.arange(bits - 1, -1, -1, dtype=np.int64))
    return weights


def _floats(packed_PX: Bytes, dtype: Dtype) -> npt.NDArray[np.float64]:
    packed_PX = np.ascontiguousarray(packed_PX)
    if dtype == "bfloat16":
        return (packed_PX.view("<u2").astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return packed_PX.view({"float16": "<f2", "float32": "<f4", "float64": "<f8"}[dtype]).astype(np.float64)


def unpack_log_probabilities(packed_PX: Bytes, how: Compression) -> npt.NDArray[np.float32]:
    """[P, k] log-probabilities, the largest first; ValueError where a position has another number of bytes."""
    if packed_PX.shape[1] != sum(how.sizes):
        raise ValueError(f"{packed_PX.shape[1]} bytes a position, {CONFIG} gives {sum(how.sizes)}")
    exact_PX, curve_PX, *bins = np.split(packed_PX, np.cumsum(how.sizes)[:-1], axis=1)
    exact = _floats(exact_PX, how.exact_dtype)
    rest = np.zeros((len(packed_PX), how.k - how.exact_k))
    if terms := how.polynomial_terms:
        place_k = np.linspace(0, 1, rest.shape[1]) if how.normalize_t else np.arange(rest.shape[1], dtype=np.float64)
        curve = [place_k**t if isinstance(t, int) else getattr(np, t)(place_k) for t in terms]
        rest += _floats(curve_PX, how.term_dtype) @ np.stack(curve)
    done = 0
    for one, scale_PX, packed in zip(how.residual_bins, bins[::2], bins[1::2], strict=True):
        scale_P1 = _floats(scale_PX, one.scale_dtype)
        numbers = unpack_integers(packed, one.element_bits, one.num_elements)
        signed = 2 * numbers - 1 if one.element_bits == 1 else numbers - (1 << (one.element_bits - 1))
        rest[:, done : done + one.num_elements] += signed * scale_P1
        done += one.num_elements
    values = np.concatenate([exact, rest], axis=1)
    return (np.cumsum(values, axis=1) if how.delta_encoding else values).astype(np.float32)


def unpack_row(row: Any, how: Compression) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """Classes and log-probabilities [P, k] of one row; ValueError where its bytes do not fit the settings."""
    bits = int(np.ceil(np.log2(np.float32(how.d))))
    indices_PX, values_PX = (np.array(row[name], np.uint8) for name in ("bytepacked_indices", "compressed_logprobs"))
    if indices_PX.shape != (len(values_PX), -(-bits * how.k // 8)) or values_PX.ndim != 2:
        raise ValueError(f"bytes of shape {indices_PX.shape} and {values_PX.shape} do not fit {CONFIG}")
    classes = unpack_integers(indices_PX, bits, how.k)
    if len(classes) and classes.max() >= how.d:
        raise ValueError(f"class {classes.max()} is not below {how.d}")
    return classes.astype(np.int32), unpack_log_probabilities(values_PX, how)

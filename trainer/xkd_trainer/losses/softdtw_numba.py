"""CPU kernels of soft-DTW: value and gradient of one batch, anti-diagonal by anti-diagonal, without exp or log in the chain.

A cell holds Z = exp(-R / gamma) as mantissa * 2**exponent, so the recursion is three additions and one multiplication
and its range is that of the exponent. The weights Z_predecessor / sum are kept and the gradient is pushed back through
them in the same call: memory is three floats a cell for one pair at a time. Products far off the path are cut to
zero before they become denormal numbers, which are many times slower.

Imports numba: `softdtw` imports this module only where numba is installed. Compiling takes a few seconds and is kept
on disk (numba's own cache beside this file, else in the user's cache folder; without a writable one it is redone in
each process).

Shape legend for this file
    B pairs    S student tokens    T teacher tokens    K cells of one anti-diagonal
"""

import math
from collections.abc import Callable
from typing import Any, Final

import numba
import numpy as np
import numpy.typing as npt
from numba.core import types
from numba.extending import intrinsic

Kernel = Callable[..., None]

OK: Final = 0
RANGE: Final = 1
"""Status of a pair whose cost / gamma does not fit the exponent of this kernel."""
NOT_A_NUMBER: Final = 2
"""Status of a pair whose costs hold NaN or -inf."""


@intrinsic  # type: ignore[untyped-decorator]
def _bits(_context: Any, value: Any) -> Any:
    """The bits of a float as a signed integer of the same width."""
    integer = types.int32 if value == types.float32 else types.int64

    def emit(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], context.get_value_type(integer))

    return integer(value), emit


@intrinsic  # type: ignore[untyped-decorator]
def _float(_context: Any, value: Any) -> Any:
    """The float with these bits: the inverse of `_bits`."""
    real = types.float32 if value == types.int32 else types.float64

    def emit(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], context.get_value_type(real))

    return real(value), emit


def _compiled(function: Callable[..., Any]) -> Any:
    """Compile without the GIL; keep the machine code on disk where numba finds a place for it."""
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": {"contract"}}
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError:  # no writable cache folder
        return numba.njit(**options)(function)


@_compiled
def _power_of_two_32(fraction: np.float32) -> np.float32:
    """2**fraction for |fraction| <= 1/2, to the last bits of float32 (Taylor in fraction * ln 2)."""
    x = fraction * np.float32(math.log(2.0))
    value = np.float32(1.0) + x * np.float32(1 / 7)
    value = np.float32(1.0) + x * np.float32(1 / 6) * value
    value = np.float32(1.0) + x * np.float32(1 / 5) * value
    value = np.float32(1.0) + x * np.float32(1 / 4) * value
    value = np.float32(1.0) + x * np.float32(1 / 3) * value
    value = np.float32(1.0) + x * np.float32(1 / 2) * value
    return np.float32(1.0) + x * value

"""How our CPU kernels are compiled, and how their rows are shared out."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import numba
import numpy as np

_KEPT: Final = "NUMBA_CACHE_DIR" in os.environ  # numba's cache is pickles, so only where somebody names a folder


def compile_kernel(function: Callable[..., Any]) -> Any:
    """Compile on first use, without the GIL, and into the folder NUMBA_CACHE_DIR if there is one.

    A product and a sum may become one instruction, which rounds once; no other liberty is taken with floats.
    """
    return numba.njit(nogil=True, error_model="numpy", fastmath={"contract"}, cache=_KEPT)(function)


def compile_sums(function: Callable[..., Any]) -> Any:
    """`compile_kernel`, and a sum may be taken in any order, as many numbers at a time as a vector register holds.

    So the last bit differs between kinds of processors, never between two runs on one. Not for what a cache keeps.
    """
    return numba.njit(nogil=True, error_model="numpy", fastmath={"contract", "reassoc"}, cache=_KEPT)(function)


def among_threads(work: Callable[[slice], None], rows: int, threads: int) -> None:
    """Call `work` on consecutive ranges that cover the rows, one range for each thread.

    >>> among_threads(print, 5, 1)
    slice(0, 5, None)
    """
    step = max(1, -(-rows // max(1, threads)))
    parts = [slice(first, min(first + step, rows)) for first in range(0, rows, step)]
    if len(parts) == 1:
        work(parts[0])
    elif parts:
        with ThreadPoolExecutor(len(parts)) as pool:
            list(pool.map(work, parts))


TERMS: Final = tuple(np.float32(1.0 / f) for f in (5040.0, 720.0, 120.0, 24.0, 6.0, 2.0, 1.0, 1.0))
"""Of the exponential's series, the highest power first: exact to float32 between -ln 2 / 2 and ln 2 / 2."""


@compile_kernel
def series(rest: Any) -> Any:
    """The exponential of a number between -ln 2 / 2 and ln 2 / 2."""
    value = TERMS[0]
    for term in numba.literal_unroll(TERMS[1:]):
        value = value * rest + term
    return value

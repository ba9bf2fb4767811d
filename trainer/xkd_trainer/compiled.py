"""How our CPU kernels are compiled."""

from collections.abc import Callable
from typing import Any

import numba


def compiled(function: Callable[..., Any]) -> Any:
    """Compile on first use, without the GIL and without numba's cache on disk, which is a pickle.

    A product and a sum may become one instruction, which rounds once; no other liberty is taken with floats.
    """
    return numba.njit(nogil=True, error_model="numpy", fastmath={"contract"})(function)

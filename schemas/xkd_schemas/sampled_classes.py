"""A few drawn classes of a prediction and their shares, one integer each.

The shares of a prediction are whole numbers that add up to TOTAL, so its classes make a distribution exactly. An entry
is class * (TOTAL + 1) + share; entries of a prediction are ascending, and so are its classes.

Shape legend for this file
    N predictions    k classes kept of each
"""

from typing import Any, Final

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

TOTAL: Final = 4095
"""What the shares of a prediction add up to."""
MOST_CLASSES: Final = 2**31 // (TOTAL + 1)
"""A class is below it, so that an entry is an int32."""


def packed(classes_Nk: Array, shares_Nk: Array) -> npt.NDArray[np.int32]:
    """Entries in the order given.

    >>> packed(np.array([[2, 7]]), np.array([[4000, 95]]))
    array([[12192, 28767]], dtype=int32)

    Args:
        classes_Nk: Integers from 0 to MOST_CLASSES - 1.
        shares_Nk: Integers from 0 to TOTAL.
    """
    return (classes_Nk.astype(np.int64) * (TOTAL + 1) + shares_Nk).astype(np.int32)


def unpacked(entries_Nk: Array) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Classes, and shares divided by TOTAL.

    >>> classes, weights = unpacked(np.array([[12192, 28767]], np.int32))
    >>> classes.tolist(), weights.round(3).tolist()
    ([[2, 7]], [[0.9769999980926514, 0.023000000044703484]])
    """
    classes_Nk, shares_Nk = np.divmod(entries_Nk, TOTAL + 1)
    return classes_Nk.astype(np.int64), shares_Nk.astype(np.float32) / np.float32(TOTAL)


def fault_of(entries_Nk: Array, classes: int) -> str:
    """What is wrong with stored entries of a teacher of so many classes; empty for nothing.

    >>> fault_of(np.array([[12192, 28767]], np.int32), 7)
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

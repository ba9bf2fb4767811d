"""Arrays of different lengths as one padded tensor, large ones in memory that is used again.

A new page of memory costs more than the copy that fills it, so the memory of a large tensor is kept when the tensor is
gone. Gone means that nothing refers to its storage any more, views and what autograd saved included: a batch that
somebody still holds is never written to, however many are made after it.

Shape legend for this file
    B arrays    N entries of the longest
"""

import math
import weakref
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array = npt.NDArray[Any]

LARGE: Final = 2**18  # bytes from which on memory is kept; what is smaller the allocator keeps by itself
_free: Final[dict[int, Array]] = {}
"""Memory whose tensor is gone, by id; each step on it is one that no other thread can interrupt."""


def _lend(shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
    """An array of this shape with anything in it, whose memory is free again when it and its tensors are gone.

    Its memory is the smallest free one that is large enough; else new, in place of the largest that is too small.
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    by_size = sorted(_free.copy().items(), key=lambda item: len(item[1]))
    taken = (_free.pop(number, None) for number, memory in by_size if len(memory) >= size)
    memory = next((memory for memory in taken if memory is not None), None)
    if memory is None:
        if by_size:
            _free.pop(by_size[-1][0], None)
        memory = np.empty(size + size // 8, np.uint8)
    lent: Array = np.ndarray(shape, dtype, buffer=memory)
    weakref.finalize(lent, _free.__setitem__, id(memory), memory).atexit = False
    return lent


def pad(arrays: Sequence[Array]) -> Tensor:
    """Stack arrays [n, ...] of different n into [B, max n (at least 1), ...], zeros after each one's end.

    uint16 arrays are the bits of bfloat16 numbers and come out as such.

    >>> pad([np.array([1, 2]), np.array([3])])
    tensor([[1, 2],
            [3, 0]])
    """
    most = max(1, *(len(a) for a in arrays))
    shape, dtype = (len(arrays), most, *arrays[0].shape[1:]), arrays[0].dtype
    stored = np.dtype(np.int16) if dtype == np.uint16 else dtype  # torch has the bits of bfloat16 as int16
    large = math.prod(shape) * dtype.itemsize >= LARGE
    stacked_BN: Array = _lend(shape, stored) if large else np.empty(shape, stored)
    for row, array in enumerate(arrays):
        stacked_BN[row, : len(array)] = array.view(stored) if dtype == np.uint16 else array
        stacked_BN[row, len(array) :] = 0
    padded = torch.from_numpy(stacked_BN)
    return padded.view(torch.bfloat16) if dtype == np.uint16 else padded

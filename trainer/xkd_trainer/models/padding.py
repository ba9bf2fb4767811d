"""Documents of different lengths in one tensor: padded, or several in one row.

A new page of memory costs more than the copy that fills it, so the memory of a large tensor is kept when the tensor is
gone. Gone means that nothing refers to its storage any more, views and what autograd saved included: a batch that
somebody still holds is never written to, however many are made after it.

Of several in one row each has positions of its own: transformers keeps documents of a row apart where positions begin
again at 0 and no attention mask is given.

Shape legend for this file
    B arrays, or documents    N entries of the longest    S tokens of the longest    R rows of S tokens
"""

import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Packing:
    """Where each document lies in the rows."""

    row_B: Tensor
    start_B: Tensor
    """Its first place in that row."""
    rows: int
    length: int

    @property
    def place_BS(self) -> Tensor:
        """Each token's place in all rows one after the other; that of padding is some other token's."""
        place_BS = (self.row_B * self.length + self.start_B)[:, None] + self._offset_S
        return place_BS.clamp_max(self.rows * self.length - 1)

    @property
    def _offset_S(self) -> Tensor:
        return torch.arange(self.length, device=self.row_B.device)

    def pack(self, ids_BS: Tensor, valid_BS: Tensor) -> dict[str, Any]:
        """`input_ids` and `position_ids`, [R, S]; behind the last document of a row every position is 0."""
        place_N = self.place_BS[valid_BS]
        packed = {}
        for name, value_BS in {"input_ids": ids_BS, "position_ids": self._offset_S.expand_as(ids_BS)}.items():
            rows_RS = ids_BS.new_zeros(self.rows, self.length)
            packed[name] = rows_RS.flatten().scatter(0, place_N, value_BS[valid_BS]).view_as(rows_RS)
        return packed

    def unpack(self, values_RS: Tensor) -> Tensor:
        """[R, S, ...] to [B, S, ...]; padding holds what other documents have, and gives them no gradient."""
        found_N = values_RS.flatten(0, 1).index_select(0, self.place_BS.flatten())
        return found_N.view(len(self.row_B), self.length, *values_RS.shape[2:])

    def own_columns(self, map_BHS: Tensor) -> Tensor:
        """Of one row of an attention map for each document, over the packed row, what falls on the document."""
        column_BS = (self.start_B[:, None] + self._offset_S).clamp_max(self.length - 1)
        return map_BHS.gather(2, column_BS[:, None].expand(-1, map_BHS.shape[1], -1))


def plan_rows(valid_BS: Tensor) -> Packing | None:
    """Put each document, the longest first, into the first row with room; None where no row is saved.

    Rows are as long as the longest document, so that attention costs no more than without packing.
    """
    lengths, most = valid_BS.sum(1).tolist(), valid_BS.shape[1]
    rows, starts, filled = [0] * len(lengths), [0] * len(lengths), list[int]()
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        row = next((row for row, used in enumerate(filled) if used + lengths[place] <= most), len(filled))
        filled += [0] * (row == len(filled))
        rows[place], starts[place] = row, filled[row]
        filled[row] += lengths[place]
    if len(filled) == len(lengths):
        return None
    row_B, start_B = (torch.tensor(each, device=valid_BS.device) for each in (rows, starts))
    return Packing(row_B=row_B, start_B=start_B, rows=len(filled), length=most)

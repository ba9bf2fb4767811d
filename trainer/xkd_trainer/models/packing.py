"""Several documents in one row of a forward pass, each with positions of its own, and back to a row for each.

transformers keeps documents of a row apart where positions begin again at 0 and no attention mask is given.

Shape legend for this file
    B documents    S tokens of the longest    R rows of S tokens
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


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

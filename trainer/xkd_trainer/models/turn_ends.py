"""Which tokens end a student's turn: those its rows end with, the tokenizer's own, and those it came with.

A chat template may end a turn with another token than the tokenizer's end token (`<|im_end|>`, `<end_of_turn>`,
`<|eot_id|>`). A generation that stops at the latter alone runs on behind the answer.
"""

from collections.abc import Iterable
from typing import Any

from transformers import PreTrainedModel

from xkd_schemas.tokens import END, Bools, Int32s


def learnt_ends(rows: Iterable[tuple[Int32s, Any, Bools]]) -> set[int]:
    """The ids of the end tokens that are targets, of (ids, kinds, targets) of each row."""
    found: set[int] = set()
    for ids_T, kinds_T, targets_T in rows:
        found.update(ids_T[(kinds_T == END) & targets_T].tolist())
    return found


def turn_ends(model: PreTrainedModel, tokenizer: Any, learnt: Iterable[int]) -> list[int]:
    """All ids that end a turn, ascending: what was learnt, the tokenizer's, and the model's generation config's."""
    own = model.generation_config.eos_token_id
    before = own if isinstance(own, (list, tuple)) else [] if own is None else [own]
    return sorted({int(i) for i in (*before, *learnt, tokenizer.eos_token_id)})

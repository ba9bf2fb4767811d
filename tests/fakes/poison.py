"""A batch with other values wherever nothing is valid."""

import math
from dataclasses import replace
from typing import Any

from torch import Tensor

from xkd_trainer.data.batch import Batch, Level, TokenStates


def _fill(values: Tensor | None, valid: Tensor | None, with_: float) -> Any:
    if values is None or valid is None:
        return values
    mask = valid.reshape(*valid.shape, *[1] * (values.ndim - valid.ndim))
    return values.masked_fill(~mask, with_)


def _level(one: Level) -> Level:
    both = one.valid_BU[:, :, None] & one.valid_BU[:, None, :]
    return replace(
        one,
        student_BU2=_fill(one.student_BU2, one.valid_BU, 1),
        mass_BU=_fill(one.mass_BU, one.valid_BU, math.nan),
        cosines_BUU=_fill(one.cosines_BUU, both, math.nan),
        vectors_BUD=_fill(one.vectors_BUD, one.valid_BU, math.nan),
    )


def _states(one: TokenStates, valid: Tensor | None) -> TokenStates:
    names = ("hidden_BTD", "attention_BT", "centrality_BT")
    return replace(one, **{name: _fill(getattr(one, name), valid, math.nan) for name in names})


FILLED: dict[str, dict[str, float]] = {
    "student_valid_BS": {"student_ids_BS": 77},
    "predict_valid_BN": {"predict_BN": 2, "target_BN": 55},
    "teacher_predict_valid_BM": {
        "teacher_predict_BM": 1, "teacher_input_BM": 44, "teacher_target_BM": 33, "teacher_argmax_BM": 22,
        "teacher_sampled_ids_BMK": 11, "teacher_entropy_BM": math.nan, "teacher_logsumexp_BM": math.nan,
        "teacher_target_logprob_BM": math.nan, "teacher_topk_logits_BMK": math.nan,
        "teacher_sampled_weights_BMK": math.nan,
    },
    "teacher_valid_BR": {"teacher_hidden_BRD": math.nan, "teacher_attention_BR": math.nan, "teacher_kept_BR": 1},
    "span_valid_BK": {"span_student_BK2": 1, "span_teacher_BK2": 1},
    "pair_valid_BE": {"pairs_BE2": 1},
    "teacher_valid_BT": {"teacher_ids_BT": 77},
}  # fmt: skip
"""Mask -> what it masks, and the value that stands where it is false."""


def poisoned(batch: Batch) -> Batch:
    """The same batch with other values wherever nothing is valid."""
    filled = {
        name: _fill(getattr(batch, name), getattr(batch, mask), value)
        for mask, values in FILLED.items()
        for name, value in values.items()
    }
    return replace(
        batch,
        **filled,
        token_states=tuple(_states(one, batch.teacher_valid_BT) for one in batch.token_states),
        levels=tuple(_level(one) for one in batch.levels),
    )

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
    return replace(
        one,
        hidden_BTD=_fill(one.hidden_BTD, valid, math.nan),
        attention_BT=_fill(one.attention_BT, valid, math.nan),
        centrality_BT=_fill(one.centrality_BT, valid, math.nan),
    )


def poisoned(batch: Batch) -> Batch:
    """The same batch with other values wherever nothing is valid."""
    s, n, m, r, t, k = (
        batch.student_valid_BS, batch.predict_valid_BN, batch.teacher_predict_valid_BM, batch.teacher_valid_BR,
        batch.teacher_valid_BT, batch.span_valid_BK,
    )  # fmt: skip
    return replace(
        batch,
        student_ids_BS=_fill(batch.student_ids_BS, s, 77),
        predict_BN=_fill(batch.predict_BN, n, 2),
        target_BN=_fill(batch.target_BN, n, 55),
        teacher_predict_BM=_fill(batch.teacher_predict_BM, m, 1),
        teacher_input_BM=_fill(batch.teacher_input_BM, m, 44),
        teacher_target_BM=_fill(batch.teacher_target_BM, m, 33),
        teacher_hidden_BRD=_fill(batch.teacher_hidden_BRD, r, math.nan),
        teacher_attention_BR=_fill(batch.teacher_attention_BR, r, math.nan),
        teacher_entropy_BM=_fill(batch.teacher_entropy_BM, m, math.nan),
        teacher_argmax_BM=_fill(batch.teacher_argmax_BM, m, 22),
        teacher_logsumexp_BM=_fill(batch.teacher_logsumexp_BM, m, math.nan),
        teacher_topk_logits_BMK=_fill(batch.teacher_topk_logits_BMK, m, math.nan),
        teacher_sampled_ids_BMK=_fill(batch.teacher_sampled_ids_BMK, m, 11),
        teacher_sampled_weights_BMK=_fill(batch.teacher_sampled_weights_BMK, m, math.nan),
        span_student_BK2=_fill(batch.span_student_BK2, k, 1),
        span_teacher_BK2=_fill(batch.span_teacher_BK2, k, 1),
        pairs_BE2=_fill(batch.pairs_BE2, batch.pair_valid_BE, 1),
        teacher_ids_BT=_fill(batch.teacher_ids_BT, t, 77),
        teacher_kept_BR=_fill(batch.teacher_kept_BR, r, 1),
        token_states=tuple(_states(one, t) for one in batch.token_states),
        levels=tuple(_level(one) for one in batch.levels),
    )

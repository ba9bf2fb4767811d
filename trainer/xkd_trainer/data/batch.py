"""One micro-batch: the student's tokens, and what the cache knows of the same documents.

Shape legend, here and wherever a Batch is used
    B documents    S student tokens    N student predictions    R kept teacher rows    M teacher predictions
    K aligned spans of the response    E exact pairs    U words or phrases    D teacher width    T teacher tokens
Every [.., 2] holds half-open ranges. Padding is on the right: id 0, range (0, 0), mask False.
"""

from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor


def signal_fields(kind: type) -> dict[str, str]:
    """Signal -> the field that it fills of Batch, or of TokenStates.

    >>> signal_fields(TokenStates)["centrality"]
    'centrality_BT'
    """
    return {f.metadata["signal"]: f.name for f in fields(kind) if "signal" in f.metadata}


@dataclass(frozen=True, kw_only=True, slots=True)
class Level:
    """Words or phrases of one teacher layer."""

    layer: int
    """Teacher layer, Hugging Face index."""
    unit: str
    """word or phrase."""
    student_BU2: Tensor
    """Student tokens of each span, int64."""
    teacher_BU2: Tensor
    """The same spans as ranges of the kept teacher rows, int64; (0, 0) where the span lies in no target."""
    valid_BU: Tensor
    """Bool: the span has tokens on both sides and the settings want it."""
    in_phrase_BU: Tensor
    """Bool: the span lies inside a phrase (always True for phrases)."""
    in_target_BU: Tensor
    """Bool: the span lies in a target segment."""
    mass_BU: Tensor
    """Teacher's centrality inside the span, float32."""
    cosines_BUU: Tensor | None
    """Cosines between the teacher's span vectors, float32, diagonal 1."""
    vectors_BUD: Tensor | None
    """The teacher's span vectors, bfloat16."""
    paired_BP: Tensor | None = None
    """Which spans the cosines are of, ascending, int64, padded with -1; None for all, so that U and P are the same."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenStates:
    """What the cache holds of all tokens of one teacher layer; what no loss asked for is None."""

    layer: int
    """Teacher layer, Hugging Face index."""
    hidden_BTD: Tensor | None = field(default=None, metadata={"signal": "hidden"})
    """Output of the block, bfloat16; final-normed if it is the last one."""
    attention_BT: Tensor | None = field(default=None, metadata={"signal": "attention"})
    """Last token's attention in the block, heads summed, rows sum to 1, float32."""
    attention_text_BT: Tensor | None = field(default=None, metadata={"signal": "attention_text"})
    """The same of the last text token."""
    centrality_BT: Tensor | None = field(default=None, metadata={"signal": "centrality"})
    """MTA eq. 5-7, float32."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """See the legend of this module. What no loss asked for is None."""

    rows: tuple[int, ...]
    """Rows of the cache, for error messages."""
    policies: tuple[str, ...] = ()
    """Who wrote the response of each row; "" where the corpus does not say."""
    student_ids_BS: Tensor
    student_valid_BS: Tensor
    student_text_B1: Tensor
    """Place of the student's last text token, int64."""
    predict_BN: Tensor
    """Student positions whose state predicts a target, int64."""
    target_BN: Tensor
    """The ids they predict, int64."""
    predict_valid_BN: Tensor
    span_student_BK2: Tensor
    """Aligned spans as ranges of S."""
    span_teacher_BK2: Tensor
    """The same spans as ranges of R."""
    span_valid_BK: Tensor
    span_text_BK: Tensor
    """Bool: the span is text, not two end tokens."""
    pairs_BE2: Tensor
    """Exact pairs as (index into N, index into M)."""
    pair_valid_BE: Tensor
    teacher_valid_BR: Tensor
    teacher_predict_BM: Tensor
    """Teacher rows (of R) whose state predicts a target, int64."""
    teacher_input_BM: Tensor
    """Ids at those rows."""
    teacher_target_BM: Tensor
    """Ids they predict."""
    teacher_predict_valid_BM: Tensor
    teacher_hidden_BRD: Tensor | None = field(default=None, metadata={"signal": "hidden_last"})
    """Last hidden states, final-normed, bfloat16."""
    teacher_attention_BR: Tensor | None = field(default=None, metadata={"signal": "attention_last"})
    """Last token's attention at the kept rows, float32."""
    teacher_entropy_BM: Tensor | None = field(default=None, metadata={"signal": "entropy"})
    """Nats, float32."""
    teacher_argmax_BM: Tensor | None = field(default=None, metadata={"signal": "argmax"})
    teacher_logsumexp_BM: Tensor | None = field(default=None, metadata={"signal": "logsumexp"})
    """Of the teacher's logits, float32."""
    teacher_target_logprob_BM: Tensor | None = field(default=None, metadata={"signal": "target_logprob"})
    """Of the ids that are predicted, nats, float32."""
    teacher_topk_logits_BMK: Tensor | None = field(default=None, metadata={"signal": "topk_logits"})
    """The k largest logits, the largest first, float32; K is k here."""
    teacher_topk_ids_BMK: Tensor | None = field(default=None, metadata={"signal": "topk_ids"})
    """Their classes, int64."""
    teacher_sampled_ids_BMK: Tensor | None = field(default=None, metadata={"signal": "sampled"})
    """K classes drawn of each prediction, int64, ascending."""
    teacher_sampled_weights_BMK: Tensor | None = None
    """What each stands for of the teacher's distribution, float32; they add up to 1."""
    teacher_ids_BT: Tensor | None = None
    """All of the teacher's tokens, int64; this and the next two are there where some `TokenStates` are."""
    teacher_valid_BT: Tensor | None = None
    teacher_kept_BR: Tensor | None = None
    """Places of the kept rows among T, int64."""
    token_states: tuple[TokenStates, ...] = ()
    """Lowest layer first."""
    levels: tuple[Level, ...] = ()
    others: tuple["Batch", ...] = ()
    """The same documents and student tokens with what further teachers know of them."""

    @property
    def num_predictions(self) -> Tensor:
        """Valid student predictions, scalar."""
        return self.predict_valid_BN.sum()

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch with all tensors on `device`."""
        moved: Batch = _move(self, device)
        return moved

    def states(self, layer: int) -> TokenStates:
        """Of one teacher layer that some loss asked for."""
        return next(states for states in self.token_states if states.layer == layer)


def _move(value: Any, device: torch.device | str) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, Batch | Level | TokenStates):
        return replace(value, **{f.name: _move(getattr(value, f.name), device) for f in fields(value)})
    if isinstance(value, tuple):
        return tuple(_move(v, device) for v in value)
    return value


def unwrap(values: Tensor | None) -> Tensor:
    """What a loss asked for in its `needs`, so that it is there."""
    assert values is not None
    return values


def gather_rows(states_BLD: Tensor, index_BN: Tensor) -> Tensor:
    """states_BLD[b, index_BN[b, n]], [B, N, D]."""
    return states_BLD.gather(1, index_BN.unsqueeze(-1).expand(-1, -1, states_BLD.shape[-1]))


def blank(batch: Batch) -> Batch:
    """The same batch with nothing valid in it but its tokens: every count and every loss is 0."""
    names = ("predict_valid_BN", "span_valid_BK", "pair_valid_BE", "teacher_predict_valid_BM")
    masks: dict[str, Any] = {name: torch.zeros_like(getattr(batch, name)) for name in names}
    levels = tuple(replace(level, valid_BU=torch.zeros_like(level.valid_BU)) for level in batch.levels)
    return replace(batch, levels=levels, others=tuple(map(blank, batch.others)), **masks)

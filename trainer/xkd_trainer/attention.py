"""One row of one attention map, taken while the model runs its fast attention as always.

transformers lets a model's attention function be chosen by name. Ours passes every call on to
sdpa; for the layers somebody listens to, it also computes the softmax row of the last valid
token from query and key. No full map is ever made and no model code is touched.

Shape legend for this file
    B documents    L tokens    H query heads    K key/value heads    G = H / K    E head width
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from xkd_schemas.errors import UsageError

IMPLEMENTATION: Final = "xkd_sdpa"


@dataclass
class LastRows:
    """Rows heard so far: layer index (0 is the first block) -> [B, H, L] float32, without gradient."""

    layers: frozenset[int]
    last_B: Tensor
    """Position of each document's last valid token, int64."""
    rows: dict[int, Tensor] = field(default_factory=dict)


_listening: list[LastRows] = []


@contextlib.contextmanager
def listen(layers: frozenset[int], last_B: Tensor) -> Iterator[LastRows]:
    """Collect the last token's attention row of some blocks from the forward passes inside the context."""
    heard = LastRows(layers=layers, last_B=last_B)
    _listening.append(heard)
    try:
        yield heard
    finally:
        _listening.remove(heard)


def _attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor | None]:
    for heard in _listening:
        layer = getattr(module, "layer_idx", None)
        if layer in heard.layers:
            heard.rows[layer] = last_row(query, key, heard.last_B, attention_mask, options)
    result: tuple[Tensor, Tensor | None] = ALL_ATTENTION_FUNCTIONS["sdpa"](
        module, query, key, value, attention_mask, **options
    )
    return result


@torch.no_grad()
def last_row(
    query_BHLE: Tensor, key_BKLE: Tensor, last_B: Tensor, mask: Tensor | None, options: dict[str, Any]
) -> Tensor:
    """Attention of each document's last valid token over all tokens, [B, H, L] float32, rows sum to 1.

    Args:
        query_BHLE: Queries after position encoding.
        key_BKLE: Keys after position encoding.
        last_B: Position of the last valid token.
        mask: What the attention function was given: None (causal), bool (True attends) or additive.
        options: The other arguments of the call; `scaling`, `sliding_window` and `s_aux` (attention sinks) count.
    """
    size_B, heads, length, width = query_BHLE.shape
    groups = heads // key_BKLE.shape[1]
    rows_B = torch.arange(size_B, device=last_B.device)
    query_BKGE = query_BHLE[rows_B, :, last_B].float().view(size_B, heads // groups, groups, width)
    scaling = options.get("scaling")
    scores_BHL = torch.einsum("bkge,bkle->bkgl", query_BKGE, key_BKLE.float()).reshape(size_B, heads, length)
    scores_BHL = scores_BHL * (width**-0.5 if scaling is None else scaling)
    position_L = torch.arange(length, device=last_B.device)
    seen_BL = position_L <= last_B[:, None]
    window = options.get("sliding_window")
    if window is not None:
        seen_BL = seen_BL & (position_L > last_B[:, None] - window)
    scores_BHL = scores_BHL.masked_fill(~seen_BL[:, None], -torch.inf)
    if mask is not None:
        row_BHL = mask[rows_B if mask.shape[0] > 1 else torch.zeros_like(rows_B), :, last_B, :length]
        scores_BHL = scores_BHL.masked_fill(~row_BHL, -torch.inf) if mask.dtype == torch.bool else scores_BHL + row_BHL
    sinks = options.get("s_aux")
    if sinks is not None:
        sinks_BH1 = sinks.float().view(1, heads, 1).expand(size_B, heads, 1)
        with_sinks: Tensor = torch.cat([scores_BHL, sinks_BH1], dim=-1).softmax(dim=-1)
        return with_sinks[..., :-1]
    weights_BHL: Tensor = scores_BHL.softmax(dim=-1)
    return weights_BHL


def install(model: PreTrainedModel) -> None:
    """Let `model` run sdpa through our listener; UsageError where its attention cannot be swapped."""
    AttentionInterface.register(IMPLEMENTATION, _attention)
    AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
    softcap = getattr(model.config, "attn_logit_softcapping", None)
    try:
        if softcap is not None:
            raise ValueError(f"it caps attention scores at {softcap}, which sdpa cannot")
        model.set_attn_implementation(IMPLEMENTATION)
    except ValueError as error:
        raise UsageError(
            f"the attention of {type(model).__name__} cannot be read: {error}",
            next="use weights that need no attention map: --set losses.sra.weights=uniform",
        ) from error

"""One row of one attention map, taken while the model runs its attention as always.

transformers looks a model's attention function up by name at each call. While somebody listens, the names lead
to ours, which call the function that was there and so change no output. From sdpa, the softmax row of the last
valid token is computed of query and key: no full map is made. A family that sdpa does not serve (capped scores,
GPT-OSS) runs its own eager function, and the row is copied from its map. No model or configuration is touched.

Shape legend for this file
    B documents    L tokens    H query heads    K key/value heads    G = H / K    E head width
"""

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from xkd_schemas.errors import UsageError
from xkd_trainer.models.architecture import backbone, evaluating, num_layers, tokens_of_any
from xkd_trainer.models.padding import Packing

UNIFORM: Final = "use weights that need no attention map: --set losses.sra.weights=uniform"

TINY: Final = torch.finfo(torch.float32).tiny

Attention = Callable[..., tuple[Tensor, Tensor | None]]


@dataclass
class LastRows:
    """Rows heard so far: (which, layer index; 0 is the first block) -> [B, H, L] float32, without gradient."""

    layers: frozenset[int]
    places: Mapping[str, Tensor]  # which row -> the position in each document of the token whose row it is, [B] int64
    packing: Packing | None = None  # where the documents lie, if a row has several
    sdpa: Attention = sdpa_attention_forward  # what the name led to before
    rows: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    several: set[int] = field(default_factory=set)
    """Layers that attended more than once, so that no row is the layer's."""
    wrong: dict[int, float] | None = None
    """Where it is asked for: how far a row times the values is from what the attention returned, by layer."""

    def keep(self, layer: int, row_of: Callable[[Tensor], Tensor], value_BKLE: Tensor, output_BLHE: Tensor) -> None:
        """Keep a block's rows, [B, H, L] of places [B]; values and output are those of the same call."""
        for which, position_B in self.places.items():
            place_B = position_B.to(output_BLHE.device)  # of several, the one that this block runs on
            if (which, layer) in self.rows:
                self.several.add(layer)
            self.rows[which, layer] = row_BHL = row_of(place_B).detach()
            if self.wrong is not None:
                value_BHLE = value_BKLE.repeat_interleave(row_BHL.shape[1] // value_BKLE.shape[1], dim=1).float()
                ours_BHE = torch.einsum("bhl,bhle->bhe", row_BHL, value_BHLE)
                theirs_BHE = output_BLHE[torch.arange(len(output_BLHE), device=place_B.device), place_B].float()
                self.wrong[layer] = float((ours_BHE - theirs_BHE).abs().max() / theirs_BHE.abs().max().clamp_min(TINY))


@contextlib.contextmanager
def listen(layers: frozenset[int], places: Mapping[str, Tensor], packing: Packing | None = None) -> Iterator[LastRows]:
    """Collect the attention rows of some tokens in some blocks from the forward passes inside the context."""
    heard = LastRows(layers=layers, places=places, packing=packing)
    with contextlib.ExitStack() as names:
        if layers:
            heard.sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
            for name in ("sdpa", "eager"):
                names.enter_context(_rename(name, partial(_attend, heard, name)))
        yield heard


@contextlib.contextmanager
def _rename(name: str, function: Attention) -> Iterator[None]:
    """Let a name lead to another function for a while; "eager" leads nowhere, which stands for the family's own."""
    before = ALL_ATTENTION_FUNCTIONS.get(name)
    ALL_ATTENTION_FUNCTIONS[name] = function
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS[name]
        if ALL_ATTENTION_FUNCTIONS.get(name) is not before:
            ALL_ATTENTION_FUNCTIONS[name] = before


def _attend(  # noqa: PLR0913 - as transformers calls it
    heard: LastRows, name: str, module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor,
    attention_mask: Tensor | None, **options: Any,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """What the name leads to; the row from query and key, or from the family's own map without dropout."""
    own: Attention = heard.sdpa if name == "sdpa" else sys.modules[type(module).__module__].eager_attention_forward
    call = partial(own, module, query, key, value, attention_mask)
    result = call(**options)
    layer = getattr(module, "layer_idx", None)
    if layer not in heard.layers:
        return result
    packing = heard.packing
    if name == "sdpa":
        row_of = partial(last_row, query, key, mask=attention_mask, options=options, packing=packing)
        heard.keep(layer, row_of, value, result[0])
        return result
    with torch.no_grad():
        output, map_BHLL = call(**{**options, "dropout": 0.0}) if options.get("dropout") else result
    assert map_BHLL is not None
    heard.keep(layer, partial(_row_of_map, map_BHLL.float(), packing), value, output)
    return result


def _row_of_map(map_BHLL: Tensor, packing: Packing | None, place_B: Tensor) -> Tensor:
    if packing is None:
        return map_BHLL[torch.arange(len(map_BHLL), device=place_B.device), :, place_B]
    return packing.own_columns(map_BHLL[packing.row_B, :, packing.start_B + place_B])


@torch.no_grad()
def last_row(
    query_BHLE: Tensor, key_BKLE: Tensor, last_B: Tensor, mask: Tensor | None, options: dict[str, Any],
    packing: Packing | None = None,
) -> Tensor:  # fmt: skip
    """Attention of one token of each document over all tokens, [B, H, L] float32, rows sum to 1.

    Queries and keys are those after position encoding, `last` is the token's position, `mask` what the attention
    function was given: None (causal), bool (True attends) or additive. Of the other arguments of the call, `scaling`,
    `sliding_window`, `position_bias` (added to the scores, [B or 1, H, L, L]) and `s_aux` (attention sinks) count.
    With `packing` queries, keys and masks are of packed rows; `last` and the result are of each document.
    """
    (size_R, heads, length, width), size_B = query_BHLE.shape, len(last_B)
    groups = heads // key_BKLE.shape[1]
    rows_B, at_B = torch.arange(size_B, device=last_B.device), last_B
    if packing is not None:
        rows_B, at_B = packing.row_B, packing.start_B + last_B
        key_BKLE = packing.unpack(key_BKLE.transpose(1, 2)).transpose(1, 2)
    own = (lambda row_BHL: row_BHL) if packing is None else packing.own_columns
    query_BKGE = query_BHLE[rows_B, :, at_B].float().view(size_B, heads // groups, groups, width)
    scaling = options.get("scaling")
    scores_BHL = torch.einsum("bkge,bkle->bkgl", query_BKGE, key_BKLE.float()).reshape(size_B, heads, length)
    scores_BHL = scores_BHL * (width**-0.5 if scaling is None else scaling)
    bias = options.get("position_bias")
    if bias is not None:
        scores_BHL = scores_BHL + own(bias.expand(size_R, -1, -1, -1)[rows_B, :, at_B, :length].float())
    position_L = torch.arange(length, device=last_B.device)
    seen_BL = position_L <= last_B[:, None]
    window = options.get("sliding_window")
    if window is not None:
        seen_BL = seen_BL & (position_L > last_B[:, None] - window)
    scores_BHL = scores_BHL.masked_fill(~seen_BL[:, None], -torch.inf)
    if mask is not None:
        row_BHL = own(mask[rows_B if mask.shape[0] > 1 else torch.zeros_like(rows_B), :, at_B, :length])
        scores_BHL = scores_BHL.masked_fill(~row_BHL, -torch.inf) if mask.dtype == torch.bool else scores_BHL + row_BHL
    sinks = options.get("s_aux")
    if sinks is not None:
        sinks_BH1 = sinks.float().view(1, heads, 1).expand(size_B, heads, 1)
        scores_BHL = torch.cat([scores_BHL, sinks_BH1], dim=-1)
    return scores_BHL.softmax(dim=-1)[..., :length]


@torch.no_grad()
def check_attention(model: PreTrainedModel) -> None:
    """Compare every block's row, times the values, with what its attention made of eight tokens.

    UsageError where they differ: the family does something to scores or maps that a row does not tell.
    """
    ids_BL = tokens_of_any(model)
    last_B = torch.full((1,), ids_BL.shape[1] - 1, device=ids_BL.device)
    with evaluating(model), listen(frozenset(range(num_layers(model))), {"last": last_B}) as heard:
        heard.wrong = {}
        backbone(model)(input_ids=ids_BL, use_cache=False)
    share = 1e-3 if model.dtype == torch.float32 else 0.05
    for layer, off in heard.wrong.items():
        if not off <= share:
            raise UsageError(
                f"the attention of {type(model).__name__} cannot be read: block {layer + 1} returns something else "
                f"than its map times its values (off by {off:.3g})",
                fix=UNIFORM,
            )

"""One forward pass of a causal language model, keeping just the states that somebody asked for.

Used on the teacher at capture and on the student in training, so both are measured the same way.

Shape legend for this file
    B documents    L tokens    D width    N positions    V vocabulary
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from xkd_schemas.errors import UsageError
from xkd_trainer.attention import listen
from xkd_trainer.signals import normalised_row


@dataclass(frozen=True, kw_only=True, slots=True)
class States:
    """What one forward pass left behind."""

    last_BLD: Tensor
    """Last hidden states, final-normed: the head applies directly."""
    layers: dict[int, Tensor]
    """Hugging Face index -> [B, L, D]; the last index is `last_BLD` itself."""
    attention_BL: Tensor | None
    """Last valid token's attention in the last block, heads summed, rows sum to 1; float32, no gradient."""
    attention_layers: Mapping[int, Tensor] = field(default_factory=dict)
    """Hugging Face index -> the same of other blocks."""

    def as_float32(self) -> "States":
        """The same in float32, which signals and losses compute in; itself where it is already."""
        if self.last_BLD.dtype == torch.float32:
            return self
        layers = {layer: states_BLD.float() for layer, states_BLD in self.layers.items()}
        return replace(self, last_BLD=self.last_BLD.float(), layers=layers)


def num_layers(model: PreTrainedModel) -> int:
    """Number of blocks."""
    return int(model.config.get_text_config().num_hidden_layers)


def blocks_of(model: PreTrainedModel) -> nn.ModuleList:
    """The list of the model's blocks; UsageError if no list of the configured length is found."""
    count = num_layers(model)
    for module in model.base_model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise UsageError(f"{type(model).__name__}: found no list of {count} blocks to read layers from")


@contextlib.contextmanager
def _hooked(model: PreTrainedModel, layers: Sequence[int], into: dict[int, Tensor]) -> Iterator[None]:
    blocks = blocks_of(model) if layers else nn.ModuleList()
    handles = []
    for layer in layers:

        def keep(_module: nn.Module, _inputs: Any, output: Any, layer: int = layer) -> None:
            into[layer] = output[0] if isinstance(output, tuple) else output

        handles.append(blocks[layer - 1].register_forward_hook(keep))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def run(
    model: PreTrainedModel,
    ids_BL: Tensor,
    valid_BL: Tensor,
    *,
    layers: Sequence[int] = (),
    attention: bool = False,
    attention_layers: Sequence[int] = (),
) -> States:
    """Run the base model without its head.

    Documents are padded on the right. A causal model's states never depend on what comes after, so
    no attention mask is passed and the fastest causal kernel is used; states at padding are garbage.

    Args:
        model: A causal language model; with `attention`, one that went through `attention.install`.
        ids_BL: Token ids, int64.
        valid_BL: Bool, True at tokens; each row is a run of True and then False.
        layers: Hugging Face indices 1..number of blocks.
        attention: Also keep the last token's attention row in the last block.
        attention_layers: Also keep that row in these blocks, Hugging Face indices; a model as for `attention`.

    Raises:
        UsageError: A layer does not exist, or the model showed no attention.
    """
    count = num_layers(model)
    for layer in (*layers, *attention_layers):
        if not 1 <= layer <= count:
            raise UsageError(f"layer {layer} does not exist: {type(model).__name__} has layers 1 to {count}")
    kept: dict[int, Tensor] = {}
    last_B = valid_BL.sum(dim=1).sub(1).clamp_min(0)
    inner = sorted({layer for layer in layers if layer != count})
    wanted = sorted({*attention_layers, count} if attention else {*attention_layers})
    with _hooked(model, inner, kept), listen(frozenset(layer - 1 for layer in wanted), last_B) as heard:
        output = model.base_model(input_ids=ids_BL, use_cache=False)
    last_BLD: Tensor = output.last_hidden_state
    if count in layers:
        kept[count] = last_BLD
    rows: dict[int, Tensor] = {}
    for layer in wanted:
        if layer - 1 not in heard.rows:
            which = "its last block" if layer == count else f"block {layer}"
            raise UsageError(
                f"{type(model).__name__} has no attention map in {which}",
                next="use weights that need none: --set losses.sra.weights=uniform",
            )
        rows[layer] = normalised_row(heard.rows[layer - 1], valid_BL)
    return States(
        last_BLD=last_BLD, layers=kept, attention_BL=rows[count] if attention else None, attention_layers=rows
    )

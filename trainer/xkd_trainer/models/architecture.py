"""Where a causal language model of any family keeps its parts, and its head as plain numbers.

Shape legend for this file
    L tokens    N positions    D width    V vocabulary
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from xkd_schemas.errors import UsageError

LAST_STATES_ONLY: Final = "use losses that read no inner layer: xkd-train losses lists what each reads"


def num_layers(model: PreTrainedModel) -> int:
    """Number of blocks."""
    return int(model.config.get_text_config().num_hidden_layers)


def backbone(model: PreTrainedModel) -> PreTrainedModel:
    """The model without its head; UsageError where there is none below it."""
    for inner in (model.base_model, model.get_decoder(), getattr(model, "model", None)):
        if isinstance(inner, PreTrainedModel) and inner is not model:
            return inner
    raise UsageError(f"{type(model).__name__}: found no model below its head")


def blocks_of(model: PreTrainedModel) -> nn.ModuleList:
    """The list of the text model's blocks, right below it or below one of its parts; UsageError where there is none.

    A list further down is some block's own, whatever its length.
    """
    count, decoder = num_layers(model), backbone(model).get_decoder()
    for name, module in decoder.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count and name.count(".") <= 1:
            return module
    raise UsageError(
        f"{type(model).__name__}: found no list of {count} blocks to read layers from", fix=LAST_STATES_ONLY
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Head:
    """Weights and the two odd steps some families add after the matrix product."""

    weight_VD: Tensor
    bias_V: Tensor | None = None
    scale: float = 1.0  # logits are multiplied by it (Granite, Cohere)
    softcap: float | None = None  # logits become softcap * tanh(logits / softcap) (Gemma 2 and later)

    def as_float32(self) -> "Head":
        """The same in float32, which losses compute in; the weights learn through it."""
        bias_V = None if self.bias_V is None else self.bias_V.float()
        return replace(self, weight_VD=self.weight_VD.float(), bias_V=bias_V)

    def __call__(self, hidden_ND: Tensor) -> Tensor:
        """Logits [N, V] in the weight's dtype; states of some families (Mamba) are float32 under any weights."""
        logits_NV = torch.nn.functional.linear(hidden_ND.to(self.weight_VD.dtype), self.weight_VD, self.bias_V)
        if self.scale != 1.0:
            logits_NV = logits_NV * self.scale
        if self.softcap is not None:
            logits_NV = self.softcap * torch.tanh(logits_NV / self.softcap)
        return logits_NV


def head_of(model: PreTrainedModel) -> Head:
    """The head of a causal language model, sharing its weights; UsageError where it is not linear."""
    linear = model.get_output_embeddings()
    if linear is None or not isinstance(getattr(linear, "weight", None), Tensor):
        raise UsageError(f"{type(model).__name__} has no linear language-model head")
    config = model.config.get_text_config()
    scale = float(getattr(config, "logit_scale", None) or 1.0)
    divisor = getattr(config, "logits_scaling", None)
    caps = (
        getattr(config, name, None) for name in ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
    )
    return Head(
        weight_VD=linear.weight,
        bias_V=getattr(linear, "bias", None),
        scale=scale / float(divisor) if divisor else scale,
        softcap=next((float(cap) for cap in caps if cap is not None), None),
    )


def tokens_of_any(model: PreTrainedModel) -> Tensor:
    """Eight token ids that every vocabulary has, [1, 8]."""
    rows = model.get_input_embeddings().weight.shape[0]
    ids_BL: Tensor = torch.arange(8, device=model.device)[None] % min(
        rows, int(model.config.get_text_config().vocab_size)
    )
    return ids_BL


@contextlib.contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode for a while: no dropout, and no random number drawn."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)

"""A language model's head as plain numbers: from final-normed states to logits.

Shape legend for this file
    N positions    D width    V vocabulary
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from xkd_schemas.errors import UsageError


@dataclass(frozen=True, kw_only=True, slots=True)
class Head:
    """Weights and the two odd steps some families add after the matrix product."""

    weight_VD: Tensor
    bias_V: Tensor | None = None
    scale: float = 1.0
    """Logits are multiplied by it (Granite, Cohere)."""
    softcap: float | None = None
    """Logits become softcap * tanh(logits / softcap) (Gemma 2 and later)."""

    def __call__(self, hidden_ND: Tensor) -> Tensor:
        """Logits [N, V] in the states' dtype."""
        logits_NV = torch.nn.functional.linear(hidden_ND, self.weight_VD, self.bias_V)
        if self.scale != 1.0:
            logits_NV = logits_NV * self.scale
        if self.softcap is not None:
            logits_NV = self.softcap * torch.tanh(logits_NV / self.softcap)
        return logits_NV


def head_of(model: PreTrainedModel) -> Head:
    """The head of a causal language model, sharing its weights.

    Raises:
        UsageError: The model has no linear head.
    """
    linear = model.get_output_embeddings()
    if linear is None or not isinstance(getattr(linear, "weight", None), Tensor):
        raise UsageError(f"{type(model).__name__} has no linear language-model head")
    config = model.config.get_text_config()
    scale = float(getattr(config, "logit_scale", None) or 1.0)
    divisor = getattr(config, "logits_scaling", None)
    return Head(
        weight_VD=linear.weight,
        bias_V=getattr(linear, "bias", None),
        scale=scale / float(divisor) if divisor else scale,
        softcap=getattr(config, "final_logit_softcapping", None),
    )


@torch.no_grad()
def check_head(model: PreTrainedModel) -> None:
    """Compare `head_of(model)` on the base model's states with the model's own logits on eight tokens.

    Raises:
        UsageError: They differ, so that logits made from cached states would not be the teacher's.
    """
    config = model.config.get_text_config()
    ids_BL = torch.arange(8, device=model.device)[None] % int(config.vocab_size)
    states_BLD = model.base_model(input_ids=ids_BL, use_cache=False).last_hidden_state
    ours, theirs = head_of(model)(states_BLD).float(), model(input_ids=ids_BL, use_cache=False).logits.float()
    worst = float((ours - theirs).abs().max())
    if not worst <= 0.02 * float(theirs.abs().max()):
        raise UsageError(
            f"{type(model).__name__}: its logits are no linear head on its last states (off by {worst:.3g}), "
            "so they cannot be rebuilt from a cache"
        )

"""A language model's head as plain numbers: from final-normed states to logits.

Shape legend for this file
    N positions    D width    V vocabulary
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from xkd_schemas.errors import UsageError
from xkd_trainer.models.architecture import backbone, evaluating, tokens_of_any
from xkd_trainer.models.forward import check_causal
from xkd_trainer.models.loading import short


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


def check_model(model: PreTrainedModel) -> None:
    """Two passes over eight tokens; UsageError where they show no causal model under a linear head."""
    with evaluating(model):
        check_head(model)
        check_causal(model)


@torch.no_grad()
def check_head(model: PreTrainedModel) -> None:
    """Compare `head_of(model)` on the base model's states with the model's own logits on eight tokens.

    UsageError where they differ, so that logits made from states would not be the model's; or where it cannot be run.
    """
    ids_BL, head = tokens_of_any(model), head_of(model)
    try:
        states_BLD = backbone(model)(input_ids=ids_BL, use_cache=False).last_hidden_state
        theirs = model(input_ids=ids_BL, use_cache=False).logits.float()
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError) as error:
        raise UsageError(
            f"{type(model).__name__} does not run on token ids alone, or its sizes do not fit together: {short(error)}"
        ) from error
    embedded = model.get_input_embeddings().weight.shape[1]
    if not states_BLD.shape[-1] == head.weight_VD.shape[1] == embedded:
        raise UsageError(
            f"{type(model).__name__}: its last states are {states_BLD.shape[-1]} wide, its head takes "
            f"{head.weight_VD.shape[1]} and its embeddings are {embedded}; all must be the same"
        )
    worst = float((head(states_BLD).float() - theirs).abs().max())
    share = 1e-4 if states_BLD.dtype == torch.float32 else 0.02
    if not worst <= share * float(theirs.abs().max()):
        raise UsageError(
            f"{type(model).__name__}: its logits are no linear head on its last states (off by {worst:.3g}), "
            "so they cannot be rebuilt from a cache"
        )

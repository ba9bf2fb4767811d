"""Where a causal language model of any family keeps its parts, and its head as plain numbers.

Shape legend for this file
    L tokens    N positions    D width    V vocabulary
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from xkd_schemas.errors import UsageError

FLOATS: Final = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
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
        weight_VD = self.weight_VD
        logits_NV = torch.nn.functional.linear(hidden_ND.to(weight_VD.device, weight_VD.dtype), weight_VD, self.bias_V)
        if self.scale != 1.0:
            logits_NV = logits_NV * self.scale
        if self.softcap is not None:
            logits_NV = self.softcap * torch.tanh(logits_NV / self.softcap)
        return logits_NV


def read_weights(module: nn.Module) -> dict[str, Tensor]:
    """`weight`, and `bias` if there is one, of a head or of embeddings, as plain numbers.

    Weights that accelerate keeps elsewhere are brought in, those of a quantised module are multiplied out; others are
    the module's own.
    """
    with contextlib.ExitStack() as moved:
        if hasattr(module, "_hf_hook"):
            from accelerate.utils import align_module_device

            moved.enter_context(align_module_device(module))
        found = {name: getattr(module, name, None) for name in ("weight", "bias")}
    return {name: t.dequantize() if is_packed(t) else t for name, t in found.items() if isinstance(t, Tensor)}


def is_packed(weight: Tensor) -> bool:
    """Whether a tensor is of a class of its own, as torchao's, that can be multiplied out to a plain one."""
    return type(weight).dequantize is not Tensor.dequantize


def is_tied(model: PreTrainedModel) -> bool:
    """Whether head and embeddings are one table, also where their weights are kept elsewhere."""
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    if head.weight is table.weight or not (hasattr(head, "_hf_hook") or hasattr(table, "_hf_hook")):
        return bool(head.weight is table.weight)
    names = {f"{name}.weight" for name, module in model.named_modules() if module is head or module is table}
    return any({target, source} == names for target, source in model.all_tied_weights_keys.items())


def input_device(model: PreTrainedModel) -> torch.device:
    """Where token ids go: of a model on several devices, where its embeddings run."""
    hook = getattr(model.get_input_embeddings(), "_hf_hook", None)
    device: Any = getattr(hook, "execution_device", None)
    return torch.device(model.device if device is None else device)


def head_of(model: PreTrainedModel) -> Head:
    """The head of a causal language model, sharing its weights; UsageError where it is not linear.

    The weights of a head that is quantised, or kept outside the device, are a copy.
    """
    linear = model.get_output_embeddings()
    if linear is None or not isinstance(getattr(linear, "weight", None), Tensor):
        raise UsageError(f"{type(model).__name__} has no linear language-model head")
    weights = read_weights(linear)
    if weights["weight"].ndim != 2 or weights["weight"].dtype not in FLOATS:
        raise UsageError(
            f"the head of {type(model).__name__} is quantised and cannot be read back as numbers",
            fix="use a checkpoint whose head is not quantised",
        )
    config = model.config.get_text_config()
    scale = float(getattr(config, "logit_scale", None) or 1.0)
    divisor = getattr(config, "logits_scaling", None)
    caps = (
        getattr(config, name, None) for name in ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
    )
    return Head(
        weight_VD=weights["weight"],
        bias_V=weights.get("bias"),
        scale=scale / float(divisor) if divisor else scale,
        softcap=next((float(cap) for cap in caps if cap is not None), None),
    )


def tokens_of_any(model: PreTrainedModel) -> Tensor:
    """Eight token ids that every vocabulary has, [1, 8]."""
    rows = model.get_input_embeddings().weight.shape[0]
    classes = min(rows, int(model.config.get_text_config().vocab_size))
    ids_BL: Tensor = torch.arange(8, device=input_device(model))[None] % classes
    return ids_BL


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while: no dropout, and no random number drawn."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)

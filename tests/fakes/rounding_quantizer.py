"""A way of quantising for transformers that needs no package: linear modules are rounded when they are read.

A checkpoint is marked with `{"quant_method": "rounding", "steps": N}` in its config.json. With `packed` the head is of
a class of its own, as torchao's: it multiplies, and `dequantize` gives plain numbers.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin


class Packed(Tensor):
    """Plain numbers that say they are not."""

    def dequantize(self) -> Tensor:  # type: ignore[override]
        return self.as_subclass(Tensor).clone()


class RoundingConfig(QuantizationConfigMixin):  # type: ignore[misc]
    def __init__(self, steps: int, packed: bool = False, **_given: Any) -> None:
        self.quant_method, self.steps, self.packed = "rounding", steps, packed


class Rounding(HfQuantizer):  # type: ignore[misc]
    is_trainable = False

    def is_serializable(self) -> bool:
        return False

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_given: Any) -> PreTrainedModel:
        for module in model.modules():
            if isinstance(module, nn.Linear):
                size = module.weight.abs().amax() / self.quantization_config.steps
                module.weight = nn.Parameter((module.weight.detach() / size).round() * size)
        if self.quantization_config.packed:
            head = model.get_output_embeddings()
            head.weight = nn.Parameter(head.weight.detach().as_subclass(Packed))
        return model


# Not with transformers' decorators: the collection of docstring examples imports this file once more.
AUTO_QUANTIZATION_CONFIG_MAPPING["rounding"] = RoundingConfig
AUTO_QUANTIZER_MAPPING["rounding"] = Rounding


def quantised(model: Path, folder: Path, **config: Any) -> Path:
    """A copy of a model folder that says it is quantised."""
    shutil.copytree(model, folder)
    known = json.loads((folder / "config.json").read_bytes())
    (folder / "config.json").write_text(json.dumps(known | {"quantization_config": config}))
    return folder

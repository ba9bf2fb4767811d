"""A model's sizes from its configuration alone: no weight is read, and none is made."""

import warnings
from dataclasses import dataclass

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from xkd_schemas.errors import InputMissing, UsageError
from xkd_trainer.models.architecture import head_of, num_layers
from xkd_trainer.models.loading import model_source, short


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """What a plan needs to know of a model."""

    architecture: str
    layers: int
    width: int
    classes: int
    """Rows of the head."""
    inner: int
    """Width of the feed-forward part."""
    weights: int
    """Numbers, a tied head counted once."""
    file_numbers: int
    """Numbers in head.safetensors and embeddings.safetensors."""
    number_bytes: int
    """Bytes of a number in the checkpoint, as its configuration says."""


def empty_model(name: str) -> PreTrainedModel:
    """The model on the meta device: shapes, no values.

    Raises:
        InputMissing: There is no such folder, file or hub name.
        UsageError: It is no causal language model that this transformers knows.
        Refused: It wants to run code of its own.
    """
    source, options = model_source(name, weights=False)
    try:
        with warnings.catch_warnings(), torch.device("meta"):
            warnings.simplefilter("ignore")
            config = AutoConfig.from_pretrained(source, **options)
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    except OSError as error:
        raise InputMissing(
            f"model {name} is neither a model folder here nor a name the hub answers for: {short(error)}",
            fix="give a folder with config.json, a .gguf file, or a hub name with a network",
        ) from error
    except (ValueError, KeyError, TypeError, RuntimeError, StrictDataclassError) as error:
        raise UsageError(
            f"model {name} is not a causal language model that transformers can make: {short(error)}"
        ) from error
    return model


def sizes_of(name: str) -> Sizes:
    """Sizes of the model of that name; raises as `empty_model`, and UsageError where it has no linear head."""
    model = empty_model(name)
    head = head_of(model)
    embeddings = model.get_input_embeddings().weight
    config = model.config.get_text_config()
    width = int(head.weight_VD.shape[1])
    numbers = head.weight_VD.numel() + (0 if head.bias_V is None else head.bias_V.numel())
    return Sizes(
        architecture=type(model).__name__,
        layers=num_layers(model),
        width=width,
        classes=int(head.weight_VD.shape[0]),
        inner=int(getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * width),
        weights=sum(parameter.numel() for parameter in model.parameters()),
        file_numbers=numbers + (0 if embeddings is head.weight_VD else embeddings.numel()),
        number_bytes=head.weight_VD.element_size(),
    )

"""Where a causal language model of any family keeps its parts.

Shape legend for this file
    L tokens
"""

import contextlib
from collections.abc import Iterator
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

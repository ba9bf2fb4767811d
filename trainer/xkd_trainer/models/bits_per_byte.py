"""Bits per byte: how well a model predicts the target text of documents, whatever its tokenizer.

Shape legend for this file
    B documents of a batch    L tokens of the longest    D width    N target tokens of a document    V classes
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, Final

import numpy as np
import torch
from transformers import PreTrainedModel

from xkd_schemas.documents import Document
from xkd_schemas.progress import Progress, tick
from xkd_schemas.tokens import CONTENT, Tokens, predictors
from xkd_trainer.models.architecture import head_of
from xkd_trainer.models.forward import run
from xkd_trainer.models.measures import target_log_probability
from xkd_trainer.models.padding import pad

BATCH: Final = 16  # documents of one forward pass


def make_batches(items: Sequence[Any]) -> Iterator[Sequence[Any]]:
    """BATCH items at a time; each time that the next are asked for, those before are done."""
    for first in range(0, len(items), BATCH):
        yield items[first : first + BATCH]
        tick(min(BATCH, len(items) - first))


@torch.no_grad()  # inference_mode would leave tensors in the model that training cannot use
def bits_per_byte(model: PreTrainedModel, pairs: Sequence[tuple[Document, Tokens]]) -> dict[str, float]:
    """-log2 p(target text) over its UTF-8 bytes; end tokens carry no text and are left out.

    Returns:
        bytes, bits_per_byte.
    """
    nats, size = 0.0, 0
    ordered = sorted(pairs, key=lambda pair: len(pair[1].ids))
    head = head_of(model)
    with Progress("bits per byte", len(pairs)):
        for batch in make_batches(ordered):
            ids_BL = pad([t.ids.astype(np.int64) for _, t in batch]).to(model.device)
            valid_BL = pad([np.ones(len(t.ids), np.bool_) for _, t in batch]).to(model.device)
            states_BLD = run(model, ids_BL, valid_BL).last_BLD
            for row, (document, tokens) in enumerate(batch):
                content = tokens.targets & (tokens.kinds == CONTENT)
                place_N = torch.from_numpy(predictors(content)).to(model.device)
                log_p_N = target_log_probability(head(states_BLD[row, place_N]), ids_BL[row, place_N + 1])
                nats -= float(log_p_N.double().sum())
                for s in (s for s in document.segments if s.target):
                    size += len(document.text[s.start : max(s.start, min(s.end, tokens.num_chars))].encode())
    return {"bytes": size, "bits_per_byte": nats / math.log(2) / max(1, size)}

"""The teacher's forward passes over one unit: which documents run together, and what is kept of each."""

import functools
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from pydantic import Field
from transformers import PreTrainedModel

from xkd_pipeline.capture.measure import ROWS, Reading, pad_readings, signals_of
from xkd_schemas.config import TeacherSection
from xkd_schemas.errors import BadData
from xkd_schemas.progress import tick
from xkd_schemas.signals import KINDS, Signal
from xkd_schemas.tokens import last_text
from xkd_trainer.models.architecture import head_of
from xkd_trainer.models.compute_dtype import this_device
from xkd_trainer.models.forward import run
from xkd_trainer.models.loading import load_tokenizer


class TeacherSettings(TeacherSection):
    """The teacher as it runs: model, template and dtype are settled, none is "auto"."""

    pad_multiple: int = 8
    device: str = Field(default_factory=this_device)
    """Where the workers run it; this process may have none of these."""


def batches_of(lengths: Sequence[int], batch_tokens: int, multiple: int) -> Iterator[list[int]]:
    """Documents with tokens, longest first, cut so that padded batches stay within `batch_tokens`.

    >>> list(batches_of([3, 0, 16, 15, 14], batch_tokens=32, multiple=8))
    [[2, 3], [4], [0]]
    """
    order = sorted((i for i, n in enumerate(lengths) if n > 0), key=lambda i: (-lengths[i], i))
    batch: list[int] = []
    width = 0
    for index in order:
        if (batch and (len(batch) + 1) * width > batch_tokens) or (batch and lengths[index] <= width // 2):
            yield batch
            batch = []
        if not batch:
            width = -(-lengths[index] // multiple) * multiple
        batch.append(index)
    if batch:
        yield batch


@functools.lru_cache(maxsize=2)
def classes_of(model: str) -> int:
    """One more than the highest id of its tokenizer: rows of a head beyond it are padding."""
    return int(max(load_tokenizer(model).get_vocab().values())) + 1


def reads_of(wanted: Sequence[Signal]) -> dict[str, Any]:
    """What the signals read of a pass: `layers`, `attention`, `attention_layers` and `text_layers` of `run`."""

    def layers(names: Collection[str]) -> list[int]:
        return sorted({s.layer for s in wanted if s.layer is not None and s.name in names})

    return {
        "layers": layers(KINDS.keys() - ROWS),
        "attention": any(s.name == "attention_last" for s in wanted),
        "attention_layers": layers({"attention"}),
        "text_layers": layers({"attention_text"}),
    }


@torch.inference_mode()
def capture(
    model: PreTrainedModel, readings: Sequence[Reading], wanted: Sequence[Signal], settings: TeacherSettings
) -> list[dict[str, Any]]:
    """Column name -> array for every reading; a reading without tokens gets empty ones.

    Raises:
        BadData: The teacher's states are not finite.
    """
    width = model.get_input_embeddings().weight.shape[1]
    empty = {s.column: np.zeros((0, width), np.uint16) if s.kind.wide else np.zeros(0) for s in wanted}
    captured: list[dict[str, Any]] = [empty] * len(readings)
    reads = reads_of(wanted)
    classes = classes_of(settings.model) if any(s.kind.drawn for s in wanted) else None
    head = head_of(model)
    lengths = [len(r.tokens.ids) for r in readings]
    for indices in batches_of(lengths, settings.batch_tokens, settings.pad_multiple):
        batch = [readings[i] for i in indices]
        ids_BL, valid_BL = (t.to(model.device) for t in pad_readings(batch, settings.pad_multiple))
        text_B = torch.tensor([last_text(reading.tokens.kinds) for reading in batch]).to(model.device)
        states = run(model, ids_BL, valid_BL, text_B=text_B, **reads)
        last = states.last_BLD
        if not (last.sum().isfinite() or last[valid_BL].isfinite().all()):  # the sum needs no copy
            raise BadData(
                f"the teacher's hidden states are not finite in {settings.dtype}", fix="capture with --dtype float32"
            )
        found = signals_of(batch, states, valid_BL, head, wanted, classes)
        for index, row in zip(indices, found, strict=True):
            captured[index] = row
        tick(len(readings) * sum(lengths[i] for i in indices) / sum(lengths))
    return captured

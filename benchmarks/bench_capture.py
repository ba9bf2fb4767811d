"""Capture of documents with every signal of mta, sra and dwa, against the teacher's bare forward passes.

Shape legend for this file
    B documents    L tokens
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.assets import Assets, assets_of
from benchmarks.measure import Options, interleaved
from benchmarks.rows import Result, cost
from xkd_pipeline.align import tokens_at
from xkd_pipeline.capture import TeacherSettings, batches_of, capture
from xkd_pipeline.measure import Reading, padded
from xkd_schemas.alignment import token_ranges
from xkd_schemas.table import Table
from xkd_schemas.teacher import Signal, signal_named
from xkd_trainer.models import dtype_named, load_model


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What is captured."""

    model: PreTrainedModel
    readings: Sequence[Reading]
    signals: Sequence[Signal]
    settings: TeacherSettings


def run(options: Options) -> list[Result]:
    """Documents spread over the whole cache, batched as at capture."""
    work = work_of(assets_of(options), documents=options.size(96, 6))
    base, head = bare(work, head=False), bare(work, head=True)
    calls: dict[str, Callable[[], object]] = {"capture": lambda: captured(work), "base": base, "head": head}
    seconds = interleaved(calls, 1 if options.quick else 3)
    tokens = sum(len(r.tokens.ids) for r in work.readings)
    what = f"capture of {len(work.readings)} documents, {tokens} tokens"
    return [
        cost(f"{what} / the same batches without head", seconds["capture"], seconds["base"], bar=1.25),
        cost(f"{what} / the same batches with head", seconds["capture"], seconds["head"]),
    ]


def work_of(assets: Assets, documents: int) -> Work:
    """Teacher, settings and signals of the cache's only teacher table, and some of its documents."""
    (folder,) = (assets.cache / "teachers").iterdir()
    teachers, table = Table(assets.cache, f"teachers/{folder.name}"), Table(assets.cache, "documents")
    spec = teachers.manifest.spec
    settings = TeacherSettings(model=str(assets.teacher), dtype=spec["dtype"], batch_tokens=spec["batch_tokens"])
    chosen = np.linspace(0, len(table) - 1, min(documents, len(table))).astype(int)
    readings = []
    for index in map(int, chosen):
        tokens, row = tokens_at(teachers[index]), table[index]
        ranges = {"word": token_ranges(tokens, row["words"]), "phrase": token_ranges(tokens, row["phrases"])}
        readings.append(Reading(tokens=tokens, ranges=ranges))
    model = load_model(settings.model, dtype=dtype_named(settings.dtype)).requires_grad_(False)
    signals = [signal_named(column) for column in spec["signals"]]
    return Work(model=model, readings=readings, signals=signals, settings=settings)


def captured(work: Work) -> object:
    """Ours."""
    return capture(work.model, work.readings, work.signals, work.settings)


def batches(work: Work) -> list[Tensor]:
    """Token ids [B, L] of every batch that capture runs."""
    lengths = [len(r.tokens.ids) for r in work.readings]
    together = batches_of(lengths, work.settings.batch_tokens, work.settings.pad_multiple)
    return [padded([work.readings[i] for i in batch], work.settings.pad_multiple)[0] for batch in together]


def bare(work: Work, *, head: bool) -> Callable[[], list[Tensor]]:
    """The forward passes alone, with the model's own attention; states, or with `head` the logits of all tokens."""
    ready = batches(work)

    @torch.inference_mode()
    def passes() -> list[Tensor]:
        work.model.set_attn_implementation("sdpa")
        if head:
            return [work.model(input_ids=ids_BL, use_cache=False).logits[0, 0] for ids_BL in ready]
        return [work.model.base_model(input_ids=ids_BL, use_cache=False).last_hidden_state[0, 0] for ids_BL in ready]

    return passes

"""The teacher's forward passes over one shard: which documents run together, what is kept of each, and how coded."""

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field
from transformers import PreTrainedModel

from xkd_pipeline.capture.measure import Reading, signals_of
from xkd_pipeline.capture.passes import Batch, passes
from xkd_schemas.cache.manifest import Commit
from xkd_schemas.codecs import CODECS, PLAIN, Bits, Encoded, numbers_of, squared_error
from xkd_schemas.config import TeacherSection
from xkd_schemas.errors import BadData
from xkd_schemas.progress import tick
from xkd_schemas.signals import Signal
from xkd_trainer.models.architecture import Head, head_of, input_device
from xkd_trainer.models.compute_dtype import this_device
from xkd_trainer.models.loading import load_tokenizer
from xkd_trainer.models.streaming import stream_of

KL_ROWS = 32  # states of a shard whose next-token distributions are compared before and after the codec


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


def empty_columns(wanted: Sequence[Signal], width: int) -> dict[str, Any]:
    """The columns of a document without tokens."""
    return {s.column: np.zeros((0, width), np.uint16) if s.kind.wide else np.zeros(0) for s in wanted}


@torch.inference_mode()
def capture(
    model: PreTrainedModel,
    readings: Sequence[Reading],
    wanted: Sequence[Signal],
    settings: TeacherSettings,
    scratch: Path | None = None,
) -> list[dict[str, Any]]:
    """Column name -> array for every reading; a reading without tokens gets empty ones.

    `scratch` is a folder for the states of a streamed model where memory has no room for them; None is the system's.

    Raises:
        BadData: The teacher's states are not finite.
    """
    empty = empty_columns(wanted, model.get_input_embeddings().weight.shape[1])
    captured: list[dict[str, Any]] = [empty if not len(r.tokens.ids) else {} for r in readings]
    classes = classes_of(settings.model) if any(s.kind.drawn for s in wanted) else None
    head, device = head_of(model), input_device(model)
    lengths = [len(r.tokens.ids) for r in readings]
    batches = [
        Batch(tuple(indices), [readings[i] for i in indices], settings.pad_multiple, device)
        for indices in batches_of(lengths, settings.batch_tokens, settings.pad_multiple)
    ]
    steps = len(readings) / (max(1, sum(lengths)) * len(stream_of(model) or (1,)))
    with contextlib.closing(passes(model, batches, wanted, scratch)) as found:
        for batch, states, asked, last in found:
            last_BLD = states.last_BLD  # the sum needs no copy
            if last and not (last_BLD.sum().isfinite() or last_BLD[batch.valid_BL].isfinite().all()):
                raise BadData(
                    f"the teacher's hidden states are not finite in {settings.dtype}",
                    fix="capture with --dtype float32",
                )
            rows = signals_of(batch.readings, states, batch.valid_BL, head, asked, classes)
            for index, row in zip(batch.indices, rows, strict=True):
                captured[index] |= row
            tick(steps * sum(lengths[i] for i in batch.indices))
    return captured


def encode_signals(
    captured: Sequence[Mapping[str, Any]], wanted: Sequence[Signal], codec: str, head: Head
) -> tuple[Encoded, dict[str, float]]:
    """All signals of a shard as columns, wide ones through `codec`, and sums of errors for the shard's record."""
    made, sums = Encoded({}, {}), dict[str, float]()
    for signal in wanted:
        rows = [row[signal.column] for row in captured]
        sums.update(_sum_capture_errors(signal.column, captured))
        if not signal.kind.wide or codec == PLAIN:
            made.columns[signal.column] = rows
            continue
        encoded = CODECS[codec].encode(signal.column, rows)
        again = [
            CODECS[codec].decode(signal.column, {name: c[i] for name, c in encoded.columns.items()}.__getitem__,
                                 encoded.metadata)
            for i in range(len(rows))
        ]  # fmt: skip
        made.columns.update(encoded.columns)
        made.metadata.update(encoded.metadata)
        lost, kept = squared_error(rows, again)
        sums.update({f"codec:{signal.column}:lost": lost, f"codec:{signal.column}:kept": kept})
        if signal.name == "hidden_last" and rows:
            sums.update(_measure_kl(rows, again, head))
    return made, sums


def _sum_capture_errors(column: str, captured: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Squared error that capture itself made and noted beside the column, and what it is a part of; {} for none."""
    noted = [row for row in captured if f"{column}.lost" in row]
    sums = {part: sum(float(np.sum(row[f"{column}.{part}"])) for row in noted) for part in ("lost", "kept")}
    return {f"codec:{column}:{part}": value for part, value in sums.items()} if noted else {}


def _measure_kl(rows: Sequence[Bits], again: Sequence[Bits], head: Head) -> dict[str, float]:
    """Sum over some states of KL(head of the exact state || head of the stored one), in nats, and their number."""
    exact_ND, stored_ND = (np.concatenate(list(side)) for side in (rows, again))
    chosen = np.unique(np.linspace(0, max(0, len(exact_ND) - 1), min(KL_ROWS, len(exact_ND))).astype(np.int64))
    states = (torch.from_numpy(numbers_of(bits[chosen])).to(head.weight_VD) for bits in (exact_ND, stored_ND))
    exact, stored = (head(values).float().log_softmax(-1) for values in states)
    kl = float((exact.exp() * (exact - stored)).sum())
    return {"codec:kl": kl, "codec:kl_n": float(len(chosen))}


def codec_error(commits: Sequence[Commit]) -> dict[str, float]:
    """Relative root-mean-square error of each coded signal, and the mean KL in nats of the last states.

    Empty where nothing was coded.
    """
    total: dict[str, float] = {}
    for commit in commits:
        for name, value in commit.sums.items():
            if name.startswith("codec:"):
                total[name.removeprefix("codec:")] = total.get(name.removeprefix("codec:"), 0.0) + value
    signals = sorted(name.removesuffix(":kept") for name in total if name.endswith(":kept"))
    found = {
        s: float(np.sqrt(total[f"{s}:lost"] / total[f"{s}:kept"])) if total[f"{s}:kept"] else 0.0 for s in signals
    }
    return found | ({"kl_nats": total["kl"] / max(1.0, total["kl_n"])} if "kl" in total else {})

"""Capture of all signals of the three methods, against a bare forward loop over the very same padded batches."""

from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedModel

from benchmarks.measure import Options, Result, cost, interleaved
from benchmarks.pair import fast_dtype, pair_of, wanted_signals
from xkd_pipeline.capture.capture import TeacherSettings, batches_of, capture
from xkd_pipeline.capture.measure import LOGIT_BYTES, Reading, pad_readings
from xkd_pipeline.capture.stage import read_rows
from xkd_pipeline.tables.shard import DocumentRows, encoder_for
from xkd_schemas.cache.table import Table
from xkd_schemas.tokens import predictors
from xkd_trainer.models.architecture import head_of, num_layers
from xkd_trainer.models.compute_dtype import dtype_named
from xkd_trainer.models.loading import load_model


def run(options: Options) -> list[Result]:
    """Against the base model; and the part of it that logits cannot do without."""
    pair = pair_of(options)
    settings = TeacherSettings(model=pair.teacher, dtype=fast_dtype(), template=pair.template)
    ours, bare = (load_model(pair.teacher, dtype=dtype_named(settings.dtype)) for _ in range(2))
    documents = Table(pair.cache, "documents")
    rows = [documents[i] for i in range(min(len(documents), options.size(32, 16)))]
    _, readings = read_rows(DocumentRows.of(rows), encoder_for(settings.model, settings))
    wanted = wanted_signals(num_layers(ours))
    seconds = interleaved(
        {
            "capture": lambda: capture(ours, readings, wanted, settings),
            "base": lambda: forward_loop(bare.base_model, readings, settings),
            "logits": logits_loop(bare, readings, settings),
        },
        2 if options.quick else 3,
    )
    what = f"capture of {len(readings)} documents for mta, sra, dwa"
    return [
        cost(f"{what} / bare forward loop", seconds["capture"], seconds["base"], bar=1.15),
        cost("of that, logits of the predicted positions / bare forward loop", seconds["logits"], seconds["base"]),
    ]


@torch.inference_mode()
def forward_loop(model: PreTrainedModel, readings: Sequence[Reading], settings: TeacherSettings) -> None:
    """What nobody can do without."""
    lengths = [len(r.tokens.ids) for r in readings]
    for indices in batches_of(lengths, settings.batch_tokens, settings.pad_multiple):
        ids_BL, _ = pad_readings([readings[i] for i in indices], settings.pad_multiple)
        model(input_ids=ids_BL, use_cache=False)


@torch.inference_mode()
def logits_loop(
    model: PreTrainedModel, readings: Sequence[Reading], settings: TeacherSettings
) -> Callable[[], object]:
    """What no capture of entropies and likeliest classes can do without, on states that are there already."""
    head = head_of(model)
    step = max(1, LOGIT_BYTES // (4 * head.weight_VD.shape[0]))
    found: list[torch.Tensor] = []
    for indices in batches_of([len(r.tokens.ids) for r in readings], settings.batch_tokens, settings.pad_multiple):
        batch = [readings[i] for i in indices]
        ids_BL, _ = pad_readings(batch, settings.pad_multiple)
        states_BLD = model.base_model(input_ids=ids_BL, use_cache=False).last_hidden_state
        places = [torch.from_numpy(predictors(r.tokens.targets)) for r in batch]
        found += torch.cat([states_BLD[i, at] for i, at in enumerate(places)]).split(step)

    @torch.inference_mode()
    def run_once() -> None:
        for states_ND in found:
            head(states_ND)

    return run_once

"""Stage 2: the teacher reads every document once, and what the losses need is kept."""

import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
import transformers
from transformers import PreTrainedModel

from xkd_pipeline.capture.artifacts import constants_of, export, std_of, sum_moments, weights_identity
from xkd_pipeline.capture.capture import TeacherSettings, capture, reads_of
from xkd_pipeline.capture.encode_signals import codec_error, encode_signals
from xkd_pipeline.capture.measure import Reading
from xkd_pipeline.tables.build import Built, build
from xkd_pipeline.tables.read_units import DocumentRows, documents_of, first_documents
from xkd_pipeline.tables.shard import Totals, write_shard
from xkd_pipeline.tables.token_columns import token_columns, token_counts, units_like
from xkd_pipeline.tables.writer import Store
from xkd_pipeline.workers.contract import AS_PLANNED, Make, Workers, local_paths
from xkd_schemas.cache.manifest import Commit, MadeDifferently, Spec
from xkd_schemas.cache.table import Table
from xkd_schemas.codecs import MOST_CLASSES
from xkd_schemas.errors import InputMissing, UsageError
from xkd_schemas.signals import TEACHERS_VERSION, Signal, signal_named, signals_schema, teacher_schema
from xkd_schemas.text.alignment import token_ranges
from xkd_schemas.text.batches import TokenBatch
from xkd_schemas.text.encode import Encoder, reading_of
from xkd_schemas.tokens import spans_read
from xkd_trainer.models.architecture import num_layers
from xkd_trainer.models.compute_dtype import dtype_named, processor_kind, warn_of_slow_dtype
from xkd_trainer.models.forward import rehearse
from xkd_trainer.models.head import check_model, head_of
from xkd_trainer.models.loading import check_model_name, load_model, load_tokenizer

CAPTURE_VERSION: Final = 5
"""Bump when the same settings would give other bytes."""
RUN_SETTINGS: Final = ("dtype", "codec", "batch_tokens", "pad_multiple", "threads", "device")
"""Fields of `TeacherSettings` that a table's spec names as they are."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherStage:
    """Runs the teacher over the documents of one unit."""

    root: Path
    folder: Path
    settings: TeacherSettings
    signals: tuple[str, ...]
    tokens: bool = True
    """False: only doc_id and the signals, beside a table that has the tokens."""

    def load(self) -> Make:
        """Load tokenizer and model once."""
        torch.set_num_threads(self.settings.threads)
        device = self.settings.device
        if device == "cuda" and not torch.cuda.is_available():
            raise InputMissing(
                f"no GPU visible on {socket.gethostname()}, but the plan says device=cuda",
                fix="give each worker one with --gpus-per-worker 1, or look at CUDA_VISIBLE_DEVICES there",
            )
        model = teacher_of(self.settings).to(device)
        encoder = encoder_of(self.settings)
        documents = Table(self.root, "documents")
        wanted = [signal_named(column) for column in self.signals]
        schema = teacher_schema(wanted, model.get_input_embeddings().weight.shape[1], self.settings.codec)
        schema = schema if self.tokens else signals_schema(schema)
        head, kind = head_of(model), processor_kind(device)

        def make(unit: int, care: MadeDifferently = AS_PLANNED) -> Commit:
            torch.set_num_threads(self.settings.threads)
            settings = self.settings
            if care.batch:
                torch.cuda.empty_cache()
                settings = settings.model_copy(update={"batch_tokens": care.batch})
            rows = documents_of(documents.shard(unit), care.lost)
            tokens, readings = _read(rows, encoder)
            captured = capture(model, readings, wanted, settings)
            stored, errors = encode_signals(captured, wanted, self.settings.codec, head)
            columns = {"doc_id": rows.doc_ids, **token_columns(tokens), **stored.columns}
            sums = sum_moments(tokens, captured, model) | errors
            totals = Totals(counts=token_counts(rows.block.texts, tokens), sums=sums)
            marked = schema.with_metadata({**schema.metadata, **stored.metadata})
            commit = write_shard(self.folder, unit, marked, columns, totals=totals)
            return commit.model_copy(update={"made_on": kind})

        return make

    def rows(self, unit: int) -> int:
        """Documents of a unit."""
        return Table(self.root, "documents").manifest.commits[unit].rows

    def batch(self, _unit: int) -> int:
        """Tokens of a forward pass; the last bits of a result depend on it."""
        return self.settings.batch_tokens

    def paths(self) -> tuple[Path, ...]:
        """The table's folder, the documents, and the model."""
        return local_paths(self.folder, self.root / "documents", self.settings.model)


KEPT_PRODUCTS: Final = ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")
"""How many compiled products torch keeps on a CPU, by shape; of its 1024 only those of one batch are used again."""

_loaded: dict[TeacherSettings, PreTrainedModel] = {}


def teacher_of(settings: TeacherSettings) -> PreTrainedModel:
    """The teacher, loaded once in this process."""
    if settings not in _loaded:
        for variable in KEPT_PRODUCTS:
            os.environ.setdefault(variable, "16")
        _loaded.clear()
        model = load_model(settings.model, dtype=dtype_named(settings.dtype))
        check_model(model)
        _loaded[settings] = model.requires_grad_(False)
    return _loaded[settings]


def forget_teacher() -> None:
    """Free the memory of the loaded teacher, which the workers load for themselves."""
    _loaded.clear()


def encoder_of(settings: TeacherSettings) -> Encoder:
    """How the teacher reads a document."""
    return Encoder(
        tokenizer=load_tokenizer(settings.model), template=settings.template, max_tokens=settings.max_tokens,
        enable_thinking=settings.enable_thinking,
    )  # fmt: skip


def _read(rows: DocumentRows, encoder: Encoder) -> tuple[TokenBatch, list[Reading]]:
    encoded = rows.encode(encoder)
    words, phrases = (
        token_ranges(encoded, [spans_read(s, n) for s, n in zip(spans, encoded.num_chars.tolist(), strict=True)])
        for spans in (rows.words, rows.phrases)
    )
    return encoded, [
        Reading(tokens=tokens, ranges={"word": word, "phrase": phrase})
        for tokens, word, phrase in zip(encoded, words, phrases, strict=True)
    ]


def teacher_layers(
    num_layers: int, word_layers: Sequence[int] = (), phrase_layers: Sequence[int] = ()
) -> tuple[tuple[int, str], ...]:
    """(layer, unit) pairs to read spans at; by default words at half of the depth, phrases at 3/4 and at the top.

    This is phi(l) = floor(l N_T / N_S) of MTA for the last three of four quarters of any student: the
    teacher's layers are chosen before a student is known.

    >>> teacher_layers(30)
    ((15, 'word'), (22, 'phrase'), (30, 'phrase'))

    Raises:
        UsageError: A layer does not exist.
    """
    words = tuple(word_layers) or (max(1, num_layers * 2 // 4),)
    phrases = tuple(phrase_layers) or (max(1, num_layers * 3 // 4), num_layers)
    for layer in (*words, *phrases):
        if not 1 <= layer <= num_layers:
            raise UsageError(
                f"layer {layer} does not exist: the teacher has layers 1 to {num_layers}",
                fix=f"name layers from 1 to {num_layers} with --word-layers and --phrase-layers",
            )
    return tuple(sorted({(layer, "word") for layer in words} | {(layer, "phrase") for layer in phrases}))


def teacher_settings(spec: Spec, model: str) -> TeacherSettings:
    """How the table with this spec was captured, by the same teacher at `model`; what an old spec lacks is as now."""
    how = {key: spec[key] for key in RUN_SETTINGS if key in spec}
    return TeacherSettings(model=model, **reading_of(spec["encoder"]), **how)


def teacher_spec(settings: TeacherSettings, columns: Sequence[str], documents: str) -> dict[str, Any]:
    """What the bytes of these columns depend on; `documents` is the root of the documents."""
    return {
        "schema": TEACHERS_VERSION,
        "capture": CAPTURE_VERSION,
        "documents": documents,
        "weights": weights_identity(settings.model),
        "encoder": encoder_of(settings).identity(),
        "signals": list(columns),
        **{key: getattr(settings, key) for key in RUN_SETTINGS},
        "transformers": ".".join(transformers.__version__.split(".")[:2]),
    }


def check_wanted(wanted: Sequence[Signal], model: PreTrainedModel, name: str) -> None:
    """Raise UsageError where the model cannot give a signal: layers, attention or classes that it does not have."""
    check_top(wanted, model, name)
    rehearse(model, **reads_of(wanted))


def check_top(wanted: Sequence[Signal], model: PreTrainedModel, name: str) -> None:
    """Raise UsageError where more classes are to be kept than there are, or drawn ones have too large numbers."""
    vocab_size = head_of(model).weight_VD.shape[0]
    for signal in wanted:
        flag = "samples" if signal.kind.drawn else "topk"
        if signal.top is not None and signal.top > vocab_size:
            raise UsageError(
                f"{flag} is {signal.top}, {name} has {vocab_size} classes", fix=f"--{flag} {vocab_size} at most"
            )
        if signal.kind.drawn and vocab_size > MOST_CLASSES:
            raise UsageError(
                f"{name} has {vocab_size} classes; {signal.column} can hold numbers of {MOST_CLASSES}",
                fix="use a loss that needs hidden_last, such as kl",
            )


def measured_constants(commits: Sequence[Commit], stds: Sequence[str]) -> dict[str, Any]:
    """Standard deviations over the corpus, and what codecs lost where they lost anything."""
    error = codec_error(commits)
    return {f"{name}_std": std_of(commits, name) for name in stds} | ({"codec_error": error} if error else {})


def make_teacher(
    root: Path,
    name: str,
    settings: TeacherSettings,
    signals: Callable[[int], Sequence[Signal]],
    workers: Workers,
) -> Built:
    """Run the teacher over the documents and make the table teachers/NAME.

    `signals` is asked once, with the teacher's number of layers.

    Raises:
        InputMissing: The documents table is not finished, or the model is not there.
        Mismatch: teachers/NAME was begun with other settings.
        UsageError: The model or the template cannot do what is asked.
    """
    documents = Table(root, "documents")
    check_model_name(settings.model)
    encoder_of(settings).check(first_documents(documents))
    model = teacher_of(settings)
    wanted = signals(num_layers(model))
    check_wanted(wanted, model, settings.model)
    columns = tuple(sorted({s.column for s in wanted}))
    spec = teacher_spec(settings, columns, documents.manifest.root)
    store = Store(root, f"teachers/{name}", spec, units_like(documents))
    warn_of_slow_dtype(settings.dtype, settings.device)
    stage = TeacherStage(root=root, folder=store.folder, settings=settings, signals=columns)
    constants = constants_of(model)

    def finish(commits: Sequence[Commit]) -> tuple[dict[str, Any], dict[str, str]]:
        files = export(teacher_of(settings), settings.model, store.folder)
        measured = measured_constants(commits, ("hidden", "embedding"))
        return {**constants, **measured, "template": settings.template}, files

    if workers.count:
        del model
        forget_teacher()
    return build(store, stage, lambda missing: iter(missing), workers, finish=finish)

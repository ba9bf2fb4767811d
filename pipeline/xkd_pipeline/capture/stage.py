"""Stage 2: the teacher reads every document once, and what the losses need is kept."""

import os
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
import transformers
from transformers import PreTrainedModel

from xkd_pipeline.capture.artifacts import constants_of, export, std_of, sum_moments, weights_identity
from xkd_pipeline.capture.capture import TeacherSettings, capture, codec_error, encode_signals
from xkd_pipeline.capture.measure import Reading
from xkd_pipeline.capture.passes import reads_of, why_streamed
from xkd_pipeline.tables.shard import (
    DocumentRows,
    documents_of,
    encoder_for,
    token_columns,
    token_counts,
    write_shard,
)
from xkd_pipeline.tables.writer import Built, Store, build, locked
from xkd_pipeline.workers.contract import Make, TableStage, Workers, local_paths
from xkd_schemas.cache.manifest import Commit, MadeDifferently, Plan, Spec, read_record, refuse_differences
from xkd_schemas.cache.table import Table, names_in
from xkd_schemas.codecs import MOST_CLASSES
from xkd_schemas.errors import BadData, InputMissing, UsageError
from xkd_schemas.signals import GEOMETRY_SPANS, TEACHERS_VERSION, Signal, signal_named, signals_schema, teacher_schema
from xkd_schemas.text.alignment import token_ranges
from xkd_schemas.text.encode import Encoder, reading_of
from xkd_schemas.tokens import TokenBatch, spans_read
from xkd_trainer.models.architecture import head_of, num_layers
from xkd_trainer.models.compute_dtype import dtype_named, processor_kind, this_device, warn_of_slow_dtype
from xkd_trainer.models.forward import check_ids, check_model, rehearse
from xkd_trainer.models.loading import check_model_name, load_model, place_weights, quantization_of
from xkd_trainer.models.streaming import check_steps, load_streamed, stream_of

CAPTURE_VERSION: Final = 5  # bump when the same settings would give other bytes
RUN_SETTINGS: Final = ("dtype", "codec", "batch_tokens", "pad_multiple", "threads", "device")
"""Fields of `TeacherSettings` that a table's spec names as they are."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherStage(TableStage):
    """Runs the teacher over the documents of one shard."""

    settings: TeacherSettings
    signals: tuple[str, ...]
    beside: str = ""  # name of a teacher whose table has the tokens: only doc_id and the signals are written

    def load(self) -> Make:
        """Load tokenizer and model once."""
        torch.set_num_threads(self.settings.threads)
        device = self.settings.device
        if device == "cuda" and not torch.cuda.is_available():
            raise InputMissing(
                f"no GPU visible on {socket.gethostname()}, but the plan says device=cuda",
                fix="give each worker one with --gpus-per-worker 1, or look at CUDA_VISIBLE_DEVICES there",
            )
        model = placed_teacher(self.settings)
        encoder = encoder_for(self.settings.model, self.settings)
        documents = Table(self.root, "documents")
        wanted = [signal_named(column) for column in self.signals]
        schema = teacher_schema(wanted, model.get_input_embeddings().weight.shape[1], self.settings.codec)
        shards: Sequence[Commit] = ()
        if self.beside:
            schema, shards = signals_schema(schema), Table(self.root, f"teachers/{self.beside}").manifest.commits
        head, kind = head_of(model), processor_kind(device)

        def make(unit: int, care: MadeDifferently) -> Commit:
            torch.set_num_threads(self.settings.threads)
            settings = self.settings
            if care.batch:
                torch.cuda.empty_cache()
                settings = settings.model_copy(update={"batch_tokens": care.batch})
            theirs = shards[unit].care if shards else None
            rows = documents_of(documents.shard(unit), {*care.lost, *(theirs.lost if theirs else ())})
            tokens, readings = read_rows(rows, encoder)
            check_ids(tokens.ids, encoder.tokenizer, len(model.get_input_embeddings().weight))
            captured = capture(model, readings, wanted, settings, self.folder)
            stored, errors = encode_signals(captured, wanted, self.settings.codec, head)
            columns = {"doc_id": rows.doc_ids, **token_columns(tokens), **stored.columns}
            sums = sum_moments(tokens, captured, model) | errors
            counts = token_counts(rows.block.texts, tokens)
            marked = schema.with_metadata({**schema.metadata, **stored.metadata})
            commit = write_shard(self.folder, unit, marked, columns, counts=counts)
            return commit.model_copy(update={"made_on": kind, "sums": sums})

        return make

    def batch(self, _unit: int) -> int:
        """Tokens of a forward pass; the last bits of a result depend on it."""
        return self.settings.batch_tokens

    def paths(self) -> tuple[Path, ...]:
        """The table's folder, the documents, and the model."""
        return TableStage.paths(self) + local_paths(self.settings.model)


KEPT_PRODUCTS: Final = ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")
"""How many compiled products torch keeps on a CPU, by shape; of its 1024 only those of one batch are used again."""

_loaded: dict[TeacherSettings, PreTrainedModel] = {}


def teacher_of(settings: TeacherSettings) -> PreTrainedModel:
    """The teacher, loaded once in this process."""
    if settings not in _loaded:
        for variable in KEPT_PRODUCTS:
            os.environ.setdefault(variable, "16")
        _loaded.clear()
        dtype = dtype_named(settings.dtype)
        device = settings.device if settings.device == this_device() else "cpu"
        if why_streamed(settings, dtype, device):
            model = load_streamed(settings.model, dtype=dtype, device=device)
        else:
            model = load_model(settings.model, dtype=dtype, placed=_placed(settings))
        check_model(model)
        if stream_of(model):
            check_steps(model)
        _loaded[settings] = model.requires_grad_(False)
    return _loaded[settings]


def placed_teacher(settings: TeacherSettings) -> PreTrainedModel:
    """The teacher on its device; a streamed one, or one on several devices, is there already."""
    model = teacher_of(settings)
    return model if stream_of(model) or getattr(model, "hf_device_map", None) else model.to(settings.device)


def _placed(settings: TeacherSettings) -> dict[str, Any]:
    """Several methods of quantisation have weights that cannot be moved once they are loaded."""
    placed = place_weights(settings.device_map, settings.max_memory)
    alone = not placed and settings.device == this_device() == "cuda" and quantization_of(settings.model)
    return {"device_map": {"": settings.device}} if alone else placed


def read_rows(rows: DocumentRows, encoder: Encoder) -> tuple[TokenBatch, list[Reading]]:
    """Documents as the teacher reads them: their tokens, and for each also its words and phrases."""
    encoded = encoder.encode_batch(rows.block)
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
    of_spans = any(signal_named(column).unit for column in columns)
    quantization = quantization_of(settings.model)
    return {
        "schema": TEACHERS_VERSION,
        "capture": CAPTURE_VERSION,
        "documents": documents,
        "weights": weights_identity(settings.model),
        **({"quantization": quantization} if quantization else {}),
        "encoder": encoder_for(settings.model, settings).identity(),
        "signals": list(columns),
        **{key: getattr(settings, key) for key in RUN_SETTINGS},
        **({"geometry_spans": GEOMETRY_SPANS} if settings.max_tokens > GEOMETRY_SPANS and of_spans else {}),
        "transformers": ".".join(transformers.__version__.split(".")[:2]),
    }


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


def make_teacher(
    root: Path,
    name: str,
    settings: TeacherSettings,
    signals: Callable[[int], Sequence[Signal]],
    workers: Workers,
    *,
    beside: str = "",
) -> Built:
    """Run the teacher over the documents and make the table teachers/NAME.

    With `beside`, the name of a teacher's finished table, make signals/NAME instead: shard k holds the documents of
    shard k of that table, in the same order, and nothing twice. Template and lengths must be those of that table.

    `signals` is asked once, with the teacher's number of layers.

    Raises:
        InputMissing: The documents table is not finished, or the model is not there.
        Mismatch: The table was begun with other settings, or `beside` is another teacher's.
        UsageError: The model or the template cannot do what is asked.
    """
    documents = Table(root, "documents")
    check_model_name(settings.model)
    encoder_for(settings.model, settings, documents)  # which it must be able to read
    wanted, constants = _check_teacher(settings, signals)
    columns = tuple(sorted({s.column for s in wanted}))
    spec = teacher_spec(settings, columns, documents.manifest.root)
    theirs: Sequence[Commit] = ()
    if beside:
        teacher = Table(root, f"teachers/{beside}")
        refuse_other_teacher(teacher, spec)
        theirs, constants = teacher.manifest.commits, {"teacher": beside}
        spec |= constants
    store = Store(root, f"signals/{name}" if beside else f"teachers/{name}", spec)
    warn_of_slow_dtype(settings.dtype, settings.device)
    stage = TeacherStage(root=root, folder=store.folder, settings=settings, signals=columns, beside=beside)
    if workers.count:
        _loaded.clear()  # the workers load it for themselves
        torch.cuda.empty_cache()
    watch, finish = partial(_refuse_lost_rows, stage, theirs), partial(_finish, stage, constants)
    return build(store, stage, list, workers, watch=watch, finish=finish)


def _check_teacher(
    settings: TeacherSettings, signals: Callable[[int], Sequence[Signal]]
) -> tuple[Sequence[Signal], dict[str, Any]]:
    """The signals that are wanted of a teacher, which was seen to give them, and its constants."""
    model = teacher_of(settings)
    wanted = signals(num_layers(model))
    check_top(wanted, model, settings.model)
    rehearse(model, **reads_of(wanted))
    return wanted, constants_of(model) | {"template": settings.template}


def _refuse_lost_rows(stage: TeacherStage, theirs: Sequence[Commit], commits: Sequence[Commit]) -> None:
    """BadData where a shard beside a teacher's, one of `theirs`, lacks a row that it has."""
    for one in commits if stage.beside else ():
        if more := set(one.care.lost if one.care else ()) - set(theirs[one.unit].unusable):
            raise BadData(
                f"shard {one.unit}: row {min(more)} kills its worker here, and teachers/{stage.beside} holds it",
                fix=f"delete {stage.folder}; measure these signals in a new teacher table, with another --name",
            )


def _finish(
    stage: TeacherStage, constants: Mapping[str, Any], commits: Sequence[Commit]
) -> tuple[dict[str, Any], dict[str, str]]:
    """The manifest's constants, and the digests of the files that are kept beside the shards."""
    files = {} if stage.beside else export(teacher_of(stage.settings), stage.settings.model, stage.folder)
    stds = ("hidden", "embedding") if not stage.beside else ("hidden",) if "hidden_last" in stage.signals else ()
    return {**constants, **measured_constants(commits, stds)}, files


def measured_constants(commits: Sequence[Commit], stds: Sequence[str]) -> dict[str, Any]:
    """What is measured over a whole table: standard deviations of these, and what its codec costs."""
    error = codec_error(commits)
    return {f"{name}_std": std_of(commits, name) for name in stds} | ({"codec_error": error} if error else {})


def refuse_other_teacher(table: Table, ours: Mapping[str, Any]) -> None:
    """Raise Mismatch where the table was made with other "weights" or another "encoder", if `ours` has them."""
    keys = [key for key in ("weights", "encoder") if key in ours]
    named, stored = ({key: spec[key] for key in keys} for spec in (ours, table.manifest.spec))
    refuse_differences(table.folder, named, stored, advice=f"name the model that {table.name} was made with")


def add_signals(
    root: Path,
    teacher: str,
    model: str,
    wanted: Callable[[int], Sequence[Signal]],
    changed: Mapping[str, Any],
    workers: Workers,
) -> Built | None:
    """Keep more signals of a teacher whose table is finished; None where the cache holds them all.

    `wanted` is asked once, with the teacher's number of layers; `changed` are settings that are not as for its table.
    """
    with locked(root):
        spec = Table(root, f"teachers/{teacher}").manifest.spec
        settings = teacher_settings(spec, model).model_copy(update=changed)
        name, left = missing_signals(root, teacher, wanted(num_layers(teacher_of(settings))))
        if not left:
            return None
        return make_teacher(root, name, settings, lambda _layers: left, workers, beside=teacher)


def missing_signals(root: Path, teacher: str, wanted: Sequence[Signal]) -> tuple[str, list[Signal]]:
    """The name of the table that gets them, and those of `wanted` that the cache does not hold of this teacher yet.

    A table that was begun for the same signals and is not finished is named again.
    """
    specs = {path.name: read_record(path / "plan.json", Plan).spec for path in sorted((root / "signals").glob("*"))}
    begun = {name: set(spec["signals"]) for name, spec in specs.items() if spec["teacher"] == teacher}
    stored = set(Table(root, f"teachers/{teacher}").manifest.spec["signals"])
    stored.update(*(begun.pop(name, ()) for name in names_in(root, "signals")))
    left = [signal for signal in sorted(set(wanted), key=lambda s: s.column) if signal.column not in stored]
    columns = {signal.column for signal in left}
    again = [name for name, signals in begun.items() if signals == columns]
    free = [name for n in range(1, 2 + len(specs)) if (name := f"{teacher[:120]}.{n}") not in specs]
    return [*again, *free][0], left

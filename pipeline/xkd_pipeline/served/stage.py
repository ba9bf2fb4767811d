"""A teacher's table made of rows that another program computed: what does not fit is refused, never cut."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch.nn import Module
from transformers import PreTrainedModel

from xkd_pipeline.capture.artifacts import constants_of, export, sizes_of, sum_moments, weights_identity
from xkd_pipeline.capture.capture import TeacherSettings, classes_of, empty_columns, encode_signals
from xkd_pipeline.capture.measure import bf16_bits
from xkd_pipeline.capture.stage import measured_constants, teacher_of
from xkd_pipeline.served.rows import Given, Rows, Served, parse
from xkd_pipeline.stages import plain_name
from xkd_pipeline.tables.shard import documents_of, encoder_for, token_columns, token_counts, write_shard
from xkd_pipeline.tables.writer import Built, Outcome, Store, build, locked
from xkd_pipeline.workers.contract import Make, TableStage, Workers
from xkd_schemas.cache.manifest import Commit, MadeDifferently
from xkd_schemas.cache.table import Table, check_name
from xkd_schemas.config import RunConfig, TeacherSection, dtype_name
from xkd_schemas.durable_files import save_folder, sha256_of
from xkd_schemas.errors import BadData, UsageError
from xkd_schemas.signals import TEACHERS_VERSION, Signal, signal_named, teacher_schema
from xkd_schemas.text.encode import Encoder
from xkd_schemas.text.templates import chosen_template
from xkd_schemas.tokens import OK, NotUsable, Tokens, kept_rows, predictors
from xkd_trainer.models.architecture import Head, backbone, head_of, num_layers
from xkd_trainer.models.forward import check_ids
from xkd_trainer.models.loading import load_tokenizer, stored_dtype

NORMS: Final = ("norm", "ln_f", "norm_f", "final_layer_norm", "final_layernorm")
IMPORT_VERSION: Final = 1  # bump when the same rows would give other bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportStage(TableStage):
    """Takes the rows of the documents of one shard, in this process."""

    given: Rows
    encoder: Encoder
    model: PreTrainedModel | None  # None where nobody has the teacher's weights here
    codec: str

    def load(self) -> Make:
        """Everything is loaded."""
        encoder, model, documents = self.encoder, self.model, Table(self.root, "documents")
        wanted, end = signals_of(self.given, model), padding_of(encoder.tokenizer)
        head = head_of(model) if model else Head(weight_VD=torch.empty(0, 1))
        width = head.weight_VD.shape[1]
        schema = teacher_schema(wanted, width, self.codec)

        def read(row: Given) -> Served:
            return read_served(row, self.given.layers, end, model)

        def make(unit: int, care: MadeDifferently) -> Commit:
            rows = documents_of(documents.shard(unit), care.lost)
            tokens = encoder.encode_batch(rows.block)
            if model:
                check_ids(tokens.ids, encoder.tokenizer, len(model.get_input_embeddings().weight))
            given = self.given.of_documents(rows.doc_ids, [one.ids for one in tokens], end, read)
            taken, rejects, statuses = [], [], list(tokens.statuses)
            for at, (one, served) in enumerate(zip(tokens, given, strict=True)):
                try:
                    taken.append(take(served, one, wanted) if one.status == OK else empty_columns(wanted, width))
                except NotUsable as why:
                    statuses[at] = why.reason
                    taken.append(empty_columns(wanted, width))
                    rejects.append({"doc_id": rows.doc_ids[at], "row": at, "reason": why.reason, "detail": str(why)})
            tokens = tokens.with_statuses(statuses)
            stored, errors = encode_signals(taken, wanted, self.codec, head)
            columns = {"doc_id": rows.doc_ids, **token_columns(tokens), **stored.columns}
            sums = (sum_moments(tokens, taken, model) if model else {}) | errors
            counts = token_counts(rows.block.texts, tokens)
            marked = schema.with_metadata({**schema.metadata, **stored.metadata})
            commit = write_shard(self.folder, unit, marked, columns, counts=counts, rejects=rejects)
            return commit.model_copy(update={"sums": sums})

        return make


def signals_of(rows: Rows, model: PreTrainedModel | None) -> list[Signal]:
    """The signals that the rows give; states of the last block become the last states."""
    found = [signal_named(column) for column in rows.columns]
    if model is None:
        return found
    return [Signal("hidden_last") if s == Signal("hidden", num_layers(model)) else s for s in found]


def padding_of(tokenizer: Any) -> int | None:
    """The token that other programs put behind a text to rate its last token."""
    found = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return None if found is None else int(found)


@torch.inference_mode()
def read_served(row: Given, layers: Sequence[int], end: int | None, model: PreTrainedModel | None) -> Served:
    """What a row says, with states as a capture has them: of the last block normed, and all in bfloat16."""
    served = parse(row, layers).without(end)
    columns = dict(served.columns)
    for layer in (one for one in layers if f"hidden@{one}" in columns):
        states_TD = torch.from_numpy(columns.pop(f"hidden@{layer}"))
        if not bool(states_TD.isfinite().all()):
            raise NotUsable("bad_values", f"hidden@{layer} is not finite")
        assert model is not None
        if states_TD.shape[-1] != model.get_input_embeddings().weight.shape[1]:
            raise NotUsable("bad_values", f"states of width {states_TD.shape[-1]} are none of this model")
        last = layer == num_layers(model)
        if last:
            norm = final_norm(model)
            states_TD = norm(states_TD.to(next(norm.parameters()).device, model.dtype))
        columns["hidden_last" if last else f"hidden@{layer}"] = bf16_bits(states_TD)
    return Served(ids=served.ids, columns=columns)


def final_norm(model: PreTrainedModel) -> torch.nn.Module:
    """The norm between the last block and the head."""
    decoder = backbone(model).get_decoder()
    found = [norm for name in NORMS if isinstance(norm := getattr(decoder, name, None), Module)]
    if not found:
        raise UsageError(
            f"{type(model).__name__}: found no norm behind its blocks", fix="capture it: xkd-cache teacher"
        )
    return found[0]


def take(served: Served | NotUsable, tokens: Tokens, wanted: Sequence[Signal]) -> dict[str, Any]:
    """The columns of one document; NotUsable where the row is not of exactly these tokens, or says no number."""
    if isinstance(served, NotUsable):
        raise served
    if not np.array_equal(served.ids, tokens.ids):
        raise NotUsable("other_tokens", _difference(served.ids.tolist(), tokens.ids.tolist()))
    if missing := [s.column for s in wanted if s.column not in served.columns]:
        raise NotUsable("bad_values", f"the first row has {', '.join(missing)}, this row has not")
    places: dict[str, Any] = {"N": predictors(tokens.targets), "R": kept_rows(tokens.targets), "T": slice(None)}
    found = {s.column: served.columns[s.column][places[s.kind.per]] for s in wanted}
    for signal in wanted:
        values = found[signal.column]
        low = signal.name == "target_logprob" and (values > 0).any()
        if values.dtype.kind == "f" and (low or not np.isfinite(values).all()):
            raise NotUsable("bad_values", f"{signal.column} of a target is above 0, missing or not finite")
    return found


def _difference(theirs: list[int], ours: list[int]) -> str:
    if len(theirs) != len(ours):
        return f"{len(theirs)} tokens, the tokenizer gives {len(ours)}"
    at = next(at for at, (a, b) in enumerate(zip(theirs, ours, strict=True)) if a != b)
    return f"token {at} is {theirs[at]}, the tokenizer gives {ours[at]}"


def model_settings(settings: TeacherSection) -> TeacherSettings:
    """How the model is loaded that heads and embeddings are taken of: as it is stored."""
    dtype = dtype_name(str(stored_dtype(settings.model)).removeprefix("torch."))
    return TeacherSettings(**settings.model_dump() | {"dtype": dtype})


def import_table(run: RunConfig, name: str, tokenizer: str, settings: TeacherSection, given: Rows) -> Built:
    """Make the table teachers/NAME of rows that were computed elsewhere; `settings` have no template "auto".

    Raises:
        InputMissing: The documents table is not finished.
        Mismatch: The table was begun with other rows or settings.
        BadData: More documents are refused than `documents.max_reject` allows.
    """
    root, most = Path(run.cache), run.documents.max_reject
    with locked(root):
        documents = Table(root, "documents")
        encoder = encoder_for(tokenizer, settings, documents)
        model = teacher_of(model_settings(settings)) if settings.model else None
        spec = {
            "schema": TEACHERS_VERSION,
            "documents": documents.manifest.root,
            "weights": weights_identity(settings.model) if settings.model else {"served": name},
            "encoder": encoder.identity(),
            "signals": sorted(signal.column for signal in signals_of(given, model)),
            "dtype": model_settings(settings).dtype if settings.model else "float32",
            "codec": settings.codec,
            "imported": {"version": IMPORT_VERSION, "rows": [sha256_of(path) for path in given.paths]},
        }
        store = Store(root, f"teachers/{name}", spec)
        stage = ImportStage(
            root=root, folder=store.folder, given=given, encoder=encoder, model=model, codec=settings.codec
        )

        def watch(commits: Sequence[Commit]) -> None:
            refused = [commit.rejects for commit in commits if commit.rejects]
            number = sum(one.rows for one in refused)
            if number > most * len(documents):
                first = (store.folder / "rejects" / refused[0].file).read_text().splitlines()[0]
                raise BadData(
                    f"{number} of {len(documents)} documents are refused, more than --max-reject "
                    f"{most:g} allows; the first: {first}; all: {store.folder / 'rejects'}",
                    kept="every finished shard",
                    fix="ask again for these documents, or --max-reject 1 leaves them out",
                )

        def finish(commits: Sequence[Commit]) -> tuple[dict[str, Any], dict[str, str]]:
            constants: dict[str, Any] = {"template": settings.template}
            if model is None:
                constants["vocab_size"] = classes_of(tokenizer)
                return constants, save_folder(store.folder / "tokenizer", encoder.tokenizer.save_pretrained)
            constants |= constants_of(model) | measured_constants(commits, ("hidden", "embedding"))
            return constants, export(model, settings.model, store.folder)

        return build(store, stage, list, Workers(), watch=watch, finish=finish)


def named_teacher(run: RunConfig) -> tuple[str, TeacherSection]:
    """The tokenizer of the teacher that a run file names, and how it reads documents, with its template settled."""
    tokenizer = run.served.tokenizer or run.teacher.model
    if not tokenizer:
        raise UsageError("the teacher's tokenizer is not named", fix="add --tokenizer FOLDER")
    template = chosen_template(run.teacher.template, load_tokenizer(tokenizer))
    return tokenizer, run.teacher.model_copy(update={"template": template})


def import_stage(run: RunConfig, rows: Sequence[str], layers: Sequence[int] = ()) -> Outcome:
    """Import what a run file and files of rows say, and what to tell of it.

    `layers` are those of states, in the order of the files; none is the last one.
    """
    root, (tokenizer, settings) = Path(run.cache), named_teacher(run)
    name = settings.name or plain_name(tokenizer)
    check_name(name, "--name")
    Table(root, "documents")
    layers = layers or (sizes_of(settings.model).layers if settings.model else 1,)
    found = Rows(rows, layers)
    if any(signal_named(column).kind.wide for column in found.columns) and not settings.model:
        raise UsageError("states are of no use without the teacher's head", fix="add --model FOLDER")
    built = import_table(run, name, tokenizer, settings, found)
    m = built.manifest
    refused = Counter[str]()
    for commit in m.commits:
        refused.update(commit.rejects.reasons if commit.rejects else {})
    values = {
        "table": m.table, "documents": m.rows, "tokens": m.count("tokens"), "signals": m.spec["signals"],
        "refused": dict(refused), "root": m.root,
    }  # fmt: skip
    size = sum(commit.size for commit in m.commits)
    line = f"{m.table}: {', '.join(m.spec['signals'])} of {m.rows} documents, {size / 1e6:.1f} MB"
    line += f"; refused: {', '.join(f'{n} {why}' for why, n in sorted(refused.items()))}" if refused else ""
    if not built.kept and len(found) > len(found.used):
        values["not_used"] = len(found) - len(found.used)
        line += f"; {values['not_used']} rows are of no document here"
    return Outcome(line=line, values=values)

"""Rows of a teacher table against the live teacher: does it still say what is stored?

Shape legend for this file
    N predictions    k stored classes of one    M largest logits of the live teacher
    R kept rows of a document    C some of its predictions    D width    V classes
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from xkd_pipeline.capture.artifacts import constants_of, weights_identity
from xkd_pipeline.capture.capture import TeacherSettings, capture
from xkd_pipeline.capture.measure import Reading
from xkd_pipeline.capture.stage import placed_teacher, read_rows, refuse_other_teacher, teacher_settings
from xkd_pipeline.maintain.verify_rows import Finding, open_table
from xkd_pipeline.tables.shard import DocumentRows, encoder_for
from xkd_schemas.cache.manifest import Spec
from xkd_schemas.cache.table import Row, Table, names_in
from xkd_schemas.codecs import numbers_of
from xkd_schemas.config import AUTO, dtype_name
from xkd_schemas.durable_files import sha256_of
from xkd_schemas.errors import BadData, UsageError
from xkd_schemas.signals import Signal, signal_named
from xkd_schemas.tokens import OK, kept_rows, predictors
from xkd_trainer.models.architecture import head_of
from xkd_trainer.models.compute_dtype import choose_dtype, this_device, warn_of_slow_dtype
from xkd_trainer.models.loading import quantization_of

TOLERANCE: Final = {"bf16": 0.06, "float16": 0.02, "float32": 0.06, "int32": 0.06}
"""Largest |a - b| / |b| of a row's column: bfloat16 results move by so much with batch mates and threads. Of classes,
how far their logits may be from those of the live teacher at the same rank, as a share of the largest one: of logits
that are as close as that, any may come first. (Of a bfloat16 teacher's 16 largest, a third have another rank.)"""
TIES: Final = 0.01  # share of a row's classes that may be further off


@dataclass(frozen=True, kw_only=True, slots=True)
class Price:
    """What a quantised teacher's states and next tokens are off by from those of the whole model."""

    method: str
    predictions: int
    kl_nats: float  # mean KL(next token of the whole model || of the stored states under the stored head)
    state_error: float  # root of the squared difference of the last states, as a share of those of the whole model

    @property
    def line(self) -> str:
        """For people."""
        return (
            f"quantisation ({self.method}) costs a KL of {self.kl_nats:.3g} nats for each of {self.predictions} "
            f"predictions and moves last states by {self.state_error:.2g}"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Recomputed:
    """What a comparison with the live teacher found."""

    bad: list[Finding]
    rows: int  # rows that were compared
    skipped: list[str]
    """Columns that cannot be compared: those of some codecs, and drawn classes, which a last bit of a logit may
    change for others."""
    dtype: str  # in which the live teacher ran
    differences: dict[str, float] = field(default_factory=dict, compare=False)
    """Largest relative difference of a row, by column, for columns of which no bit need be the same."""
    price: Price | None = None
    """Of quantisation, where the live teacher is the whole model that the stored one is quantised from."""

    @property
    def line(self) -> str:
        """How far live and stored numbers are apart, for people."""
        if self.price:
            return self.price.line
        if not any(self.differences.values()):
            return "the live teacher gives exactly the stored numbers"
        column = max(self.differences, key=self.differences.__getitem__)
        off = sum(value > 0 for value in self.differences.values())
        return (
            f"{off} of {len(self.differences)} columns differ within rounding, by "
            f"{self.differences[column]:.2g} at most ({column})"
        )


def recompute(root: Path, name: str, model: str, rows: int, dtype: str = AUTO) -> Recomputed:
    """Run the teacher over `rows` documents spread over the table and compare every column with what is stored.

    The columns of tables that were added beside it (signals/NAME) are compared as well. With `auto` it runs in the
    table's dtype, and in float32 where that is slow here. For the table of a quantised teacher `model` may be one that
    is not quantised: then the price of quantisation is measured, on the last states alone.

    Raises:
        Mismatch: `model` has other weights or another tokenizer than the stored table's teacher.
        UsageError: No last states are stored to measure the price on, or the two have other widths or classes.
    """
    table, documents = open_table(root, name), open_table(root, "documents")
    spec = table.manifest.spec
    settings = _live_settings(spec, model, dtype)
    encoder = encoder_for(model, settings)
    whole = "quantization" in spec and not quantization_of(model)
    weights = {} if whole else {"weights": weights_identity(model)}
    refuse_other_teacher(table, {"encoder": encoder.identity(), **weights})
    warn_of_slow_dtype(settings.dtype, settings.device)
    live_model = placed_teacher(settings)
    chosen = spread_rows([i for i in range(len(table)) if table[i]["status"] == OK], rows)
    if whole:
        _check_sizes(table, live_model)
        _, readings = read_rows(DocumentRows.of([documents[at] for at in chosen]), encoder)
        price = _price(table, [table[at] for at in chosen], readings, live_model, settings)
        return Recomputed(bad=[], rows=len(chosen), skipped=[], dtype=settings.dtype, price=price)
    others = [open_table(root, f"signals/{other}") for other in names_in(root, "signals")]
    beside = [other for other in others if f"teachers/{other.manifest.spec['teacher']}" == name]
    compared = [(one, _comparable(one)) for one in (table, *beside)]
    signals = {signal_named(column) for _, columns in compared for column in columns}
    live = _rank_signals(signals, head_of(live_model).weight_VD.shape[0])
    wanted = sorted(signals | set(live), key=lambda s: s.column)
    bad: list[Finding] = []
    differences: dict[str, float] = {}
    for at in chosen:
        _, (reading,) = read_rows(DocumentRows.of([documents[at]]), encoder)
        if not np.array_equal(reading.tokens.ids, table[at]["token_ids"]):
            bad.append(_finding_of(table, at, root, "the teacher's tokenizer gives other tokens"))
            continue
        (found,) = capture(live_model, [reading], wanted, settings)
        ranked = tuple(found[signal.column] for signal in live)
        if "imported" in spec:
            _normalize(found)
        for one, columns in compared:
            for column, codec in columns.items():
                reason, error = _compare(column, codec, found[column], one[at][column], ranked)
                if codec != "int32":
                    differences[column] = max(error, differences.get(column, 0.0))
                bad += [_finding_of(one, at, root, reason)] if reason else []
    skipped = [c for one, columns in compared for c in one.manifest.spec["signals"] if c not in columns]
    return Recomputed(bad=bad, rows=len(chosen), skipped=skipped, dtype=settings.dtype, differences=differences)


def _normalize(found: dict[str, Any]) -> None:
    """Make the live logits log-probabilities, as those are that were imported; their logsumexp is then 0."""
    if "logsumexp" in found:
        logits = [column for column in found if column.startswith("topk_logits")]
        found.update({column: found[column] - found["logsumexp"][:, None] for column in logits})
        found["logsumexp"] = np.zeros_like(found["logsumexp"])


def spread_rows(usable: Sequence[int], rows: int) -> list[int]:
    """At most so many of these rows, from the first to the last at even distances.

    >>> spread_rows([0, 1, 2, 4, 5, 6, 8], 4), spread_rows([3, 5], 9)
    ([0, 2, 5, 8], [3, 5])
    """
    return [usable[i] for i in np.linspace(0, len(usable) - 1, min(rows, len(usable))).round().astype(int)]


def _check_sizes(table: Table, model: PreTrainedModel) -> None:
    known, live = table.manifest.constants, constants_of(model)
    for name in ("hidden_size", "vocab_size"):
        if known[name] != live[name]:
            raise UsageError(
                f"{table.folder} is of a teacher with {name} {known[name]}, --model has {live[name]}",
                fix="name the model that the teacher was quantised from",
            )
    if "hidden_last" not in table.manifest.spec["signals"]:
        raise UsageError(
            f"{table.folder} holds no hidden_last, on which the price of quantisation is measured",
            fix="capture the quantised teacher with --for kl, or name itself with --model",
        )


def _price(
    table: Table, stored: Sequence[Row], readings: Sequence[Reading], model: PreTrainedModel, settings: TeacherSettings
) -> Price:
    """Both sides are bfloat16 states, and heads multiply them in float32."""
    file, known, head = table.folder / "head.safetensors", table.manifest.constants, head_of(model)
    if sha256_of(file) != table.manifest.files[file.name]:
        raise BadData(f"{file} does not match its digest", fix=f"xkd-cache verify {table.folder.parents[1]}")
    theirs = {name: values.to(head.weight_VD.device) for name, values in load_file(file).items()}
    own = {"scale": known["logit_scale"], "softcap": known["softcap"]}
    kept = replace(head, weight_VD=theirs["weight"], bias_V=theirs.get("bias"), **own)
    heads = [one.as_float32() for one in (head, kept)]
    kl = count = lost = size = 0.0
    for row, reading in zip(stored, readings, strict=True):
        (live,) = capture(model, [reading], [Signal("hidden_last")], settings)
        both_RD = [torch.from_numpy(numbers_of(np.asarray(side["hidden_last"]))) for side in (live, row)]
        lost += float((both_RD[1] - both_RD[0]).double().square().sum())
        size += float(both_RD[0].double().square().sum())
        predicts_R = np.isin(kept_rows(reading.tokens.targets), predictors(reading.tokens.targets))
        for chunks in zip(*(torch.split(states_RD[predicts_R], 256) for states_RD in both_RD), strict=True):
            live_CV, row_CV = (head(states_CD).log_softmax(-1) for head, states_CD in zip(heads, chunks, strict=True))
            kl += float((live_CV.exp() * (live_CV - row_CV)).sum())
        count += int(predicts_R.sum())
    return Price(
        method=table.manifest.spec["quantization"]["quant_method"], predictions=int(count),
        kl_nats=kl / max(1.0, count), state_error=(lost / size) ** 0.5 if size else 0.0,
    )  # fmt: skip


def _live_settings(spec: Spec, model: str, dtype: str) -> TeacherSettings:
    table = teacher_settings(spec, model)
    slow = dtype == AUTO and choose_dtype(table.dtype, this_device()).warning
    wanted = "float32" if slow else table.dtype if dtype == AUTO else dtype_name(dtype)
    return table.model_copy(update={"device": this_device(), "dtype": wanted})


def _rank_signals(wanted: Iterable[Signal], classes: int) -> tuple[Signal, ...]:
    """Ids and logits of twice as many classes as any of these signals keeps; none where none is about classes."""
    most = max((signal.top or 1 for signal in wanted if signal.kind.dtype == "int32"), default=0)
    many = min(classes, max(2 * most, 16))
    return (Signal("topk_ids", top=many), Signal("topk_logits", top=many)) if most else ()


def _comparable(table: Table) -> dict[str, str]:
    stored = {f.name: (f.metadata or {}).get(b"codec", b"").decode() for f in table.shard(0).schema}
    signals = (c for c in table.manifest.spec["signals"] if not signal_named(c).kind.drawn)
    return {c: stored[c] for c in signals if stored.get(c) in TOLERANCE}


def _compare(column: str, codec: str, ours: Any, stored: Any, ranked: tuple[Any, ...]) -> tuple[str, float]:
    """What is wrong with a row's column, or "", and its relative difference; that of classes is 0."""
    if np.shape(ours) != np.shape(stored):
        return f"{column} has shape {np.shape(stored)}, the live teacher gives {np.shape(ours)}", 0.0
    if codec == "int32":
        return _compare_classes(column, stored, *ranked), 0.0
    read = numbers_of if codec == "bf16" else np.asarray
    live_X, stored_X = (read(np.asarray(values)).astype(np.float64) for values in (ours, stored))
    error = float(np.linalg.norm(live_X - stored_X) / max(float(np.linalg.norm(stored_X)), 1e-6))
    return f"{column} differs by {error:.3f}, more than {TOLERANCE[codec]}" if error > TOLERANCE[codec] else "", error


def _compare_classes(column: str, stored: Any, ids_NM: Any, logits_NM: Any) -> str:
    stored_Nk = np.asarray(stored)
    stored_Nk = stored_Nk if stored_Nk.ndim == 2 else stored_Nk[:, None]
    same_NkM = stored_Nk[:, :, None] == ids_NM[:, None, :]
    logits_Nk = np.where(same_NkM, logits_NM[:, None, :], -np.inf).max(-1)
    off_Nk = np.abs(logits_Nk - logits_NM[:, : stored_Nk.shape[1]]) > TOLERANCE["int32"] * np.abs(logits_NM[:, :1])
    share = float(off_Nk.mean()) if off_Nk.size else 0.0
    return f"{column}: {100 * share:.1f} % are not what the live teacher ranks there" if share > TIES else ""


def _finding_of(table: Table, at: int, root: Path, reason: str) -> Finding:
    ends = np.cumsum([c.rows for c in table.manifest.commits])
    unit = int(np.searchsorted(ends, at, side="right"))
    file = table.path(unit).relative_to(root).as_posix()
    return Finding(table=table.name, unit=unit, file=file, reason=f"row {at} ({table[at]['doc_id']}): {reason}")

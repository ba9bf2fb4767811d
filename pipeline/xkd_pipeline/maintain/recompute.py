"""Rows of a teacher table against the live teacher: does it still say what is stored?

Shape legend for this file
    N predictions    k stored classes of one    M largest logits of the live teacher
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from xkd_pipeline.capture.artifacts import weights_identity
from xkd_pipeline.capture.capture import TeacherSettings, capture
from xkd_pipeline.capture.measure import Reading
from xkd_pipeline.capture.stage import refuse_other_teacher, teacher_of, teacher_settings
from xkd_pipeline.maintain.verify_rows import Finding, open_table
from xkd_pipeline.tables.shard import document_at, encoder_for
from xkd_schemas.cache.manifest import Spec
from xkd_schemas.cache.table import Row, Table, names_in
from xkd_schemas.codecs import numbers_of
from xkd_schemas.config import AUTO, dtype_name
from xkd_schemas.signals import Signal, signal_named
from xkd_schemas.text.alignment import token_ranges
from xkd_schemas.tokens import OK, spans_read
from xkd_trainer.models.architecture import head_of, on_device
from xkd_trainer.models.compute_dtype import choose_dtype, this_device, warn_of_slow_dtype

TOLERANCE: Final = {"bf16": 0.06, "float16": 0.02, "float32": 0.06, "int32": 0.06}
"""Largest |a - b| / |b| of a row's column: bfloat16 results move by so much with batch mates and threads. Of classes,
how far their logits may be from those of the live teacher at the same rank, as a share of the largest one: of logits
that are as close as that, any may come first. (Of a bfloat16 teacher's 16 largest, a third have another rank.)"""
TIES: Final = 0.01  # share of a row's classes that may be further off


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

    @property
    def line(self) -> str:
        """How far live and stored numbers are apart, for people."""
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
    table's dtype, and in float32 where that is slow here.

    Raises:
        Mismatch: `model` has other weights or another tokenizer than the stored table's teacher.
    """
    table, documents = open_table(root, name), open_table(root, "documents")
    spec = table.manifest.spec
    settings = _live_settings(spec, model, dtype)
    encoder = encoder_for(model, settings)
    refuse_other_teacher(table, {"weights": weights_identity(model), "encoder": encoder.identity()})
    warn_of_slow_dtype(settings.dtype, settings.device)
    live_model = on_device(teacher_of(settings), settings.device)
    usable = [i for i in range(len(table)) if table[i]["status"] == OK]
    chosen = [usable[i] for i in np.linspace(0, len(usable) - 1, min(rows, len(usable))).round().astype(int)]
    others = [open_table(root, f"signals/{other}") for other in names_in(root, "signals")]
    beside = [other for other in others if f"teachers/{other.manifest.spec['teacher']}" == name]
    compared = [(one, _comparable(one)) for one in (table, *beside)]
    signals = {signal_named(column) for _, columns in compared for column in columns}
    live = _rank_signals(signals, head_of(live_model).weight_VD.shape[0])
    wanted = sorted(signals | set(live), key=lambda s: s.column)
    bad: list[Finding] = []
    differences: dict[str, float] = {}
    for at in chosen:
        reading = _read_document(documents[at], encoder)
        if not np.array_equal(reading.tokens.ids, table[at]["token_ids"]):
            bad.append(_finding_of(table, at, root, "the teacher's tokenizer gives other tokens"))
            continue
        (found,) = capture(live_model, [reading], wanted, settings)
        ranked = tuple(found[signal.column] for signal in live)
        for one, columns in compared:
            for column, codec in columns.items():
                reason, error = _compare(column, codec, found[column], one[at][column], ranked)
                if codec != "int32":
                    differences[column] = max(error, differences.get(column, 0.0))
                bad += [_finding_of(one, at, root, reason)] if reason else []
    skipped = [c for one, columns in compared for c in one.manifest.spec["signals"] if c not in columns]
    return Recomputed(bad=bad, rows=len(chosen), skipped=skipped, dtype=settings.dtype, differences=differences)


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


def _read_document(row: Row, encoder: Any) -> Reading:
    tokens = encoder.encode_batch([document_at(row)])
    ranges = {
        unit: token_ranges(tokens, [spans_read(row[f"{unit}s"], tokens[0].num_chars)])[0]
        for unit in ("word", "phrase")
    }
    return Reading(tokens=tokens[0], ranges=ranges)


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

"""Rows of a teacher table against the live teacher: does it still say what is stored?"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from xkd_pipeline.capture import TeacherSettings, capture
from xkd_pipeline.documents import document_at
from xkd_pipeline.measure import Reading
from xkd_pipeline.teacher import encoder_of, teacher_of
from xkd_pipeline.teacher_files import weights_identity
from xkd_pipeline.verify import Bad, opened
from xkd_schemas.alignment_batch import token_ranges_all
from xkd_schemas.manifest import refuse_differences
from xkd_schemas.table import Row, Table, names_in
from xkd_schemas.teacher import signal_named
from xkd_schemas.tokens import OK, spans_read

TOLERANCE: Final = {"bf16": 0.06, "float16": 0.02, "float32": 0.06, "int32": 0.0}
"""Largest |a - b| / |b| of a row's column: bfloat16 results move by so much with batch mates and threads."""
TIES: Final = 0.05
"""Share of `argmax` that may differ: two logits may be closer to each other than the rounding."""


def recompute(root: Path, name: str, model: str, rows: int) -> tuple[list[Bad], int, list[str]]:
    """Run the teacher over `rows` documents spread over the table and compare every column with what is stored.

    The columns of tables that were added beside it (signals/NAME) are compared as well.

    Returns:
        What differs, how many rows were compared, and the columns that cannot be compared: those of some codecs, and
        drawn classes, which a last bit of a logit may change for others.

    Raises:
        Mismatch: `model` has other weights or another tokenizer than the stored table's teacher.
    """
    table, documents = opened(root, name), opened(root, "documents")
    spec = table.manifest.spec
    settings = TeacherSettings(
        model=model, template=spec["encoder"]["template"], max_tokens=spec["encoder"]["max_tokens"],
        dtype=spec["dtype"], batch_tokens=spec["batch_tokens"], pad_multiple=spec["pad_multiple"],
        threads=spec["threads"],
    )  # fmt: skip
    encoder = encoder_of(settings)
    ours = {"weights": weights_identity(model), "encoder": encoder.identity()}
    stored = {key: spec[key] for key in ours}
    refuse_differences(table.folder, ours, stored, advice="name the teacher that the table was made with")
    usable = [i for i in range(len(table)) if table[i]["status"] == OK]
    chosen = [usable[i] for i in np.linspace(0, len(usable) - 1, min(rows, len(usable))).round().astype(int)]
    others = [opened(root, f"signals/{other}") for other in names_in(root, "signals")]
    beside = [other for other in others if f"teachers/{other.manifest.spec['teacher']}" == name]
    compared = [_Compared(one) for one in (table, *beside)]
    wanted = sorted({signal_named(column) for one in compared for column in one.columns}, key=lambda s: s.column)
    bad = []
    for at in chosen:
        reading = _reading(documents[at], encoder)
        if not np.array_equal(reading.tokens.ids, table[at]["token_ids"]):
            bad.append(_bad(table, at, root, "the teacher's tokenizer gives other tokens"))
            continue
        (found,) = capture(teacher_of(settings), [reading], wanted, settings)
        for one in compared:
            bad += [_bad(one.table, at, root, reason) for reason in one.reasons(found, at)]
    return bad, len(chosen), [column for one in compared for column in one.skipped]


class _Compared:
    """A table and those of its columns that can be compared."""

    def __init__(self, table: Table) -> None:
        self.table = table
        self._stored_as = {f.name: (f.metadata or {}).get(b"codec", b"").decode() for f in table.shard(0).schema}
        signals: list[str] = table.manifest.spec["signals"]
        self.columns = [c for c in signals if self._stored_as.get(c) in TOLERANCE and not signal_named(c).kind.drawn]
        self.skipped = [c for c in signals if c not in self.columns]

    def reasons(self, found: Mapping[str, Any], at: int) -> Iterator[str]:
        """What of row `at` is not as it was found; nothing where the table does not reach so far."""
        if at < len(self.table):
            stored = self.table[at]
            reasons = (_differs(c, found[c], stored[c], self._stored_as[c]) for c in self.columns)
            yield from filter(None, reasons)


def _reading(row: Row, encoder: Any) -> Reading:
    tokens = encoder.encode_batch([document_at(row)])
    ranges = {
        unit: token_ranges_all(tokens, [spans_read(row[f"{unit}s"], tokens[0].num_chars)])[0]
        for unit in ("word", "phrase")
    }
    return Reading(tokens=tokens[0], ranges=ranges)


def _differs(column: str, ours: Any, stored: Any, codec: str) -> str:
    ours, stored = (_numbers(np.asarray(values), codec) for values in (ours, stored))
    if ours.shape != stored.shape:
        return f"{column} has shape {stored.shape}, the live teacher gives {ours.shape}"
    if codec == "int32":
        share = float((ours != stored).mean()) if ours.size else 0.0
        return f"{column} differs in {100 * share:.1f} % of its entries" if share > TIES else ""
    error = float(np.linalg.norm(ours - stored) / max(float(np.linalg.norm(stored)), 1e-6))
    return f"{column} differs by {error:.3f}, more than {TOLERANCE[codec]}" if error > TOLERANCE[codec] else ""


def _numbers(values: Any, codec: str) -> Any:
    if codec == "bf16":
        return (values.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return values if codec == "int32" else values.astype(np.float64)


def _bad(table: Table, at: int, root: Path, reason: str) -> Bad:
    ends = np.cumsum([c.rows for c in table.manifest.commits])
    unit = int(np.searchsorted(ends, at, side="right"))
    file = table.path(unit).relative_to(root).as_posix()
    return Bad(table=table.name, unit=unit, file=file, reason=f"row {at} ({table[at]['doc_id']}): {reason}")

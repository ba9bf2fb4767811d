"""Signals of a teacher that is in the cache already: a table beside its own, with the new columns and nothing twice.

Shard k of signals/NAME holds the documents of shard k of the teacher's table, in the same order, so a reader joins
them batch by batch (xkd_schemas.cache.joined).
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from xkd_pipeline.capture.capture import TeacherSettings
from xkd_pipeline.capture.stage import (
    TeacherStage,
    check_wanted,
    forget_teacher,
    measured_constants,
    teacher_of,
    teacher_settings,
    teacher_spec,
)
from xkd_pipeline.tables.build import Built, build
from xkd_pipeline.tables.token_columns import units_like
from xkd_pipeline.tables.writer import Store, locked
from xkd_pipeline.workers.contract import Workers
from xkd_schemas.cache.manifest import Commit, MadeDifferently, Plan, read_record, refuse_differences
from xkd_schemas.cache.table import Table, names_in
from xkd_schemas.errors import BadData, UsageError
from xkd_schemas.signals import Signal, signal_named
from xkd_trainer.models.architecture import num_layers
from xkd_trainer.models.compute_dtype import warn_of_slow_dtype

BOUND = ("weights", "encoder")
"""What of a spec must be that of the teacher's table."""


def make_signals(
    root: Path, name: str, teacher: str, settings: TeacherSettings, signals: Sequence[Signal], workers: Workers
) -> Built:
    """Run the teacher over the documents of its table, teachers/TEACHER, once more and make the table signals/NAME.

    Template and lengths in `settings` are those of the teacher's table.

    Raises:
        Mismatch: The settings name another teacher, or signals/NAME was begun with other settings.
        UsageError: The teacher cannot give what is asked for.
    """
    documents, teachers = Table(root, "documents"), Table(root, f"teachers/{teacher}")
    model = teacher_of(settings)
    check_wanted(signals, model, settings.model)
    columns = tuple(sorted({s.column for s in signals}))
    spec = teacher_spec(settings, columns, documents.manifest.root) | {"teacher": teacher}
    advice = f"name the model that {teachers.name} was made with"
    ours, theirs = ({key: one[key] for key in BOUND} for one in (spec, teachers.manifest.spec))
    refuse_differences(teachers.folder, ours, theirs, advice=advice)
    store = Store(root, f"signals/{name}", spec, units_like(documents))
    warn_of_slow_dtype(settings.dtype, settings.device)
    stage = TeacherStage(root=root, folder=store.folder, settings=settings, signals=columns, tokens=False)

    def finish(commits: Sequence[Commit]) -> tuple[dict[str, Any], dict[str, str]]:
        stds = ("hidden",) if "hidden_last" in columns else ()
        return {"teacher": teacher, **measured_constants(commits, stds)}, {}

    if workers.count:
        del model
        forget_teacher()
    units = teachers.manifest.commits
    store.known_cares |= {
        c.unit: MadeDifferently(lost=c.care.lost) for c in units if c.care is not None and c.care.lost
    }

    def watch(commits: Sequence[Commit]) -> None:
        for one in commits:
            more = set(one.care.lost if one.care else ()) - set(units[one.unit].unusable)
            if more:
                raise BadData(
                    f"unit {one.unit}: row {min(more)} kills its worker here, and {teachers.name} holds it",
                    fix=f"delete {store.folder}; measure these signals in a new teacher table, with another --name",
                )

    return build(store, stage, lambda missing: iter(missing), workers, watch=watch, finish=finish)


def add_signals(
    root: Path, teacher: str, model: str, wanted: Callable[[int], Sequence[Signal]], codec: str, workers: Workers
) -> Built | None:
    """Keep more signals of a teacher whose table is finished; None where the cache holds them all.

    `wanted` is asked once, with the teacher's number of layers; codec "" is that of the teacher's table.
    """
    with locked(root):
        spec = Table(root, f"teachers/{teacher}").manifest.spec
        settings = teacher_settings(spec, model)
        settings = settings.model_copy(update={"codec": codec or settings.codec})
        name, left = missing_signals(root, teacher, wanted(num_layers(teacher_of(settings))))
        if not left:
            return None
        return make_signals(root, name, teacher, settings, left, workers)


def missing_signals(root: Path, teacher: str, wanted: Sequence[Signal]) -> tuple[str, list[Signal]]:
    """The name of the table that gets them, and those of `wanted` that the cache does not hold of this teacher yet.

    A table that was begun for the same signals and is not finished is named again.
    """
    held = set(Table(root, f"teachers/{teacher}").manifest.spec["signals"])
    sealed = set(names_in(root, "signals"))
    begun: dict[str, set[str]] = {}
    folder = root / "signals"
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        spec = read_record(path / "plan.json", Plan).spec
        if spec["teacher"] == teacher and path.name in sealed:
            held |= set(spec["signals"])
        elif spec["teacher"] == teacher:
            begun[path.name] = set(spec["signals"])
    left = [signal for signal in sorted(set(wanted), key=lambda s: s.column) if signal.column not in held]
    columns = {signal.column for signal in left}
    for name, signals in begun.items():
        if signals == columns:
            return name, left
    numbers = range(1, 2 + len(list(folder.glob("*"))))
    return next(name for n in numbers if not (folder / (name := f"{teacher[:120]}.{n}")).exists()), left


def signals_named(columns: Sequence[str]) -> list[Signal]:
    """Signals by the names of their columns.

    Raises:
        UsageError: One is not known, or none is named.
    """
    if not columns:
        raise UsageError("no signal is named", fix="e.g. --signals hidden_last,topk_ids#64,topk_logits#64")
    return [signal_named(column) for column in columns]

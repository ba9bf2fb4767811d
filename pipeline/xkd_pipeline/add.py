"""More documents in a finished cache: the new ones are read, then teachers and students go on over them.

No byte of a shard that is there is touched (xkd_schemas.additions says where the new ones lie). Each table is sealed
anew when its own addition is finished, so at any time a student reads what its table was made from.
"""

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from xkd_pipeline.align import StudentSettings, make_students
from xkd_pipeline.build import Built
from xkd_pipeline.documents import Limits, corpus_spec, make_documents
from xkd_pipeline.prompts import limit_of
from xkd_pipeline.run import Workers
from xkd_pipeline.signals_table import Beside, make_signals
from xkd_pipeline.spans import ParserSettings
from xkd_pipeline.store import locked
from xkd_pipeline.teacher import make_teacher, teacher_settings
from xkd_pipeline.teacher_files import weights_identity
from xkd_schemas.additions import plans_of
from xkd_schemas.corpus import Source
from xkd_schemas.encode import reading_of
from xkd_schemas.errors import BadData, InputMissing, UsageError
from xkd_schemas.manifest import Manifest, Plan, Spec, differences
from xkd_schemas.table import Table, names_in
from xkd_schemas.teacher import signal_named

KINDS = ("teachers", "signals", "students")


@dataclass(frozen=True, kw_only=True, slots=True)
class Added:
    """What was added, and what is to be typed for the rest."""

    built: dict[str, Built] = field(default_factory=dict)
    """By table, in the order in which they were made."""
    commands: list[str] = field(default_factory=list)
    """For tables whose teacher's weights were not given."""


def take_in(
    root: Path,
    sources: Sequence[Source],
    more: "More",
    models: Sequence[str],
    workers: Workers,
    echo: Callable[[str], None],
) -> Added:
    """Add `sources`, which may be none, then let the tables go on over them; `echo` is told of each table.

    Repeating the call goes on where it was stopped, and does nothing where all is done.
    """
    models_by_table(root, models)  # refuses a model that is no teacher of this cache before anything is begun
    with locked(root):
        made = {}
        if sources:
            made["documents"] = add_documents(root, sources, more, workers)
            echo(line_of(made["documents"]))
        added = go_on(root, models, workers, echo)
    return Added(built=made | added.built, commands=added.commands)


@dataclass(frozen=True, kw_only=True, slots=True)
class More:
    """How new documents are read."""

    parser: ParserSettings | None = None
    """None: that of the first documents, as far as their plan tells."""
    max_reject: float = 0.01
    """Share of the new rows that may be unusable."""


def add_documents(root: Path, sources: Sequence[Source], more: More, workers: Workers) -> Built:
    """Read and parse `sources` behind the documents that are there; nothing where that was done already.

    Raises:
        UsageError: One of the sources is in the cache already.
        Mismatch: The parser is not that of the first documents, or an addition of something else is not finished.
    """
    plans = plans_of(Table(root, "documents").folder)
    behind = _behind(plans, corpus_spec(sources))
    spec = behind.spec
    limits = Limits(
        rows_per_shard=spec["rows_per_shard"], max_chars=spec["max_chars"], max_reject=more.max_reject,
        prompts=limit_of(spec),
    )  # fmt: skip
    return make_documents(root, sources, more.parser or parser_of(spec), limits, workers, behind=behind)


def _behind(plans: Sequence[Plan], new: list[dict[str, Any]]) -> Plan:
    """The plan that `new` comes behind: the last one, or the one before the addition that already is `new`."""
    corpora = [plan.spec["corpus"] for plan in plans]
    for before, after in zip(plans, corpora[1:], strict=False):
        if after == [*before.spec["corpus"], *new]:
            return before
    there = {source["sha256"] for source in corpora[-1]}
    twice = [source["name"] for source in new if source["sha256"] in there]
    if twice:
        raise UsageError(f"{', '.join(twice)} is in this cache already", kept="the cache", next="name new files only")
    return plans[-1]


def parser_of(spec: Spec) -> ParserSettings:
    """The settings of the parser that a documents plan names; its model by the name that the model gives itself."""
    parser = spec["parser"]
    return ParserSettings(
        kind=parser["kind"],
        model=parser["pipeline"].split(" ")[0],
        max_words=int(parser["max_words"]),
        drop_contained=parser["drop_contained"] == "True",
    )


def parser_with(root: Path, spacy_model: str | None, parser_model: str | None) -> ParserSettings | None:
    """The settings in the documents' plan with the models that are named; None where none is."""
    named = {"model": spacy_model, "benepar_model": parser_model}
    named = {key: value for key, value in named.items() if value is not None}
    return parser_of(plans_of(root / "documents")[-1].spec).model_copy(update=named) if named else None


def student_settings(folder: Path, spec: Spec) -> StudentSettings:
    """How the students' table in `folder` was made, from its own copy of the tokenizer."""
    encoder = spec["encoder"]
    return StudentSettings(tokenizer=str(folder / "tokenizer"), **reading_of(encoder))


def go_on(root: Path, models: Sequence[str], workers: Workers, echo: Callable[[str], None]) -> Added:
    """Let every finished table go on over documents that were added since: teachers, their signals, students.

    A table whose teacher is not among `models` is left as it is, and the command for it is returned.

    Raises:
        UsageError: A model is none of the cache's teachers.
    """
    added = Added()
    given = models_by_table(root, models)
    for table in unfinished(root):
        echo(f"{table}: begun and never finished, so nothing is added to it")
    for name in names_in(root, "teachers"):
        beside = [f"signals/{n}" for n in names_in(root, "signals") if _teacher(root, n) == name]
        for table in (f"teachers/{name}", *beside):
            if not _is_late(root, table):
                continue
            if name not in given:
                added.commands.append(f"xkd-cache add {shlex.quote(str(root))} --model PATH_OF_{name}")
                break
            added.built[table] = _went_on(root, table, given[name], workers, echo)
    for name in names_in(root, "students"):
        if _is_late(root, f"students/{name}"):
            added.built[f"students/{name}"] = _went_on(root, f"students/{name}", "", workers, echo)
    return added


def unfinished(root: Path) -> list[str]:
    """Tables below the documents that have a plan and no manifest."""
    begun = {kind: {path.parent.name for path in (root / kind).glob("*/plan.json")} for kind in KINDS}
    return [f"{kind}/{name}" for kind in KINDS for name in sorted(begun[kind] - set(names_in(root, kind)))]


def _went_on(root: Path, table: str, model: str, workers: Workers, echo: Callable[[str], None]) -> Built:
    """Finish an addition that was begun, then add what came since."""
    begun = len(plans_of(root / table)[-1].units) > len(Table(root, table).manifest.commits)
    built = again(root, table, model, workers) if begun else None
    if _is_late(root, table):
        built = again(root, table, model, workers, more=True)
    assert built is not None
    echo(line_of(built))
    return built


def again(root: Path, table: str, model: str, workers: Workers, *, more: bool = False) -> Built:
    """Run the stage that makes a table that was begun, with the settings in its plan.

    Args:
        root: The cache, locked by the caller.
        table: teachers/NAME, signals/NAME or students/NAME.
        model: The teacher; not used for a student.
        workers: Where units are made.
        more: Go on over what was added to the tables that it is made from.
    """
    kind, _, name = table.partition("/")
    folder = root / table
    spec = plans_of(folder)[-1].spec
    if kind == "students":
        return make_students(root, name, spec["teacher"], student_settings(folder, spec), workers, more=more)
    signals = [signal_named(column) for column in spec["signals"]]
    settings = teacher_settings(spec, model)
    if kind == "signals":
        beside = Beside(name=name, teacher=spec["teacher"], settings=settings, signals=tuple(signals))
        return make_signals(root, beside, workers, more=more)
    return make_teacher(root, name, settings, lambda _layers: signals, workers, more=more)


def models_by_table(root: Path, models: Sequence[str]) -> dict[str, str]:
    """Name of each teacher's table to the one of `models` whose weights it was made with."""
    found: dict[str, str] = {}
    specs = {path.name: _spec(root, path) for path in sorted((root / "teachers").glob("*")) if path.is_dir()}
    for model in models:
        weights = weights_identity(model)
        fitting = [name for name, spec in specs.items() if spec["weights"] == weights]
        if not fitting:
            listed = "; ".join(
                f"{name} differs in {', '.join(key for key, _, _ in differences(weights, spec['weights']))}"
                for name, spec in specs.items()
            )
            raise UsageError(
                f"{model} is none of the teachers of {root} ({listed or 'it has none'})",
                next=f"xkd-cache teacher {root} --model {model} makes a new table",
            )
        found |= dict.fromkeys(fitting, model)
    return found


def _spec(root: Path, folder: Path) -> Spec:
    try:
        return plans_of(folder)[-1].spec
    except (BadData, InputMissing):  # both say the same
        return Table(root, folder.relative_to(root).as_posix()).manifest.spec


def _teacher(root: Path, signals: str) -> str:
    return str(plans_of(root / "signals" / signals)[-1].spec["teacher"])


def _is_late(root: Path, table: str) -> bool:
    """Whether a finished table is behind the tables that it is made from, or an addition to it is not finished."""
    ours = Table(root, table).manifest
    on = "documents" if table.startswith("teachers/") else f"teachers/{ours.spec['teacher']}"
    return len(ours.commits) < len(Table(root, on).manifest.commits)


def line_of(built: Built) -> str:
    """What was made of a table, for people."""
    m: Manifest = built.manifest
    rows = sum(c.rows for c in m.commits[m.starts[-1] :]) if m.earlier else 0
    made = f"{built.made} shards made" if built.made else "nothing left to make"
    return f"{m.table}: {m.rows} documents, {rows} of them added last; {made}, {built.kept} kept as they are"

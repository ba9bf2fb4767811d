"""Repair a cache: make its bad units again and no other, from the cache, the corpus and the teacher."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xkd_pipeline.align import StudentSettings, make_students
from xkd_pipeline.build import Built
from xkd_pipeline.card import write_root_files
from xkd_pipeline.columns import units_like
from xkd_pipeline.corpus import Source, digest_of, open_source
from xkd_pipeline.documents import remake_documents, units_of
from xkd_pipeline.run import Workers
from xkd_pipeline.signals_table import Beside, make_signals
from xkd_pipeline.spans import ParserSettings
from xkd_pipeline.store import locked
from xkd_pipeline.teacher import make_teacher, teacher_settings
from xkd_pipeline.teacher_files import weights_identity
from xkd_pipeline.verify import Bad, units_by_table, verify
from xkd_schemas.encode import reading_of
from xkd_schemas.errors import BadData, InputMissing, UsageError, XkdError
from xkd_schemas.files import inside, replace
from xkd_schemas.manifest import Manifest, Plan, Spec, differences, read_record, to_json
from xkd_schemas.table import Table
from xkd_schemas.teacher import signal_named


@dataclass(frozen=True, kw_only=True, slots=True)
class Means:
    """What units are made from that the cache does not hold."""

    corpus: tuple[str, ...] = ()
    """Files or data sets that were read; only those of the bad units are needed."""
    models: tuple[str, ...] = ()
    """Teachers."""
    parser: ParserSettings | None = None
    """None: as far as the documents' plan tells."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Repaired:
    """What a repair found and did."""

    bad: list[Bad]
    made: dict[str, int]
    """Table -> units made again; 0 where only other files were put right."""
    commands: list[str]
    """What to type, after the CAPITALS are replaced, for what needs the corpus or the teacher."""
    left: list[Bad]
    """What is still wrong."""


def repair(root: Path, workers: Workers, means: Means | None = None) -> Repaired:
    """Quarantine the bad units and make them again, each table with the settings in its plan.

    A student's table is made from its own tokenizer/ and the two tables before it; documents need the corpus, and a
    teacher's tables the teacher. Where these are not given, the command is returned that makes the same units.

    Raises:
        UsageError: A model or corpus was given that this cache was not made from.
    """
    given = means or Means()
    bad = verify(root, "full")
    made: dict[str, int] = {}
    commands: list[str] = []
    models = models_by_table(root, given.models) if given.models else {}
    for name, units in units_by_table(bad).items():
        if name.startswith("students/") and commands:
            continue  # what it is made from is bad
        try:
            with locked(root):
                made[name] = _mended(root, name, units, workers, (given, models))
        except _Wanting as wanting:
            commands.append(wanting.command)
        except XkdError as error:
            if given.corpus or given.models:
                raise
            verify_it = f"xkd-cache verify {shlex.quote(str(root))}"
            known = error.next if error.next.startswith("xkd-cache ") and "repair" not in error.next else verify_it
            commands.append(f"{known}   # {name}: {error.what}")
    if bad and not commands:
        with locked(root):
            write_root_files(root)
    return Repaired(bad=bad, made=made, commands=commands, left=verify(root, "full") if bad else [])


class _Wanting(Exception):
    """Something is needed that was not given."""

    def __init__(self, command: str) -> None:
        self.command = command


def _mended(root: Path, name: str, units: set[int], workers: Workers, given: tuple[Means, dict[str, str]]) -> int:
    """Make the bad units of a table; how many were made."""
    means, models = given
    cache = shlex.quote(str(root))
    plan = _plan(root, name, means.corpus)
    if name == "documents":
        if not means.corpus and units:
            raise _wanting_corpus(root, {plan.units[unit].source for unit in units if unit < len(plan.units)})
        parser = means.parser or parser_of(plan.spec)
        return remake_documents(root, plan, sources_of(plan, means.corpus), parser, workers).made
    teacher = name.partition("/")[2] if name.startswith("teachers/") else str(plan.spec["teacher"])
    if not name.startswith("students/") and teacher not in models:
        raise _Wanting(f"xkd-cache repair {cache} --model PATH_OF_{teacher}")
    return again(root, name, models.get(teacher, ""), workers).made


def _wanting_corpus(root: Path, names: set[str]) -> _Wanting:
    paths = " ".join(f"--corpus {shlex.quote(f'PATH_OF/{name}')}" for name in sorted(names))
    return _Wanting(f"xkd-cache repair {shlex.quote(str(root))} {paths}")


def sources_of(plan: Plan, names: Sequence[str]) -> list[tuple[int, Source]]:
    """(first unit, source) of each source of a documents plan that is named, in order.

    Raises:
        UsageError: One of them is not what the documents were made from.
    """
    opened = _opened(plan.spec["corpus"], names)
    return [(first, s) for first, s in zip(_places(plan), opened, strict=True) if s is not None]


def _opened(corpus: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[Source | None]:
    """The source of each entry of a plan's corpus; None where it is not named."""
    digests = {digest_of(name): name for name in names}
    strange = [name for digest, name in digests.items() if digest not in {entry["sha256"] for entry in corpus}]
    if strange:
        raise UsageError(
            f"{', '.join(strange)}: not what the documents were made from, or changed since",
            next=f"name the files as they were then: {', '.join(entry['name'] for entry in corpus)}",
        )
    return [
        open_source(digests[entry["sha256"]], form=entry["form"], columns=entry["columns"])
        if entry["sha256"] in digests
        else None
        for entry in corpus
    ]


def _places(plan: Plan) -> list[int]:
    """First unit of each source of a documents plan; a source without rows has none, and the next one's is given."""
    starts = [number for number, unit in enumerate(plan.units) if unit.first == 0]
    places, at = [], 0
    for entry in plan.spec["corpus"]:
        here = starts[at] if at < len(starts) else len(plan.units)
        places.append(here)
        at += here < len(plan.units) and plan.units[here].source == entry["name"]
    return places


def _is_of(plan: Plan, root: Path, name: str) -> bool:
    """Whether the plan is that of the table's manifest; True where there is no whole one."""
    try:
        manifest = Table(root, name).manifest
    except (BadData, InputMissing):
        return True
    return plan.spec == manifest.spec and len(plan.units) == len(manifest.commits)


def _plan(root: Path, name: str, corpus: Sequence[str]) -> Plan:
    """The table's plan; one that cannot be read, or is not the manifest's, is written again from that and a corpus."""
    folder = inside(root, *name.split("/"))
    try:
        plan = read_record(folder / "plan.json", Plan)
        if _is_of(plan, root, name):
            return plan
        raise BadData(f"{folder / 'plan.json'} is not the plan that the manifest was made from")
    except (BadData, InputMissing):
        manifest = Table(root, name).manifest
        if name == "documents":
            sources = [source for source in _opened(manifest.spec["corpus"], corpus) if source is not None]
            if len(sources) < len(manifest.spec["corpus"]):
                raise _wanting_corpus(root, {entry["name"] for entry in manifest.spec["corpus"]}) from None
            units = units_of(sources, manifest.spec["rows_per_shard"])
        else:
            units = units_like(Table(root, "documents"))
        plan = Plan(table=name, spec=manifest.spec, units=units)
        replace(folder / "plan.json", to_json(plan))
        return plan


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
    if not named:
        return None
    return parser_of(read_record(root / "documents" / "plan.json", Plan).spec).model_copy(update=named)


def again(root: Path, table: str, model: str, workers: Workers) -> Built:
    """Run the stage that makes a table that was begun, with the settings in its plan.

    Args:
        root: The cache, locked by the caller.
        table: teachers/NAME, signals/NAME or students/NAME.
        model: The teacher; not used for a student.
        workers: Where units are made.
    """
    kind, _, name = table.partition("/")
    folder = root / table
    spec = read_record(folder / "plan.json", Plan).spec
    if kind == "students":
        settings = StudentSettings(tokenizer=str(folder / "tokenizer"), **reading_of(spec["encoder"]))
        return make_students(root, name, spec["teacher"], settings, workers)
    signals = [signal_named(column) for column in spec["signals"]]
    captured = teacher_settings(spec, model)
    if kind == "signals":
        beside = Beside(name=name, teacher=spec["teacher"], settings=captured, signals=tuple(signals))
        return make_signals(root, beside, workers)
    return make_teacher(root, name, captured, lambda _layers: signals, workers)


def models_by_table(root: Path, models: Sequence[str]) -> dict[str, str]:
    """Name of each teacher's table to the one of `models` whose weights it was made with."""
    found: dict[str, str] = {}
    specs = {path.name: _spec(path) for path in sorted((root / "teachers").glob("*")) if path.is_dir()}
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


def _spec(folder: Path) -> Spec:
    try:
        return read_record(folder / "plan.json", Plan).spec
    except (BadData, InputMissing):  # both say the same
        return read_record(folder / "manifest.json", Manifest).spec

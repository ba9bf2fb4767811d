"""Repair a cache: make its bad units again and no other, from the cache, the corpus and the teacher."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from xkd_pipeline.alignment import make_students
from xkd_pipeline.capture.artifacts import weights_identity
from xkd_pipeline.capture.stage import make_teacher, teacher_settings
from xkd_pipeline.maintain.verify import verify
from xkd_pipeline.maintain.verify_rows import Finding
from xkd_pipeline.parsing.stage import make_documents
from xkd_pipeline.tables.build import Built
from xkd_pipeline.tables.dataset_card import write_root_files
from xkd_pipeline.tables.writer import locked, quarantine
from xkd_pipeline.workers.contract import Workers
from xkd_schemas.cache.manifest import Manifest, Plan, Spec, differences, read_record
from xkd_schemas.config import DocumentsSection, StudentSection
from xkd_schemas.corpus.sources import Source, digest_of, open_source
from xkd_schemas.errors import BadData, InputMissing, UsageError, XkdError
from xkd_schemas.signals import signal_named
from xkd_schemas.text.encode import reading_of


@dataclass(frozen=True, kw_only=True, slots=True)
class RepairInputs:
    """What units are made from that the cache does not hold."""

    corpus: tuple[str, ...] = ()
    """Files or data sets that were read; all of them are needed where the documents are bad."""
    models: tuple[str, ...] = ()
    """Teachers."""
    parser: dict[str, Any] = field(default_factory=dict)
    """Fields of [documents] that the plan of the documents does not tell: where the files of the parser are."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Repaired:
    """What a repair found and did."""

    bad: list[Finding]
    made: dict[str, int]
    """Table -> units made again; 0 where only other files were put right."""
    commands: list[str]
    """What to type, after the CAPITALS are replaced, for what needs the corpus or the teacher."""
    left: list[Finding]
    """What is still wrong."""


def repair(root: Path, workers: Workers, inputs: RepairInputs | None = None) -> Repaired:
    """Quarantine the bad units and run the stages with the settings of their tables: they make what is missing.

    A student's table is made from its own tokenizer/ and the two tables before it; documents need the corpus, and a
    teacher's tables the teacher. Where these are not given, the command is returned that makes the same units.

    Raises:
        UsageError: A model or corpus was given that this cache was not made from.
    """
    given = inputs or RepairInputs()
    bad = verify(root, "full")
    made: dict[str, int] = {}
    commands: list[str] = []
    models = models_by_table(root, given.models) if given.models else {}
    for name in dict.fromkeys(one.table for one in bad if one.table):
        if name.startswith("students/") and commands:
            continue  # what it is made from is bad
        try:
            with locked(root):
                made[name] = _remake_table(root, name, workers, (given, models))
        except _InputNeeded as needed:
            commands.append(needed.command)
        except XkdError as error:
            if given.corpus or given.models:
                raise
            verify_it = f"xkd-cache verify {shlex.quote(str(root))}"
            known = error.fix if error.fix.startswith("xkd-cache ") and "repair" not in error.fix else verify_it
            commands.append(f"{known}   # {name}: {error.what}")
    if bad and not commands:
        with locked(root):
            write_root_files(root)
    return Repaired(bad=bad, made=made, commands=commands, left=verify(root, "full") if bad else [])


class _InputNeeded(Exception):
    """Something is needed that was not given."""

    def __init__(self, command: str) -> None:
        self.command = command


def _remake_table(root: Path, name: str, workers: Workers, given: tuple[RepairInputs, dict[str, str]]) -> int:
    """Run the stage of a table, which quarantines its bad units and makes what is missing; how many it made."""
    inputs, models = given
    spec = _spec(root / name)
    _drop_other_plan(root / name, spec)
    if name == "documents":
        sources = _sources(root, spec, inputs.corpus)
        return make_documents(root, sources, documents_of(spec).model_copy(update=inputs.parser), workers).made
    teacher = name.partition("/")[2] if name.startswith("teachers/") else str(spec["teacher"])
    if not name.startswith("students/") and teacher not in models:
        raise _InputNeeded(f"xkd-cache repair {shlex.quote(str(root))} --model PATH_OF_{teacher}")
    return rerun_stage(root, name, spec, models.get(teacher, ""), workers).made


def _sources(root: Path, spec: Spec, names: Sequence[str]) -> list[Source]:
    """The corpus that the documents were made from.

    Raises:
        UsageError: Something else is named.
        _InputNeeded: Not all of it is named.
    """
    digests = {digest_of(name): name for name in names}
    strange = [name for digest, name in digests.items() if digest not in {entry["sha256"] for entry in spec["corpus"]}]
    if strange:
        raise UsageError(
            f"{', '.join(strange)}: not what the documents were made from, or changed since",
            fix=f"name the files as they were then: {', '.join(entry['name'] for entry in spec['corpus'])}",
        )
    if any(entry["sha256"] not in digests for entry in spec["corpus"]):
        paths = " ".join(f"--corpus {shlex.quote('PATH_OF/' + entry['name'])}" for entry in spec["corpus"])
        raise _InputNeeded(f"xkd-cache repair {shlex.quote(str(root))} {paths}")
    return [open_source(digests[e["sha256"]], form=e["form"], columns=e["columns"]) for e in spec["corpus"]]


def _spec(folder: Path) -> Spec:
    """The settings of a table, which its manifest has, and before it is finished its plan."""
    try:
        return read_record(folder / "manifest.json", Manifest).spec
    except (BadData, InputMissing):
        return read_record(folder / "plan.json", Plan).spec


def _drop_other_plan(folder: Path, spec: Spec) -> None:
    """Quarantine a plan that cannot be read or has other settings; the stage writes it again."""
    path = folder / "plan.json"
    try:
        same = read_record(path, Plan).spec == spec
    except BadData:
        same = False
    except InputMissing:
        return
    if not same:
        quarantine(folder, [path])


def documents_of(spec: Spec) -> DocumentsSection:
    """The settings of a documents plan; the parser's model by the name that the model gives itself."""
    parser, prompts = spec["parser"], spec.get("prompts", {})
    return DocumentsSection(
        parser=parser["kind"], spacy_model=parser["pipeline"].split(" ")[0], max_words=int(parser["max_words"]),
        drop_contained=parser["drop_contained"] == "True", max_reject=1.0, max_chars=spec["max_chars"],
        rows_per_shard=spec["rows_per_shard"], max_prompt_tokens=prompts.get("tokens", 0),
        prompt_tokenizer=prompts.get("name", ""), prompt_template=prompts.get("template", "none"),
    )  # fmt: skip


def rerun_stage(root: Path, table: str, spec: Spec, model: str, workers: Workers) -> Built:
    """Run the stage that makes teachers/NAME, signals/NAME or students/NAME with the settings `spec`."""
    kind, _, name = table.partition("/")
    if kind == "students":
        settings = StudentSection(tokenizer=str(root / table / "tokenizer"), **reading_of(spec["encoder"]))
        return make_students(root, name, spec["teacher"], settings, workers)
    signals = [signal_named(column) for column in spec["signals"]]
    captured = teacher_settings(spec, model)
    beside = spec["teacher"] if kind == "signals" else ""
    return make_teacher(root, name, captured, lambda _layers: signals, workers, beside=beside)


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
                fix=f"xkd-cache teacher {root} --model {model} makes a new table",
            )
        found |= dict.fromkeys(fitting, model)
    return found

"""Repair a cache: make its bad shards again and no other, from the cache, the corpus and the teacher."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xkd_pipeline.alignment import make_students
from xkd_pipeline.capture.artifacts import weights_identity
from xkd_pipeline.capture.stage import make_teacher, teacher_settings
from xkd_pipeline.maintain.verify import verify
from xkd_pipeline.maintain.verify_rows import Finding
from xkd_pipeline.parsing.stage import make_documents
from xkd_pipeline.tables.dataset_card import write_root_files
from xkd_pipeline.tables.writer import locked, quarantine
from xkd_pipeline.workers.contract import Workers
from xkd_schemas.cache.manifest import Manifest, Plan, Spec, differences, read_record, record_or_none
from xkd_schemas.config import DocumentsSection, StudentSection
from xkd_schemas.corpus.sources import digest_of, open_source
from xkd_schemas.errors import UsageError, XkdError
from xkd_schemas.signals import signal_named
from xkd_schemas.text.encode import reading_of


@dataclass(frozen=True, kw_only=True, slots=True)
class Repaired:
    """What a repair found and did."""

    bad: list[Finding]
    made: dict[str, int]  # table -> shards made again; 0 where only other files were put right
    commands: list[str]  # what to type, after the CAPITALS are replaced, for what needs the corpus or the teacher
    left: list[Finding]  # what is still wrong


def repair(
    root: Path,
    workers: Workers,
    *,
    corpus: Sequence[str] = (),
    models: Sequence[str] = (),
    parser: Mapping[str, Any] | None = None,
) -> Repaired:
    """Quarantine the bad shards and run the stages with the settings of their tables: they make what is missing.

    A student's table is made from its own tokenizer/ and the two tables before it; documents need the corpus, and a
    teacher's tables the teacher. Where these are not given, the command is returned that makes the same shards.

    Args:
        root: The cache.
        workers: As for the stages.
        corpus: Files or data sets that were read; all of them are needed where the documents are bad.
        models: Teachers.
        parser: Fields of [documents] that the plan does not tell: where the files of the parser are.

    UsageError where a model or corpus was given that this cache was not made from.
    """
    bad = verify(root, "full")
    made: dict[str, int] = {}
    commands: list[str] = []
    teachers = models_by_table(root, models)
    for name in dict.fromkeys(one.table for one in bad if one.table):
        if name.startswith("students/") and commands:
            continue  # what it is made from is bad
        try:
            spec = _spec(root / name)
            inputs = _inputs(name, spec, corpus, teachers)
            if not all(given for _, given in inputs):
                flags = " ".join(flag for flag, _ in inputs)
                commands.append(f"xkd-cache repair {shlex.quote(str(root))} {flags}")
                continue
            with locked(root):
                _drop_other_plan(root / name, spec)
                made[name] = _remake_table(root, name, spec, [given for _, given in inputs], parser or {}, workers)
        except XkdError as error:
            if corpus or models:
                raise
            verify_it = f"xkd-cache verify {shlex.quote(str(root))}"
            known = error.fix if error.fix.startswith("xkd-cache ") and "repair" not in error.fix else verify_it
            commands.append(f"{known}   # {name}: {error.what}")
    if bad and not commands:
        with locked(root):
            write_root_files(root)
    return Repaired(bad=bad, made=made, commands=commands, left=verify(root, "full") if bad else [])


def _inputs(name: str, spec: Spec, corpus: Sequence[str], teachers: Mapping[str, str]) -> list[tuple[str, str]]:
    """(flag that names an input of a table, what was given for it or ""); UsageError for a corpus that is another."""
    kind, _, own = name.partition("/")
    if kind == "students":
        return []
    if "imported" in spec:
        again = f"xkd-cache import CACHE ROWS --name {own} makes its bad shards again, of the same rows"
        raise UsageError(f"{name} was imported", fix=again)
    if kind != "documents":
        teacher = own if kind == "teachers" else str(spec["teacher"])
        return [(f"--model PATH_OF_{teacher}", teachers.get(teacher, ""))]
    digests = {digest_of(path): path for path in corpus}
    strange = digests.keys() - {entry["sha256"] for entry in spec["corpus"]}
    if strange:
        raise UsageError(
            f"{', '.join(digests[one] for one in strange)}: not what the documents were made from, or changed since",
            fix=f"name the files as they were then: {', '.join(entry['name'] for entry in spec['corpus'])}",
        )
    named = ((shlex.quote(f"PATH_OF/{entry['name']}"), entry["sha256"]) for entry in spec["corpus"])
    return [(f"--corpus {path}", digests.get(sha256, "")) for path, sha256 in named]


def _spec(folder: Path) -> Spec:
    """The settings of a table, which its manifest has, and before it is finished its plan."""
    sealed = record_or_none(folder / "manifest.json", Manifest)
    return (sealed or read_record(folder / "plan.json", Plan)).spec


def _drop_other_plan(folder: Path, spec: Spec) -> None:
    """Quarantine a plan that cannot be read or has other settings; the stage writes it again."""
    path = folder / "plan.json"
    plan = record_or_none(path, Plan)
    if path.exists() and (plan is None or plan.spec != spec):
        quarantine(folder, [path])


def _remake_table(
    root: Path, name: str, spec: Spec, inputs: Sequence[str], parser: Mapping[str, Any], workers: Workers
) -> int:
    """Run the stage of a table, which quarantines its bad shards and makes what is missing; how many it made."""
    kind, _, own = name.partition("/")
    if kind == "documents":
        named = zip(inputs, spec["corpus"], strict=True)
        sources = [open_source(path, form=entry["form"], columns=entry["columns"]) for path, entry in named]
        return make_documents(root, sources, _section_of(spec).model_copy(update=parser), workers).made
    if kind == "students":
        student = StudentSection(tokenizer=str(root / name / "tokenizer"), **reading_of(spec["encoder"]))
        return make_students(root, own, spec["teacher"], student, workers).made
    signals = [signal_named(column) for column in spec["signals"]]
    settings = teacher_settings(spec, inputs[0])
    beside = spec["teacher"] if kind == "signals" else ""
    return make_teacher(root, own, settings, lambda _layers: signals, workers, beside=beside).made


def _section_of(spec: Spec) -> DocumentsSection:
    """The settings of a documents plan; the parser's model by the name that the model gives itself."""
    parser, prompts = spec["parser"], spec.get("prompts", {})
    return DocumentsSection(
        parser=parser["kind"], spacy_model=parser["pipeline"].split(" ")[0], max_words=int(parser["max_words"]),
        drop_contained=parser["drop_contained"] == "True", max_reject=1.0, max_chars=spec["max_chars"],
        rows_per_shard=spec["rows_per_shard"], max_prompt_tokens=prompts.get("tokens", 0),
        prompt_tokenizer=prompts.get("name", ""), prompt_template=prompts.get("template", "none"),
    )  # fmt: skip


def models_by_table(root: Path, models: Sequence[str]) -> dict[str, str]:
    """Name of each teacher's table to the one of `models` whose weights it was made with."""
    found: dict[str, str] = {}
    for model in models:
        weights = weights_identity(model)
        specs = {path.name: _spec(path) for path in sorted((root / "teachers").glob("*")) if path.is_dir()}
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

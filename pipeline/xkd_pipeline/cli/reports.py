"""The commands that only look, at a corpus or at a cache: plan, pair, show, status, report, export."""

from pathlib import Path
from typing import Annotated, Final

import typer

from xkd_pipeline.cli.maintain import CacheArgument
from xkd_schemas.cache.table import check_cache, names_in, only_student, only_teacher
from xkd_schemas.config import RunConfig
from xkd_schemas.console import answer, say
from xkd_schemas.durable_files import bytes_below
from xkd_schemas.errors import UsageError
from xkd_schemas.flags import FlagsOf, JsonOption, with_flags

DOCUMENTS: Final = FlagsOf(
    "documents",
    flags={"corpus": "corpus", "columns": "--column", "drop_contained": "--drop-contained/--no-drop-contained"},
)
TEACHER: Final = FlagsOf("teacher", flags={"losses": "--for"})
SampleOption = Annotated[int, typer.Option(min=1, help="Rows to look at, spread over the corpus.")]


@with_flags(
    DOCUMENTS,
    TEACHER,
    FlagsOf("student", only=("tokenizer",), flags={"tokenizer": "--student"}, default="not counted"),
    FlagsOf("", only=("cache",), flags={"cache": "--out"}),
    run_file="--run",
)
def plan(
    run: RunConfig,
    budget: Annotated[
        str | None, typer.Option(help="Size the cache may have, e.g. 200GB; shows what to drop to fit.")
    ] = None,
    tokens_per_second: Annotated[float | None, typer.Option(min=1e-6, help="Rate of the teacher, if known.")] = None,
    sample: SampleOption = 256,
    as_json: JsonOption = False,
) -> None:
    """Say what a cache will need: bytes by signal, shards, memory, time. Reads a sample, loads no weights.

    Example: xkd-cache plan train.jsonl --model models/teacher --for mta,sra,dwa --budget 200GB
    """
    from xkd_pipeline.reports.plan import make_plan
    from xkd_pipeline.reports.plan_text import parse_size, plan_lines

    if not run.teacher.model:
        raise UsageError("no teacher is named", fix="xkd-cache plan CORPUS --model FOLDER")
    limit = None if budget is None else parse_size(budget)
    found = make_plan(run, sample=sample, budget=limit, rate=tokens_per_second)
    answer(found, () if as_json else plan_lines(found), as_json)


@with_flags(
    FlagsOf("documents", only=("corpus", "form"), flags={"corpus": "corpus"}),
    FlagsOf("student", only=("template", "enable_thinking", "max_tokens")),
    FlagsOf("teacher", only=("template",), flags={"template": "--teacher-template"}),
    FlagsOf("teacher", only=("enable_thinking", "max_tokens")),
)
def pair(
    teacher: Annotated[str, typer.Argument(help="Folder, .gguf file or hub name of the teacher or its tokenizer.")],
    student: Annotated[str, typer.Argument(help="Folder or hub name of the student or its tokenizer.")],
    run: RunConfig,
    sample: SampleOption = 256,
    worst: Annotated[int, typer.Option(min=0, help="Least aligned documents to draw.")] = 2,
    width: Annotated[int, typer.Option(min=40, help="Columns of a drawing.")] = 100,
    with_models: Annotated[
        bool, typer.Option("--with-models", help="Run both models on the sample: is the teacher better?")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Say how well two tokenizers go together on some text, and with --with-models whether the teacher is better.

    Before any capture; loads no model unless told to.

    Example: xkd-cache pair models/teacher models/student train.jsonl
    """
    from xkd_pipeline.reports.compare import compare, pair_lines
    from xkd_pipeline.reports.sample import read_sample
    from xkd_pipeline.tables.shard import encoder_for

    theirs, ours = encoder_for(teacher, run.teacher), encoder_for(student, run.student)
    rows = read_sample(run, sample)
    found = compare(theirs, ours, rows, worst=worst, width=width)
    lines = [*pair_lines(found)]
    if with_models:
        from xkd_pipeline.reports.compare import compare_models, model_lines

        found["bits_per_byte"] = compare_models((teacher, student), (theirs, ours), run.teacher.dtype, rows)
        lines += model_lines(found["bits_per_byte"])
    answer(found, lines, as_json)


def show(
    cache: CacheArgument,
    doc: Annotated[str, typer.Argument(help="doc_id (or its beginning), or a row number.")],
    student: Annotated[str, typer.Option(help="Name of the student's table.")] = "",
    teacher: Annotated[str, typer.Option(help="Name of the teacher's table.")] = "",
    width: Annotated[int, typer.Option(min=20, help="Columns of the drawing; 0 fits the terminal.")] = 100,
) -> None:
    """Draw a document: its phrases in brackets and both tokenizations under each other.

    Example: xkd-cache show cache/ 0
    """
    from xkd_pipeline.reports.render import draw

    check_cache(cache)
    taught = teacher or (only_teacher(cache) if names_in(cache, "teachers") else "")
    learned = student or (only_student(cache, taught) if taught else "")
    if taught:
        say(f"teacher {taught}, student {learned or 'none'}")
    for line in draw(cache, doc, teacher=taught, student=learned, width=width):
        say(line)


def status(cache: CacheArgument, as_json: JsonOption = False) -> None:
    """Say which tables are finished and what they hold.

    Example: xkd-cache status cache/
    """
    from xkd_pipeline.tables.dataset_card import table_states

    check_cache(cache)
    states = table_states(cache)
    lines = []
    for state in states:
        done = "finished" if state["sealed"] else f"{state['done']} of {state['units']} shards done"
        notes = "".join(f", {state[key]} {key}" for key in ("unreadable", "quarantined", "leftovers") if state[key])
        lines += [f"{state['table']}: {done}, {state['documents']} documents, {state['bytes'] / 1e6:.1f} MB{notes}"]
    size = bytes_below(cache)
    answer({"tables": states, "bytes": size}, [*lines, f"{cache}: {size / 1e6:.1f} MB"], as_json)


def report(
    cache: CacheArgument,
    out: Annotated[Path, typer.Option(help="HTML file to write.")] = Path("report.html"),
    as_json: JsonOption = False,
) -> None:
    """Write one offline HTML page about a cache: contents, provenance, alignment, rejects, worst documents.

    Example: xkd-cache report cache/ --out report.html
    """
    from xkd_pipeline.reports.report import write_report

    values = write_report(cache, out)
    pairs = "".join(f"; teacher {teacher}, student {student}" for teacher, student in values["pairs"])
    answer(values, [f"report: {out}, {values['tables']} tables{pairs}"], as_json)


def export(
    cache: CacheArgument,
    parquet: Annotated[Path, typer.Option(help="New folder for Parquet files.")],
    as_json: JsonOption = False,
) -> None:
    """Write the tables as Parquet files; bf16 columns stay bits, which their metadata says.

    Example: xkd-cache export cache/ --parquet tables/
    """
    from xkd_pipeline.maintain.export_parquet import export_parquet

    values = export_parquet(cache, parquet)
    answer(values, ["{tables} tables, {bytes} bytes in {parquet}".format(**values)], as_json)

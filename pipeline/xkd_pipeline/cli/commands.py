"""The commands that look at a corpus or a cache, and those that look after a finished cache. app.py registers them."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Final, NoReturn

import typer

from xkd_pipeline.workers.contract import Workers
from xkd_schemas.cache.table import check_cache, names_in, only_student, only_teacher
from xkd_schemas.config import RunConfig
from xkd_schemas.console import answer, say
from xkd_schemas.durable_files import bytes_below
from xkd_schemas.errors import BadData, UsageError
from xkd_schemas.flags import FlagsOf, JsonOption, with_flags

CacheArgument = Annotated[Path, typer.Argument(help="Cache folder.")]
DOCUMENTS: Final = FlagsOf(
    "documents",
    flags={"corpus": "corpus", "columns": "--column", "drop_contained": "--drop-contained/--no-drop-contained"},
)
TEACHER: Final = FlagsOf("teacher", flags={"losses": "--for", "stream_layers": "--stream-layers/--no-stream-layers"})
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
    from xkd_pipeline.reports.plan import make_plan, parse_size, plan_lines

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
    from xkd_pipeline.reports.compare import compare, compare_models, model_lines, pair_lines
    from xkd_pipeline.reports.sample import read_sample
    from xkd_pipeline.tables.shard import encoder_for

    theirs, ours = encoder_for(teacher, run.teacher), encoder_for(student, run.student)
    rows = read_sample(run, sample)
    found = compare(theirs, ours, rows, worst=worst, width=width)
    lines = [*pair_lines(found)]
    if with_models:
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


def verify(
    cache: CacheArgument,
    level: Annotated[str, typer.Option(help="quick, full or deep.")] = "full",
    recompute: Annotated[int, typer.Option(min=0, help="Rows to compare with the live teacher.")] = 0,
    model: Annotated[
        str, typer.Option(help="The teacher, for --recompute; of a quantised one also the whole model: the price.")
    ] = "",
    teacher: Annotated[str, typer.Option(help="Name of the teacher's table, if there are several.")] = "",
    dtype: Annotated[
        str, typer.Option(help="Of the live teacher: auto (the table's, float32 where that is slow), float32, ...")
    ] = "auto",
    as_json: JsonOption = False,
) -> None:
    """Check every file of a cache; each bad file is named with its reason, and the exit code is 65.

    Example: xkd-cache verify cache/ --level deep
    """
    from xkd_pipeline.maintain.verify import verify as check

    if recompute and not model:
        raise UsageError("--recompute needs the teacher", fix="add --model FOLDER")
    bad, whole = check(cache, level), f"{cache} is whole ({level})"
    values: dict[str, Any] = {"level": level, "recomputed": 0, "not_compared": [], "differences": {}}
    if recompute and not bad:
        from xkd_pipeline.maintain.recompute import recompute as compare

        live = compare(cache, f"teachers/{teacher or only_teacher(cache)}", model, recompute, dtype)
        bad, whole = live.bad, f"{whole[:-1]}, {live.rows} rows recomputed in {live.dtype}: {live.line})"
        values |= {"recomputed": live.rows, "not_compared": live.skipped, "differences": live.differences}
        values |= {"quantization": asdict(live.price)} if live.price else {}
    lines, skipped = [one.line for one in bad], values["not_compared"]
    lines += [f"not compared, because they may differ: {', '.join(skipped)}"] if skipped else []
    lines += [] if bad else [whole]
    answer(values | {"bad": [asdict(one) for one in bad], "whole": not bad}, lines, as_json)
    if bad:
        _end(len(bad), "found", cache, f"xkd-cache repair {cache}", as_json)


def _end(number: int, how: str, cache: Path, fix: str, as_json: bool) -> NoReturn:
    if as_json:
        raise typer.Exit(BadData.exit_code)
    raise BadData(f"{number} problem{'s'[: number - 1]} {how} in {cache}", fix=fix)


def repair(
    cache: CacheArgument,
    corpus: Annotated[list[str] | None, typer.Option(help="What the documents were read from; repeatable.")] = None,
    model: Annotated[list[str] | None, typer.Option(help="The teacher of a bad table; repeatable.")] = None,
    spacy_model: Annotated[str | None, typer.Option(help="spaCy pipeline of the documents.")] = None,
    parser_model: Annotated[str | None, typer.Option(help="Folder of the benepar model.")] = None,
    workers: Annotated[int, typer.Option(min=0, help="Ray actors; 0 works in this process.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Make the bad shards again and no other; without the corpus or teacher they need, print the command to type.

    Example: xkd-cache repair cache/ --corpus train.jsonl --model models/teacher
    """
    from xkd_pipeline.maintain.repair import repair as repair_cache

    named = {"spacy_model": spacy_model, "parser_model": parser_model}
    parser = {field: name for field, name in named.items() if name is not None}
    done = repair_cache(cache, Workers(count=workers), corpus=corpus or (), models=model or (), parser=parser)
    lines = [one.line for one in done.bad]
    lines += [f"{name}: {shards} shards made again" for name, shards in done.made.items()]
    lines += [f"to run: {command}" for command in done.commands]
    found = {"bad": [asdict(b) for b in done.bad], "left": [asdict(b) for b in done.left]}
    values = found | {"made": done.made, "commands": done.commands}
    answer(values, lines if done.left else [*lines, f"{cache} is whole"], as_json)
    if done.left:
        _end(len(done.left), "left", cache, "run what is listed above", as_json)


def gc(
    cache: CacheArgument,
    older_than: Annotated[float, typer.Option(min=0, help="Hours that quarantined files are kept.")] = 24.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Remove what nothing refers to: loose shards, leftovers of writers that died, old quarantine.

    Example: xkd-cache gc cache/ --dry-run
    """
    from xkd_pipeline.maintain.gc import collect

    found = collect(cache, older_than=older_than, dry_run=dry_run)
    size = sum(one.size for one in found)
    files = [{"file": str(one.file.relative_to(cache)), "bytes": one.size, "why": one.why} for one in found]
    lines = ["{file}: {bytes} bytes, {why}".format(**file) for file in files]
    lines += [f"{'would free' if dry_run else 'freed'} {size / 1e6:.1f} MB in {len(found)} files"]
    answer({"files": files, "bytes": size, "removed": not dry_run}, lines, as_json)


def drop(
    cache: CacheArgument,
    table: Annotated[str, typer.Argument(help="teachers/NAME, signals/NAME or students/NAME.")],
    as_json: JsonOption = False,
) -> None:
    """Remove one table that no other table was made from; the rest stays whole.

    Example: xkd-cache drop cache/ students/NAME
    """
    from xkd_pipeline.maintain.gc import drop as remove

    size = remove(cache, table)
    answer({"table": table, "bytes": size}, [f"dropped {table}, freed {size / 1e6:.1f} MB"], as_json)


def copied_by_others(context: typer.Context) -> None:
    """Say what took the place of publish and fetch."""
    raise UsageError(
        f"xkd-cache {context.info_name} is withdrawn",
        fix="copy the folder with hf upload, aws s3 sync or rclone, then xkd-cache verify (docs/sharing.md)",
    )

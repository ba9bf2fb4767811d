"""xkd-cache: parse the command line, call a stage, say what it did.

Stages are imported where they are called: what needs no model starts without torch and transformers.
"""

from pathlib import Path
from typing import Annotated, Any

import typer

from xkd_pipeline.cli import add_signals as cli_add
from xkd_pipeline.cli import maintain as cli_care
from xkd_pipeline.cli import reports as cli_look
from xkd_pipeline.cli import share as cli_share
from xkd_pipeline.cli.options import ThinkingOption, echo_for, names_of, numbers_of
from xkd_pipeline.tables.build import Outcome
from xkd_pipeline.workers.contract import Workers
from xkd_pipeline.workers.executor import asked_workers
from xkd_schemas.cache.table import check_cache, names_in, only_student, only_teacher
from xkd_schemas.config import RunConfig, load_run, toml_text
from xkd_schemas.console import run as run_app
from xkd_schemas.console import say, say_json
from xkd_schemas.corpus.formats import columns_of
from xkd_schemas.durable_files import bytes_below
from xkd_schemas.flag_defaults import with_defaults

app = typer.Typer(
    name="xkd-cache",
    help="Run a teacher once and keep what distillation needs.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    add_completion=True,
)

SetOption = Annotated[list[str] | None, typer.Option("--set", help="SECTION.KEY=VALUE of the run file; repeatable.")]
WorkersOption = Annotated[int | None, typer.Option(min=0, help="Ray actors; 0 works in this process.")]
StallOption = Annotated[
    float | None, typer.Option(min=1, help="Seconds after which a unit hangs; 5 times the median, 300 at least.")
]
GpusOption = Annotated[float, typer.Option(min=0, help="GPUs of each actor.")]
AddressOption = Annotated[str | None, typer.Option(help="Join this Ray cluster instead of starting one.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
CacheArgument = Annotated[Path, typer.Argument(help="Cache folder.")]


def _run_of(path: Path | None, sets: list[str] | None, flags: dict[str, Any]) -> RunConfig:
    """Run file, then --set, then the flags that were given."""
    given = [f"{key}={toml_text(value)}" for key, value in flags.items() if value not in (None, [], "")]
    return load_run(path, [*(sets or []), *given])


def _workers(run: RunConfig, gpus: float, address: str | None, stall: float | None) -> Workers:
    return asked_workers(Workers(count=run.workers, gpus=gpus, address=address, stall_seconds=stall))


def _tell(outcome: Outcome, as_json: bool) -> None:
    if as_json:
        say_json(outcome.values)
    else:
        say(outcome.line)


@app.command()
def documents(
    corpus: Annotated[list[str], typer.Argument(help="Files, folders or data set names.")],
    out: Annotated[Path, typer.Option(help="Cache folder.")] = Path("cache"),
    form: Annotated[str | None, typer.Option(help="auto, prompt_response, alpaca, messages or text.")] = None,
    column: Annotated[list[str] | None, typer.Option(help="FIELD=COLUMN of the corpus; repeatable.")] = None,
    parser: Annotated[str | None, typer.Option(help="spacy or benepar.")] = None,
    spacy_model: Annotated[str | None, typer.Option(help="spaCy pipeline: package or folder.")] = None,
    parser_model: Annotated[str | None, typer.Option(help="Folder of the benepar model.")] = None,
    max_words: Annotated[int | None, typer.Option(help="Longest phrase in words, 0 for any.")] = None,
    drop_contained: Annotated[bool | None, typer.Option(help="Drop phrases inside other phrases.")] = None,
    max_prompt_tokens: Annotated[
        int | None, typer.Option(help="Longer prompts lose the end of their text; template tokens count.")
    ] = None,
    prompt_tokenizer: Annotated[str | None, typer.Option(help="Folder or hub name; counts prompts.")] = None,
    prompt_template: Annotated[str | None, typer.Option(help="chat, alpaca or none; round prompts.")] = None,
    max_reject: Annotated[float | None, typer.Option(help="Share of rows that may be unusable.")] = None,
    workers: WorkersOption = None,
    ray_address: AddressOption = None,
    stall_timeout: StallOption = None,
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Read a corpus and find its words and phrases.

    Example: xkd-cache documents train.jsonl --out cache/ --column prompt=question --workers 2
    """
    flags = {
        "documents.corpus": corpus, "cache": str(out), "documents.form": form, "documents.parser": parser,
        "documents.spacy_model": spacy_model, "documents.parser_model": parser_model,
        "documents.max_words": max_words, "documents.drop_contained": drop_contained,
        "documents.max_reject": max_reject, "workers": workers, "documents.max_prompt_tokens": max_prompt_tokens,
        "documents.prompt_tokenizer": prompt_tokenizer, "documents.prompt_template": prompt_template,
    }  # fmt: skip
    flags |= {f"documents.columns.{field}": name for field, name in columns_of(column or []).items()}
    run = _run_of(None, sets, flags)
    from xkd_pipeline.stages import documents_stage

    _tell(documents_stage(run, _workers(run, 0.0, ray_address, stall_timeout), echo_for(as_json)), as_json)


@app.command()
def teacher(
    cache: CacheArgument,
    model: Annotated[str, typer.Option(help="Folder, .gguf file or hub name of the teacher.")],
    losses: Annotated[str, typer.Option("--for", help="Losses whose signals are kept.")] = "mta,sra,dwa",
    name: Annotated[str | None, typer.Option(help="Name of the teacher's table.")] = None,
    template: Annotated[str | None, typer.Option(help="auto, chat, alpaca or none.")] = None,
    enable_thinking: ThinkingOption = None,
    word_layers: Annotated[str | None, typer.Option(help="Teacher layers read on words, e.g. 15.")] = None,
    phrase_layers: Annotated[str | None, typer.Option(help="Teacher layers read on phrases, e.g. 22,30.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Longer documents are cut at a word border.")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto (what is fast here), bfloat16, float16 or float32.")] = None,
    codec: Annotated[str | None, typer.Option(help="bf16, bf16-planes (exact) or int8.")] = None,
    topk: Annotated[int | None, typer.Option(min=1, help="Classes kept of a prediction, for topk signals.")] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Classes drawn of a prediction, for rskd.")] = None,
    batch_tokens: Annotated[int | None, typer.Option(help="Tokens of a forward pass.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads of one worker.")] = None,
    workers: WorkersOption = None,
    gpus_per_worker: GpusOption = 0.0,
    ray_address: AddressOption = None,
    stall_timeout: StallOption = None,
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Run the teacher over the documents, once.

    Example: xkd-cache teacher cache/ --model models/teacher --for mta,sra,dwa
    """
    flags = {
        "cache": str(cache), "teacher.model": model, "teacher.losses": names_of(losses), "teacher.name": name,
        "teacher.template": template, "teacher.enable_thinking": enable_thinking,
        "teacher.word_layers": numbers_of(word_layers),
        "teacher.phrase_layers": numbers_of(phrase_layers), "teacher.max_tokens": max_tokens, "teacher.dtype": dtype,
        "teacher.codec": codec, "teacher.topk": topk, "teacher.samples": samples,
        "teacher.batch_tokens": batch_tokens, "teacher.threads": threads, "workers": workers,
    }  # fmt: skip
    run = _run_of(None, sets, flags)
    from xkd_pipeline.stages import teacher_stage

    workers_asked = _workers(run, gpus_per_worker, ray_address, stall_timeout)
    _tell(teacher_stage(run, workers_asked, echo_for(as_json)), as_json)


@app.command()
def align(
    cache: CacheArgument,
    student: Annotated[str, typer.Option(help="Folder or hub name of the student or of its tokenizer.")],
    teacher: Annotated[str, typer.Option(help="Name of the teacher's table, if there are several.")] = "",
    name: Annotated[str | None, typer.Option(help="Name of the student's table.")] = None,
    template: Annotated[str | None, typer.Option(help="auto, none, alpaca or chat.")] = None,
    enable_thinking: ThinkingOption = None,
    max_tokens: Annotated[int | None, typer.Option(help="Longer documents are cut at a word border.")] = None,
    workers: WorkersOption = None,
    ray_address: AddressOption = None,
    stall_timeout: StallOption = None,
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Put a student's tokens beside the teacher's. CPU only.

    Example: xkd-cache align cache/ --student models/student --template chat
    """
    flags = {
        "cache": str(cache), "student.tokenizer": student, "student.name": name, "student.template": template,
        "student.enable_thinking": enable_thinking, "student.max_tokens": max_tokens, "workers": workers,
    }  # fmt: skip
    run = _run_of(None, sets, flags)
    from xkd_pipeline.stages import align_stage

    _tell(align_stage(run, _workers(run, 0.0, ray_address, stall_timeout), teacher=teacher), as_json)


@app.command()
def preprocess(
    run_file: Annotated[Path, typer.Argument(help="Run file (TOML).")],
    workers: WorkersOption = None,
    gpus_per_worker: GpusOption = 0.0,
    ray_address: AddressOption = None,
    stall_timeout: StallOption = None,
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Documents, teacher and align for a run file; what is there is reused.

    Example: xkd-cache preprocess runs/demo.toml --workers 2
    """
    from xkd_pipeline.stages import preprocess as run_all

    run = _run_of(run_file, sets, {"workers": workers})
    outcomes = run_all(run, _workers(run, gpus_per_worker, ray_address, stall_timeout), echo_for(as_json))
    if as_json:
        say_json({"stages": [outcome.values for outcome in outcomes]})


@app.command()
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
    from xkd_pipeline.reports.show import draw

    check_cache(cache)
    taught = teacher or (only_teacher(cache) if names_in(cache, "teachers") else "")
    learned = student or (only_student(cache, taught) if taught else "")
    if taught:
        say(f"teacher {taught}, student {learned or 'none'}")
    for line in draw(cache, doc, teacher=taught, student=learned, width=width):
        say(line)


@app.command()
def status(cache: CacheArgument, as_json: JsonOption = False) -> None:
    """Say which tables are finished and what they hold.

    Example: xkd-cache status cache/
    """
    from xkd_pipeline.tables.status import table_states

    check_cache(cache)
    states = table_states(cache)
    if as_json:
        say_json({"tables": states, "bytes": bytes_below(cache)})
        return
    for state in states:
        done = "finished" if state["sealed"] else f"{state['done']} of {state['units']} shards done"
        notes = "".join(f", {state[key]} {key}" for key in ("unreadable", "quarantined", "leftovers") if state[key])
        say(f"{state['table']}: {done}, {state['documents']} documents, {state['bytes'] / 1e6:.1f} MB{notes}")
    say(f"{cache}: {bytes_below(cache) / 1e6:.1f} MB")


@app.command()
def report(
    cache: CacheArgument,
    out: Annotated[Path, typer.Option(help="HTML file to write.")] = Path("report.html"),
    as_json: JsonOption = False,
) -> None:
    """Write one offline HTML page about a cache: contents, provenance, alignment, rejects, worst documents.

    Example: xkd-cache report cache/ --out report.html
    """
    from xkd_pipeline.reports.report_page import write_report

    values = write_report(cache, out)
    pairs = "".join(f"; teacher {teacher}, student {student}" for teacher, student in values["pairs"])
    _tell(Outcome(line=f"report: {out}, {values['tables']} tables{pairs}", values=values), as_json)


app.command()(cli_add.add)
app.command()(cli_share.export)
for _name in ("publish", "fetch"):
    app.command(_name, hidden=True, context_settings={"ignore_unknown_options": True, "allow_extra_args": True})(
        cli_share.copied_by_others
    )
app.command()(cli_look.plan)
app.command()(cli_look.pair)
app.command()(cli_care.verify)
app.command()(cli_care.repair)
app.command()(cli_care.gc)
app.command()(cli_care.drop)


def main() -> None:
    """Entry point of the console script."""
    run_app("xkd-cache", with_defaults(app))

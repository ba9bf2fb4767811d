"""xkd-cache: parse the command line, call a stage, say what it did.

Stages are imported where they are called: what needs no model starts without torch and transformers.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from xkd_pipeline.cli import commands
from xkd_pipeline.tables.writer import Outcome
from xkd_pipeline.workers.contract import Workers
from xkd_schemas.cache.table import check_cache, only_teacher
from xkd_schemas.config import RunConfig
from xkd_schemas.console import answer, say, say_json
from xkd_schemas.console import run as run_app
from xkd_schemas.errors import BadData, UsageError
from xkd_schemas.flags import ANSWERS, FlagsOf, JsonOption, with_flags

app = typer.Typer(
    name="xkd-cache", help="Run a teacher once and keep what distillation needs.", no_args_is_help=True,
    pretty_exceptions_enable=False, rich_markup_mode=None,
)  # fmt: skip

CACHE: Final = FlagsOf("", only=("cache",), flags={"cache": "cache"})
CPU_WORKERS: Final = FlagsOf("", only=("workers", "ray_address", "stall_timeout"))
GPU_WORKERS: Final = FlagsOf("", only=("workers", "gpus_per_worker", "ray_address", "stall_timeout"))


def _tell(stage: Callable[..., Outcome], run: RunConfig, as_json: bool) -> None:
    outcome = stage(run, Workers.of(run), _echo(as_json))
    answer(outcome.values, [outcome.line], as_json)


def _echo(as_json: bool) -> Callable[[str], None]:
    """Where lines go while a command works: with --json, standard output holds one object and nothing else."""
    return (lambda _line: None) if as_json else say


@app.command()
@with_flags(*ANSWERS, FlagsOf("teacher", only=("model",)), GPU_WORKERS)
def generate(
    prompts: Annotated[str, typer.Argument(help="Rows with prompts: a file, folder, address or data set name.")],
    run: RunConfig,
    out: Annotated[Path, typer.Option(help="File of the answers.")] = Path("answers.jsonl"),
    as_json: JsonOption = False,
) -> None:
    """Let a model answer the prompts of a corpus; the file is a corpus for documents. Resumes where it stopped.

    Example: xkd-cache generate prompts.jsonl --model models/teacher --out answers.jsonl --n 4 --temperature 0.7
    """
    from xkd_pipeline.answers import generate as generate_answers
    from xkd_trainer.answers import describe

    found = generate_answers(run, prompts, out, Workers.of(run))
    answer(found, [describe(found)], as_json)


@app.command()
@with_flags(commands.DOCUMENTS, FlagsOf("", only=("cache",), flags={"cache": "--out"}), CPU_WORKERS)
def documents(run: RunConfig, as_json: JsonOption = False) -> None:
    """Read a corpus and find its words and phrases.

    Example: xkd-cache documents train.jsonl --out cache/ --column prompt=question --workers 2
    """
    from xkd_pipeline.stages import documents_stage

    _tell(documents_stage, run, as_json)


@app.command()
@with_flags(CACHE, commands.TEACHER, GPU_WORKERS)
def teacher(run: RunConfig, as_json: JsonOption = False) -> None:
    """Run the teacher over the documents, once.

    Example: xkd-cache teacher cache/ --model models/teacher --for mta,sra,dwa
    """
    from xkd_pipeline.stages import teacher_stage

    _tell(teacher_stage, run, as_json)


@app.command()
@with_flags(
    CACHE,
    FlagsOf("student", without=("model", "dtype", "quantization"), flags={"tokenizer": "--student"}),
    FlagsOf("teacher", only=("name",), flags={"name": "--teacher"}),
    CPU_WORKERS,
)
def align(run: RunConfig, as_json: JsonOption = False) -> None:
    """Put a student's tokens beside the teacher's. CPU only.

    Example: xkd-cache align cache/ --student models/student --template chat
    """
    from xkd_pipeline.stages import align_stage

    _tell(align_stage, run, as_json)


@app.command()
@with_flags(GPU_WORKERS, run_file="run_file")
def preprocess(run: RunConfig, as_json: JsonOption = False) -> None:
    """Documents, teacher and align for a run file; what is there is reused.

    Example: xkd-cache preprocess runs/demo.toml --workers 2
    """
    from xkd_pipeline.stages import preprocess as run_all

    outcomes = run_all(run, Workers.of(run), _echo(as_json))
    if as_json:
        say_json({"stages": [outcome.values for outcome in outcomes]})


@app.command()
@with_flags(
    CACHE,
    FlagsOf("teacher", only=("model", "word_layers", "phrase_layers", "topk", "samples", "device_map", "max_memory")),
    FlagsOf("teacher", only=("name",), flags={"name": "--to"}),
    FlagsOf("teacher", only=("losses",), flags={"losses": "--for"}, default="none"),
    FlagsOf("teacher", only=("codec",), default="the table's own"),
    GPU_WORKERS,
)
def add(
    run: RunConfig,
    signals: Annotated[str, typer.Option(help="Signals to add, e.g. topk_ids#64,hidden@8.")] = "",
    documents: Annotated[list[str] | None, typer.Option(hidden=True)] = None,
    as_json: JsonOption = False,
) -> None:
    """Add signals of a teacher to a finished cache; no shard that is there is touched.

    Example: xkd-cache add cache/ --model models/teacher --for dskd
    """
    given, cache = run.teacher.model_fields_set, Path(run.cache)
    if documents:
        raise UsageError(
            "a cache does not grow: --documents is not an option of add",
            fix="make a second cache of the new rows, and train with xkd-train --shards a/ --shards b/",
        )
    check_cache(cache)
    if not run.teacher.model:
        raise UsageError("signals are read from a teacher", fix="add --model FOLDER")
    from xkd_schemas.signals import signal_named

    named = [signal_named(part.strip()) for part in signals.split(",") if part.strip()]
    if "losses" not in given and not named:
        raise UsageError("no signal is named", fix="add --for LOSS, or --signals hidden_last,topk_ids#64")
    from xkd_pipeline.capture.stage import add_signals
    from xkd_pipeline.stages import device_map_of, signals_for

    table, workers = run.teacher.name or only_teacher(cache), Workers.of(run)
    where = {"device_map": device_map_of(run, workers), "max_memory": run.teacher.max_memory}
    built = add_signals(
        cache, table, run.teacher.model,
        lambda num_layers: [*named, *(signals_for(run, num_layers) if "losses" in given else ())],
        where | ({"codec": run.teacher.codec} if "codec" in given else {}), workers,
    )  # fmt: skip
    if built is None:
        values: dict[str, Any] = {"table": f"teachers/{table}", "made": 0, "signals": []}
        line = f"teachers/{table}: the cache holds these signals already"
    else:
        m = built.manifest
        values = {"table": m.table, "documents": m.rows, "made": built.made, "signals": m.spec["signals"]}
        size = sum(c.size for c in m.commits) / 1e6
        line = f"{m.table}: {', '.join(m.spec['signals'])} of {m.rows} documents, {size:.1f} MB"
        line += f"; {built.made} shards made, {built.kept} kept as they are"
    answer(values, [line], as_json)


@app.command()
@with_flags(
    FlagsOf("served", flags={"url": "url", "model": "--served-model", "echo": "--echo/--no-echo"}),
    CACHE,
    FlagsOf("teacher", only=("template", "enable_thinking", "max_tokens")),
    FlagsOf("documents", only=("max_reject",)),
)
def ask(
    run: RunConfig,
    out: Annotated[Path, typer.Option(help="File that answers are appended to; what it has is not asked again.")],
    as_json: JsonOption = False,
) -> None:
    """Ask a server for the log-probabilities of every document, for `import`. The key is read from XKD_API_KEY.

    Example: xkd-cache ask http://localhost:8000/v1 cache/ --tokenizer models/teacher --out answers.jsonl
    """
    from xkd_pipeline.served.ask import ask as ask_server

    outcome = ask_server(run, out)
    answer(outcome.values, [outcome.line], as_json)


@app.command("import")
@with_flags(
    CACHE,
    FlagsOf("served", only=("tokenizer",)),
    FlagsOf("teacher", only=("model",), flags={"model": "--model"}, default="none; it gives head and embeddings"),
    FlagsOf("teacher", only=("name", "template", "enable_thinking", "max_tokens", "codec")),
    FlagsOf("documents", only=("max_reject",)),
)
def import_rows(
    run: RunConfig,
    rows: Annotated[
        list[str], typer.Argument(help="Files of rows that another program computed.", show_default=False)
    ],
    layers: Annotated[
        str, typer.Option(help="Layers of states, in the order of the files, e.g. 2,15,30; the last unless given.")
    ] = "",
    recompute: Annotated[int, typer.Option(min=0, help="Rows to compare with the model, where one is given.")] = 4,
    as_json: JsonOption = False,
) -> None:
    """Make a teacher's table of what a server or another program computed; docs/served-teachers.md has the forms.

    Example: xkd-cache import cache/ answers.jsonl --tokenizer models/teacher --name teacher
    """
    from xkd_pipeline.served.stage import import_stage

    if not all(part.strip().isdigit() for part in layers.split(",") if layers):
        raise UsageError(f"--layers {layers}: not numbers", fix="write them as 2,15,30")
    outcome = import_stage(run, rows, [int(part) for part in layers.split(",") if layers])
    if run.teacher.model and recompute:
        from xkd_pipeline.maintain.recompute import recompute as compare

        live = compare(Path(run.cache), outcome.values["table"], run.teacher.model, recompute)
        if live.bad:
            fix = f"xkd-cache drop {run.cache} {outcome.values['table']}"
            raise BadData(f"{live.bad[0].line}; {len(live.bad)} such columns", kept="the table", fix=fix)
        outcome.values["recomputed"] = live.rows
    answer(outcome.values, [outcome.line], as_json)


for _command in (
    commands.show, commands.status, commands.report, commands.export, commands.plan, commands.pair,
    commands.verify, commands.repair, commands.gc, commands.drop,
):  # fmt: skip
    app.command()(_command)
for _name in ("publish", "fetch"):
    app.command(_name, hidden=True, context_settings={"ignore_unknown_options": True, "allow_extra_args": True})(
        commands.copied_by_others
    )


def main() -> None:
    """Entry point of the console script."""
    run_app("xkd-cache", app)

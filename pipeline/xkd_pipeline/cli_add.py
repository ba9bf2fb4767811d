"""xkd-cache add: more documents, or more signals of a teacher, in a finished cache. cli.py registers it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from xkd_pipeline.cli_options import echo_for, names_of, numbers_of
from xkd_schemas.errors import UsageError
from xkd_schemas.forms import columns_of
from xkd_schemas.runfile import RunFile, load_runfile, toml_text
from xkd_schemas.table import check_cache, only_teacher
from xkd_schemas.teacher import Signal
from xkd_schemas.terminal import say, say_json


def add(
    cache: Annotated[Path, typer.Argument(help="Cache folder.")],
    documents: Annotated[list[str] | None, typer.Option(help="A file, folder or data set; repeatable.")] = None,
    model: Annotated[list[str] | None, typer.Option(help="A teacher of the cache; repeatable.")] = None,
    to: Annotated[str, typer.Option(help="Teacher's table that gets signals, if there are several.")] = "",
    losses: Annotated[str | None, typer.Option("--for", help="Losses whose signals are added.")] = None,
    signals: Annotated[str | None, typer.Option(help="Signals to add, e.g. topk_ids#64,hidden@8.")] = None,
    word_layers: Annotated[str | None, typer.Option(help="Teacher layers read on words, for --for.")] = None,
    phrase_layers: Annotated[str | None, typer.Option(help="Teacher layers read on phrases, for --for.")] = None,
    topk: Annotated[int | None, typer.Option(min=1, help="Classes kept of a prediction, for --for.")] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Classes drawn of a prediction, for --for.")] = None,
    codec: Annotated[str, typer.Option(help="Of new signals; the teacher's table's own unless given.")] = "",
    form: Annotated[str, typer.Option(help="Form of new rows, as for documents.")] = "auto",
    column: Annotated[list[str] | None, typer.Option(help="FIELD=COLUMN of new rows; repeatable.")] = None,
    spacy_model: Annotated[str | None, typer.Option(help="spaCy pipeline of the first documents.")] = None,
    parser_model: Annotated[str | None, typer.Option(help="Folder of the benepar model.")] = None,
    max_reject: Annotated[float, typer.Option(min=0, max=1, help="Share of new rows that may be unusable.")] = 0.01,
    workers: Annotated[int, typer.Option(min=0, help="Ray actors; 0 works in this process.")] = 0,
    gpus_per_worker: Annotated[float, typer.Option(min=0, help="GPUs of each actor.")] = 0.0,
    ray_address: Annotated[str | None, typer.Option(help="Join this Ray cluster.")] = None,
    sets: Annotated[list[str] | None, typer.Option("--set", help="losses.NAME.KEY=VALUE, for --for.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Add documents, or signals of a teacher, to a finished cache; no shard that is there is touched.

    Example: xkd-cache add cache/ --documents more.jsonl --model models/teacher

    Example: xkd-cache add cache/ --model models/teacher --for dskd
    """
    from xkd_pipeline.run import Workers, asked_workers

    check_cache(cache)
    common = _Common(
        cache=cache,
        models=model or [],
        workers=asked_workers(Workers(count=workers, gpus=gpus_per_worker, address=ray_address)),
        as_json=as_json,
    )
    if losses is not None or signals is not None:
        if documents:
            raise UsageError("--documents and signals are added one after the other", next="run add twice")
        asked = {
            "teacher.losses": names_of(losses), "teacher.topk": topk, "teacher.samples": samples,
            "teacher.word_layers": numbers_of(word_layers),
            "teacher.phrase_layers": numbers_of(phrase_layers), "teacher.codec": codec or None,
        }  # fmt: skip
        given = [f"{key}={toml_text(value)}" for key, value in asked.items() if value is not None]
        _signals(common, to, load_runfile(None, [*(sets or []), *given]), names_of(signals), codec)
        return
    from xkd_pipeline.add import More, parser_with
    from xkd_schemas.corpus import open_source

    columns = columns_of(column or [])
    sources = [open_source(name, form=form, columns=columns) for name in documents or []]
    _documents(common, sources, More(parser=parser_with(cache, spacy_model, parser_model), max_reject=max_reject))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Common:
    cache: Path
    models: list[str]
    workers: Any
    as_json: bool


def _documents(common: _Common, sources: list[Any], more: Any) -> None:
    from xkd_pipeline.add import take_in

    echo = echo_for(common.as_json)
    for source in sources:
        echo(source.describe())
    added = take_in(common.cache, sources, more, common.models, common.workers, echo)
    if common.as_json:
        tables = {name: {"documents": b.manifest.rows, "made": b.made} for name, b in added.built.items()}
        say_json({"tables": tables, "commands": added.commands})
        return
    for command in added.commands:
        say(f"to run, for it needs the teacher's weights: {command}")
    if not added.built and not added.commands:
        say(f"{common.cache}: nothing to add, every table reaches to the last document")


def _signals(common: _Common, to: str, run: RunFile, columns: list[str], codec: str) -> None:
    from xkd_pipeline.signals_table import add_signals, signals_named
    from xkd_pipeline.stages import signals_for

    if len(common.models) != 1:
        raise UsageError("signals are read from one teacher", next="add --model FOLDER, once")
    teacher = to or only_teacher(common.cache)
    named = signals_named(columns) if columns else []

    def wanted(num_layers: int) -> list[Signal]:
        return [*named, *(signals_for(run, num_layers) if run.teacher.losses else ())]

    built = add_signals(common.cache, teacher, common.models[0], wanted, codec, common.workers)
    if built is None:
        values: dict[str, Any] = {"table": f"teachers/{teacher}", "made": 0, "signals": []}
        line = f"teachers/{teacher}: the cache holds these signals already"
    else:
        m = built.manifest
        values = {"table": m.table, "documents": m.rows, "made": built.made, "signals": m.spec["signals"]}
        size = sum(c.size for c in m.commits) / 1e6
        line = f"{m.table}: {', '.join(m.spec['signals'])} of {m.rows} documents, {size:.1f} MB"
        line += f"; {built.made} shards made, {built.kept} kept as they are"
    if common.as_json:
        say_json(values)
    else:
        say(line)

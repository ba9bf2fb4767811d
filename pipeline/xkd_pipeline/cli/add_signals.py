"""xkd-cache add: more signals of a teacher in a finished cache. cli.py registers it."""

from pathlib import Path
from typing import Annotated, Any

import typer

from xkd_pipeline.cli.options import names_of, numbers_of
from xkd_schemas.cache.table import check_cache, only_teacher
from xkd_schemas.config import load_run, toml_text
from xkd_schemas.console import say, say_json
from xkd_schemas.errors import UsageError
from xkd_schemas.signals import Signal


def add(
    cache: Annotated[Path, typer.Argument(help="Cache folder.")],
    model: Annotated[str, typer.Option(help="A teacher of the cache.")] = "",
    to: Annotated[str, typer.Option(help="Teacher's table that gets signals, if there are several.")] = "",
    losses: Annotated[str | None, typer.Option("--for", help="Losses whose signals are added.")] = None,
    signals: Annotated[str | None, typer.Option(help="Signals to add, e.g. topk_ids#64,hidden@8.")] = None,
    word_layers: Annotated[str | None, typer.Option(help="Teacher layers read on words, for --for.")] = None,
    phrase_layers: Annotated[str | None, typer.Option(help="Teacher layers read on phrases, for --for.")] = None,
    topk: Annotated[int | None, typer.Option(min=1, help="Classes kept of a prediction, for --for.")] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Classes drawn of a prediction, for --for.")] = None,
    codec: Annotated[str, typer.Option(help="Of new signals; the teacher's table's own unless given.")] = "",
    workers: Annotated[int, typer.Option(min=0, help="Ray actors; 0 works in this process.")] = 0,
    gpus_per_worker: Annotated[float, typer.Option(min=0, help="GPUs of each actor.")] = 0.0,
    ray_address: Annotated[str | None, typer.Option(help="Join this Ray cluster.")] = None,
    sets: Annotated[list[str] | None, typer.Option("--set", help="losses.NAME.KEY=VALUE, for --for.")] = None,
    documents: Annotated[list[str] | None, typer.Option(hidden=True)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Add signals of a teacher to a finished cache; no shard that is there is touched.

    Example: xkd-cache add cache/ --model models/teacher --for dskd
    """
    if documents:
        raise UsageError(
            "a cache does not grow: --documents is not an option of add",
            fix="make a second cache of the new rows, and train with xkd-train --shards a/ --shards b/",
        )
    check_cache(cache)
    if not model:
        raise UsageError("signals are read from a teacher", fix="add --model FOLDER")
    if losses is None and signals is None:
        raise UsageError("no signal is named", fix="add --for LOSS, or --signals hidden_last,topk_ids#64")
    flags = {
        "teacher.losses": names_of(losses), "teacher.topk": topk, "teacher.samples": samples,
        "teacher.word_layers": numbers_of(word_layers),
        "teacher.phrase_layers": numbers_of(phrase_layers), "teacher.codec": codec or None,
    }  # fmt: skip
    given = [f"{key}={toml_text(value)}" for key, value in flags.items() if value is not None]
    run = load_run(None, [*(sets or []), *given])
    from xkd_pipeline.capture.extra_signals import add_signals, signals_named
    from xkd_pipeline.stages import signals_for
    from xkd_pipeline.workers.contract import Workers
    from xkd_pipeline.workers.executor import asked_workers

    teacher, columns = to or only_teacher(cache), names_of(signals)
    named = signals_named(columns) if columns else []

    def wanted(num_layers: int) -> list[Signal]:
        return [*named, *(signals_for(run, num_layers) if run.teacher.losses else ())]

    asked = asked_workers(Workers(count=workers, gpus=gpus_per_worker, address=ray_address))
    built = add_signals(cache, teacher, model, wanted, codec, asked)
    if built is None:
        values: dict[str, Any] = {"table": f"teachers/{teacher}", "made": 0, "signals": []}
        line = f"teachers/{teacher}: the cache holds these signals already"
    else:
        m = built.manifest
        values = {"table": m.table, "documents": m.rows, "made": built.made, "signals": m.spec["signals"]}
        size = sum(c.size for c in m.commits) / 1e6
        line = f"{m.table}: {', '.join(m.spec['signals'])} of {m.rows} documents, {size:.1f} MB"
        line += f"; {built.made} shards made, {built.kept} kept as they are"
    if as_json:
        say_json(values)
    else:
        say(line)

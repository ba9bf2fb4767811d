"""xkd-train: parse the command line, train or evaluate, say what happened."""

from pathlib import Path
from typing import Annotated

import typer

from xkd_schemas.config import load_run, toml_text
from xkd_schemas.console import run as run_app
from xkd_schemas.console import say, say_json
from xkd_schemas.corpus.formats import columns_of
from xkd_schemas.errors import UsageError
from xkd_schemas.flag_defaults import with_defaults

app = typer.Typer(
    name="xkd-train",
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@app.callback(invoke_without_command=True)
def train(
    context: typer.Context,
    run: Annotated[Path | None, typer.Option(help="Run file (TOML); flags override it.")] = None,
    shards: Annotated[
        list[str] | None,
        typer.Option(help="Cache folder, or CACHE=WEIGHT; repeatable: caches of one teacher are read as one."),
    ] = None,
    student: Annotated[str | None, typer.Option(help="Folder, hub name, or new:llama,layers=4,width=256.")] = None,
    student_tokenizer: Annotated[str | None, typer.Option(help="Tokenizer, where the student has none.")] = None,
    student_table: Annotated[str, typer.Option(help="Student table, if several fit.")] = "",
    on_missing: Annotated[
        str, typer.Option(help="Where the cache does not know the student's tokenizer: fail, or align it now.")
    ] = "fail",
    template: Annotated[
        str | None, typer.Option(help="none, alpaca or chat, for --on-missing align; else as the cache was aligned.")
    ] = None,
    loss: Annotated[
        str | None, typer.Option(help="NAME+NAME, weighed as in their papers; see xkd-train losses.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the trained student.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the cache.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps; overrides epochs.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Documents of a step over all processes.")] = None,
    micro_batch_size: Annotated[int | None, typer.Option(help="Documents of a forward pass.")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate of the student.")] = None,
    projector_lr: Annotated[float | None, typer.Option(help="Of all projectors; else the papers' own.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of order, new weights and dropout.")] = None,
    save_every: Annotated[int | None, typer.Option(help="Steps between checkpoints; 0 for ten minutes.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads.")] = None,
    sets: Annotated[list[str] | None, typer.Option("--set", help="SECTION.KEY=VALUE; repeatable.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Train a student from a cache of xkd-cache; the teacher is not needed.

    Example: xkd-train --shards cache/ --student new:llama,layers=4,width=256 --student-tokenizer models/tok
    --loss mta+sra+dwa --out out/student
    """
    if context.invoked_subcommand is not None:
        return
    flags = {
        "train.shards": shards or None, "student.model": student, "student.tokenizer": student_tokenizer,
        "student.template": template, "train.loss": loss,
        "train.out": out, "train.epochs": epochs, "train.steps": steps, "train.batch_size": batch_size,
        "train.micro_batch_size": micro_batch_size, "train.lr": lr, "train.projector_lr": projector_lr,
        "train.seed": seed, "train.save_every": save_every, "train.threads": threads,
    }  # fmt: skip
    given = [f"{key}={toml_text(value)}" for key, value in flags.items() if value is not None]
    settings = load_run(run, [*(sets or []), *given])
    from xkd_trainer.training.loop import describe
    from xkd_trainer.training.loop import train as train_student

    trained = train_student(settings, student_table=student_table, on_missing=on_missing, quiet=as_json)
    if as_json:
        say_json({"out": str(trained.out), "steps": trained.steps, "terms": trained.terms, "weights": trained.weights})
    else:
        describe(trained)


@app.command("eval")
def evaluate(
    student: Annotated[Path, typer.Argument(help="Folder of a trained student.")],
    data: Annotated[str, typer.Option(help="Held-out rows: a file, folder, address or data set name.")],
    form: Annotated[str, typer.Option(help="auto, prompt_response, alpaca, messages or text.")] = "auto",
    column: Annotated[list[str] | None, typer.Option(help="FIELD=COLUMN of the rows; repeatable.")] = None,
    template: Annotated[str | None, typer.Option(help="auto, none, alpaca or chat.")] = None,
    enable_thinking: Annotated[
        str | None, typer.Option(metavar="true|false", help="For the chat template; as trained unless given.")
    ] = None,
    shards: Annotated[
        Path | None, typer.Option(help="Cache of the same rows: adds agreement with the teacher.")
    ] = None,
    rouge: Annotated[bool, typer.Option(help="Also generate responses and score them.")] = True,
    seeds: Annotated[str, typer.Option(help="Seeds of the sampled responses.")] = "10,20,30,40,50",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest response.")] = 128,
    limit: Annotated[int, typer.Option(min=0, help="Rows to generate for; 0 for all.")] = 0,
    dtype: Annotated[str, typer.Option(help="auto (what is fast here), bfloat16, float16 or float32.")] = "auto",
    as_json: JsonOption = False,
) -> None:
    """Bits per byte, ROUGE-L and agreement with the teacher on held-out rows.

    Example: xkd-train eval out/student --data held.jsonl
    """
    from xkd_trainer.evaluation import Request, evaluate_student

    request = Request(
        student=student, data=data, form=form, columns=columns_of(column or []), template=template,
        enable_thinking=_truth(enable_thinking), shards=shards,
        rouge=rouge, seeds=_seeds(seeds), max_new_tokens=max_new_tokens, limit=limit, dtype=dtype,
    )  # fmt: skip
    result = evaluate_student(request)
    if as_json:
        say_json(result)
    else:
        for name, value in result.items():
            say(f"{name}: {value:.4f}" if isinstance(value, float) else f"{name}: {value}")


def _truth(text: str | None) -> bool | None:
    """`true` or `false`; UsageError for anything else."""
    if text not in (None, "true", "false"):
        raise UsageError(f"--enable-thinking {text}: expected true or false")
    return None if text is None else text == "true"


def _seeds(text: str) -> tuple[int, ...]:
    """`10,20` as numbers; UsageError for anything else."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) < 2**64 for part in parts):
        raise UsageError(f"--seeds {text!r}: not a list of whole numbers", fix="e.g. --seeds 10,20,30")
    return tuple(int(part) for part in parts)


@app.command()
def losses(as_json: JsonOption = False) -> None:
    """List the losses: what each needs from the cache, its settings, and its source.

    Example: xkd-train losses
    """
    from xkd_trainer.losses.declaration import describe_loss
    from xkd_trainer.losses.registry import formula, loss_named, loss_names, parse_loss

    described = {name: describe_loss(loss_named(name)) for name in loss_names()}
    if as_json:
        say_json(described)
        return
    for name, parts in described.items():
        say(f"{name}: {parts['source']}")
        say(f"  --loss {name} is {formula(parse_loss(name))}")
        say(f"  needs: {', '.join(parts['needs']) or 'nothing of the teacher'}")
        for setting, signals in parts["more"].items():
            say(f"    with {name}.{setting} also: {', '.join(signals)}")
        if parts["one_tokenizer"]:
            say("  for one tokenizer: the student's must be the teacher's")
        for setting, default in (parts["settings"] | parts["projectors"]).items():
            say(f"  {name}.{setting} = {default}")


def main() -> None:
    """Entry point of the console script."""
    run_app("xkd-train", with_defaults(app))

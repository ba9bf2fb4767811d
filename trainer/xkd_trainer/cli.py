"""xkd-train: parse the command line, train or evaluate, say what happened."""

import os
from pathlib import Path
from typing import Annotated, Final

import typer

from xkd_schemas.config import RunConfig, change_values
from xkd_schemas.console import answer, say, say_json
from xkd_schemas.console import run as run_app
from xkd_schemas.errors import UsageError
from xkd_schemas.flags import ANSWERS, FlagsOf, JsonOption, with_flags

app = typer.Typer(name="xkd-train", pretty_exceptions_enable=False, rich_markup_mode=None)


TRAINING: Final = (
    FlagsOf(
        "student",
        only=("model", "tokenizer", "template", "dtype", "quantization"),
        flags={"model": "--student", **{name: f"--student-{name}" for name in ("tokenizer", "dtype", "quantization")}},
    ),
    FlagsOf(
        "train",
        flags={
            "gradient_checkpointing": "--gradient-checkpointing/--no-gradient-checkpointing",
            "compile": "--compile/--no-compile",
        },
    ),
)


@app.callback(invoke_without_command=True)
@with_flags(*TRAINING, run_file="--run")
def train(
    context: typer.Context,
    run: RunConfig,
    student_table: Annotated[str, typer.Option(help="Student table, if several fit.")] = "",
    on_missing: Annotated[
        str, typer.Option(help="Where the cache does not know the student's tokenizer: fail, or align it now.")
    ] = "fail",
    push: Annotated[str, typer.Option(help="USER/NAME of the hub, where the finished student goes (private).")] = "",
    as_json: JsonOption = False,
) -> None:
    """Train a student from a cache of xkd-cache; the teacher is not needed.

    Example: xkd-train --shards cache/ --student new:llama,layers=4,width=256 --student-tokenizer models/tok
    --loss mta+sra+dwa --out out/student
    """
    if context.invoked_subcommand is not None:
        return
    from xkd_trainer.training.loop import train as train_student

    trained = train_student(run, student_table=student_table, on_missing=on_missing, quiet=as_json)
    if as_json:
        values = {name: getattr(trained, name) for name in ("steps", "terms", "weights", "saved_in", "evaluation")}
        say_json({"out": str(trained.out), **values})
    elif trained.resumed_at == trained.steps:
        say(f"{trained.out}: already trained for {trained.steps} steps with these settings, nothing to do")
    else:
        resumed = f" (resumed at step {trained.resumed_at})" if trained.resumed_at else ""
        terms = ", ".join(f"{name} {value:.4f}" for name, value in sorted(trained.terms.items()))
        best = (
            "; step {step}, {bits_per_byte:.4f} bits per byte".format(**found) if (found := trained.evaluation) else ""
        )
        saved = "" if trained.saved_in == "float32" else f"; saved in {trained.saved_in}"
        say(f"{trained.out}: trained for {trained.steps} steps{resumed}; {terms}{best}{saved}")
    if push and os.environ.get("RANK", "0") == "0":
        from xkd_trainer.training.card import push as push_student

        address = push_student(trained.out, push)
        if not as_json:
            say(f"pushed to {address}")


@app.command("eval")
@with_flags(
    FlagsOf("documents", only=("form", "columns"), flags={"columns": "--column"}),
    FlagsOf("student", only=("template", "enable_thinking"), default="as trained"),
)
def evaluate(
    student: Annotated[Path, typer.Argument(help="Folder of a trained student.")],
    data: Annotated[str, typer.Option(help="Held-out rows: a file, folder, address or data set name.")],
    run: RunConfig,
    shards: Annotated[
        Path | None, typer.Option(help="Cache of the same rows: adds agreement with the teacher.")
    ] = None,
    rouge: Annotated[bool, typer.Option(help="Also generate responses and score them.")] = True,
    seeds: Annotated[str, typer.Option(help="Seeds of the sampled responses.")] = "10,20,30,40,50",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest response.")] = 128,
    limit: Annotated[int, typer.Option(min=0, help="Rows to generate for; 0 for all.")] = 0,
    dtype: Annotated[str, typer.Option(help="auto (what is fast here), bfloat16, float16 or float32.")] = "auto",
    card: Annotated[bool, typer.Option("--card", help="Write the figures into the student's README.md.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Bits per byte, ROUGE-L and agreement with the teacher on held-out rows.

    Prompts are read whole, also where the training cache was made with --max-prompt-tokens.

    Example: xkd-train eval out/student --data held.jsonl
    """
    from xkd_trainer.evaluation import Request, evaluate_student

    request = Request(
        student=student, data=data, form=run.documents.form, columns=run.documents.columns,
        template=run.student.template if "template" in run.student.model_fields_set else None,
        enable_thinking=run.student.enable_thinking, shards=shards,
        rouge=rouge, seeds=_seeds(seeds), max_new_tokens=max_new_tokens, limit=limit, dtype=dtype,
    )  # fmt: skip
    result = evaluate_student(request)
    if card:
        from xkd_trainer.training.card import write_evaluation

        write_evaluation(student, {"data": data} | result)
    texts = {name: f"{value:.4f}" if isinstance(value, float) else value for name, value in result.items()}
    answer(result, [f"{name}: {value}" for name, value in texts.items()], as_json)


@app.command()
@with_flags(FlagsOf("student", only=("template", "enable_thinking"), default="as trained"))
def generate(
    student: Annotated[Path, typer.Argument(help="Folder of a trained student.")],
    prompt: Annotated[list[str], typer.Option(help="What the student is asked; repeatable.")],
    run: RunConfig,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest response.")] = 128,
    sample: Annotated[
        int | None, typer.Option(min=0, help="Seed of a sampled response; the likeliest unless given.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="auto (what is fast here), bfloat16, float16 or float32.")] = "auto",
    as_json: JsonOption = False,
) -> None:
    """Try a student: print what it says to a prompt, in the template it was trained with.

    Example: xkd-train generate out/student --prompt "Who lit the lamp?"
    """
    from xkd_trainer.evaluation import Request, answer_prompts

    request = Request(
        student=student, data="", max_new_tokens=max_new_tokens, dtype=dtype,
        template=run.student.template if "template" in run.student.model_fields_set else None,
        enable_thinking=run.student.enable_thinking,
    )  # fmt: skip
    responses = answer_prompts(request, prompt, seed=sample)
    answer([{"prompt": p, "response": r} for p, r in zip(prompt, responses, strict=True)], responses, as_json)


@app.command()
@with_flags(*ANSWERS)
def sample(
    student: Annotated[Path, typer.Argument(help="Folder of a trained student.")],
    data: Annotated[str, typer.Option(help="Rows with prompts: a file, folder, address or data set name.")],
    run: RunConfig,
    out: Annotated[Path, typer.Option(help="File of the answers.")] = Path("answers.jsonl"),
    as_json: JsonOption = False,
) -> None:
    """Let a student answer the prompts of a corpus: rows of the next round. As xkd-cache generate, without workers.

    The template is the one that the student was trained with, and rows have policy=student, unless you say otherwise.

    Example: xkd-train sample out/student --data prompts.jsonl --out answers.jsonl
    """
    from xkd_trainer.answers import describe, write_answers

    policy = {} if "policy" in run.generation.model_fields_set else {"generation.policy": "student"}
    run = change_values(run, policy | {"teacher.model": str(student)}, "sample")
    found = write_answers(run, data, out)
    answer(found, [describe(found)], as_json)


def _seeds(text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) < 2**64 for part in parts):
        raise UsageError(f"--seeds {text!r}: not a list of whole numbers", fix="e.g. --seeds 10,20,30")
    return tuple(int(part) for part in parts)


@app.command()
@with_flags(*TRAINING, run_file="--run")
def plan(
    run: RunConfig,
    student_table: Annotated[str, typer.Option(help="Student table, if several fit.")] = "",
    as_json: JsonOption = False,
) -> None:
    """Memory that training with these flags would take, part by part; no weight is loaded.

    Example: xkd-train plan --shards cache/ --student models/student --lora-rank 16 --gradient-checkpointing
    """
    from xkd_trainer.training.plan import describe_plan, plan_training

    found = plan_training(run, student_table)
    answer(found, describe_plan(found), as_json)


@app.command()
def export(
    student: Annotated[Path, typer.Argument(help="Folder of a trained student.")],
    to: Annotated[Path, typer.Option(help="New folder.")],
    merge: Annotated[bool, typer.Option("--merge", help="Put a LoRA adapter into the weights below it.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Write a student that LoRA trained as a whole model, which needs neither peft nor the model below it.

    Example: xkd-train export out/adapter --merge --to out/student
    """
    from xkd_trainer.training.files import export_merged

    if not merge:
        raise UsageError("nothing is asked for", fix=f"xkd-train export {student} --merge --to {to}")
    dtype = str(export_merged(student, to)).removeprefix("torch.")
    answer({"out": str(to), "saved_in": dtype}, [f"{to}: a whole student; saved in {dtype}"], as_json)


@app.command()
@with_flags(FlagsOf("train", only=("out",)), FlagsOf("", only=("gpus_per_worker", "ray_address")), run_file="run_file")
def sweep(
    run: RunConfig,
    vary: Annotated[list[str], typer.Option(help="KEY=VALUE,VALUE of the run file, or KEY=[TOML LIST]; repeatable.")],
    student_table: Annotated[str, typer.Option(help="Student table, if several fit.")] = "",
    as_json: JsonOption = False,
) -> None:
    """Train every combination of some settings on one cache, and compare them in one table.

    Cross-entropy of equal steps is the first row, of equal time the last. The same command goes on where it stopped.
    With --ray-address the runs are spread over a cluster whose machines all see the cache and the output.

    Example: xkd-train sweep runs/demo.toml --vary loss=mta,sra --vary train.seed=0,1,2 --out out/sweep
    """
    from xkd_trainer.sweep import failure_of
    from xkd_trainer.sweep import sweep as sweep_runs

    result = sweep_runs(run, vary, student_table=student_table)
    failure = failure_of(result)
    table = (Path(run.train.out) / "sweep.md").read_text().splitlines()
    answer({name: result[name] for name in ("rows", "runs", "remarks")}, table, as_json)
    if failure is not None and as_json:
        raise typer.Exit(failure.exit_code)
    if failure is not None:
        raise failure


@app.command()
def report(
    outs: Annotated[list[Path], typer.Argument(help="Folders of runs, finished or not.")],
    out: Annotated[Path, typer.Option(help="The page.")] = Path("report.html"),
    as_json: JsonOption = False,
) -> None:
    """One HTML file with the curves of several runs; it needs no network and runs no script.

    Example: xkd-train report out/mta out/ce --out report.html
    """
    from xkd_trainer.reports import write_report

    result = write_report(outs, out)
    answer(result, [f"{out}: {len(result['runs'])} runs, {result['bytes']} bytes"], as_json)


@app.command()
def watch(
    out: Annotated[Path, typer.Argument(help="Folder of a run, which another process may be training.")],
    as_json: JsonOption = False,
) -> None:
    """Show how a run is going until it ends; --json prints where it is now, and ends.

    Example: xkd-train watch out/student
    """
    from xkd_trainer.reports import follow, status_of

    if as_json:
        say_json(status_of(out))
    else:
        follow(out)


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
    run_app("xkd-train", app)

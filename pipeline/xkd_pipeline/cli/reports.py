"""The commands that look before anything is cached: plan and pair. cli.py registers them."""

from pathlib import Path
from typing import Annotated, Any

import typer

from xkd_pipeline.cli.options import ThinkingOption
from xkd_schemas.config import RunConfig, load_run, toml_text
from xkd_schemas.console import say, say_json
from xkd_schemas.errors import UsageError

RunOption = Annotated[Path | None, typer.Option("--run", help="Run file (TOML) to take settings from.")]
FormOption = Annotated[str | None, typer.Option(help="auto, prompt_response, alpaca, messages or text.")]
SampleOption = Annotated[int, typer.Option(min=1, help="Rows to look at, spread over the corpus.")]
SetOption = Annotated[list[str] | None, typer.Option("--set", help="SECTION.KEY=VALUE of the run file; repeatable.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def _run_of(path: Path | None, sets: list[str] | None, flags: dict[str, Any]) -> RunConfig:
    """Run file, then --set, then the flags that were given."""
    given = [f"{key}={toml_text(value)}" for key, value in flags.items() if value not in (None, [], "")]
    return load_run(path, [*(sets or []), *given])


def _list(text: str | None, of: type) -> list[Any] | None:
    try:
        return None if text is None else [of(part.strip()) for part in text.split(",") if part.strip()]
    except ValueError:
        raise UsageError(f"{text!r} is not a list of layer numbers", fix="e.g. 22,30") from None


def plan(
    corpus: Annotated[list[str] | None, typer.Argument(help="Files, folders or data set names.")] = None,
    model: Annotated[str | None, typer.Option(help="Folder, .gguf file or hub name of the teacher.")] = None,
    losses: Annotated[str | None, typer.Option("--for", help="Losses whose signals are kept.")] = None,
    student: Annotated[str | None, typer.Option(help="Student or its tokenizer, to count its table too.")] = None,
    budget: Annotated[
        str | None, typer.Option(help="Size the cache may have, e.g. 200GB; shows what to drop to fit.")
    ] = None,
    tokens_per_second: Annotated[float | None, typer.Option(min=1e-6, help="Rate of the teacher.")] = None,
    sample: SampleOption = 256,
    run_file: RunOption = None,
    out: Annotated[Path | None, typer.Option(help="Cache folder, for the free disk there.")] = None,
    form: FormOption = None,
    template: Annotated[str | None, typer.Option(help="auto, chat, alpaca or none.")] = None,
    enable_thinking: ThinkingOption = None,
    word_layers: Annotated[str | None, typer.Option(help="Teacher layers read on words, e.g. 15.")] = None,
    phrase_layers: Annotated[str | None, typer.Option(help="Teacher layers read on phrases, e.g. 22,30.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Longer documents are cut at a word border.")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto (what is fast here), bfloat16, float16 or float32.")] = None,
    codec: Annotated[str | None, typer.Option(help="bf16, bf16-planes (exact) or int8.")] = None,
    spacy_model: Annotated[str | None, typer.Option(help="spaCy pipeline: package or folder.")] = None,
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say what a cache will need: bytes by signal, shards, memory, time. Reads a sample, loads no weights.

    Example: xkd-cache plan train.jsonl --model models/teacher --for mta,sra,dwa --budget 200GB
    """
    from xkd_pipeline.reports.plan import make_plan
    from xkd_pipeline.reports.plan_text import parse_size, plan_lines

    flags = {
        "documents.corpus": corpus, "documents.form": form, "documents.spacy_model": spacy_model,
        "cache": str(out) if out else None, "teacher.model": model, "teacher.losses": _list(losses, str),
        "teacher.template": template, "teacher.enable_thinking": enable_thinking,
        "teacher.word_layers": _list(word_layers, int),
        "teacher.phrase_layers": _list(phrase_layers, int), "teacher.max_tokens": max_tokens,
        "teacher.dtype": dtype, "teacher.codec": codec, "student.tokenizer": student,
    }  # fmt: skip
    run = _run_of(run_file, sets, flags)
    if not run.teacher.model:
        raise UsageError("no teacher is named", fix="xkd-cache plan CORPUS --model FOLDER")
    limit = None if budget is None else parse_size(budget)
    found = make_plan(run, sample=sample, budget=limit, rate=tokens_per_second)
    if as_json:
        say_json(found)
        return
    for line in plan_lines(found):
        say(line)


def pair(
    teacher: Annotated[str, typer.Argument(help="Folder, .gguf file or hub name of the teacher or its tokenizer.")],
    student: Annotated[str, typer.Argument(help="Folder or hub name of the student or its tokenizer.")],
    corpus: Annotated[list[str], typer.Argument(help="Files, folders or data set names.")],
    sample: SampleOption = 256,
    worst: Annotated[int, typer.Option(min=0, help="Least aligned documents to draw.")] = 2,
    width: Annotated[int, typer.Option(min=40, help="Columns of a drawing.")] = 100,
    form: FormOption = None,
    template: Annotated[str | None, typer.Option(help="Of the student: auto, none, alpaca or chat.")] = None,
    teacher_template: Annotated[str | None, typer.Option(help="Of the teacher: auto, none, alpaca or chat.")] = None,
    enable_thinking: ThinkingOption = None,
    max_tokens: Annotated[int | None, typer.Option(help="Longer documents are cut at a word border.")] = None,
    with_models: Annotated[
        bool, typer.Option("--with-models", help="Run both models on the sample: is the teacher better?")
    ] = False,
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say how well two tokenizers go together on some text, and with --with-models whether the teacher is better.

    Before any capture; loads no model unless told to.

    Example: xkd-cache pair models/teacher models/student train.jsonl
    """
    from xkd_pipeline.reports.compare_tokenizers import compare, pair_lines
    from xkd_pipeline.reports.sample import encoder_for, read_sample

    flags = {
        "documents.corpus": corpus, "documents.form": form, "student.template": template,
        "teacher.enable_thinking": enable_thinking, "student.enable_thinking": enable_thinking,
        "teacher.template": teacher_template, "teacher.max_tokens": max_tokens, "student.max_tokens": max_tokens,
    }  # fmt: skip
    run = _run_of(None, sets, flags)
    theirs, ours = encoder_for(teacher, run.teacher), encoder_for(student, run.student)
    rows = read_sample(run, sample)
    found = compare(theirs, ours, rows, worst=worst, width=width)
    if with_models:
        from xkd_pipeline.reports.compare_models import compare_models, model_lines

        found["bits_per_byte"] = compare_models((teacher, student), (theirs, ours), run.teacher.dtype, rows)
    if as_json:
        say_json(found)
        return
    for line in pair_lines(found):
        say(line)
    if with_models:
        for line in model_lines(found["bits_per_byte"]):
            say(line)

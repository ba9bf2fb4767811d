"""The three stages as a run file asks for them, and one line about each result."""

import contextlib
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, Final

from xkd_pipeline.alignment import make_students
from xkd_pipeline.capture.artifacts import sizes_of
from xkd_pipeline.capture.capture import TeacherSettings
from xkd_pipeline.capture.passes import why_streamed
from xkd_pipeline.capture.stage import make_teacher, teacher_layers
from xkd_pipeline.parsing.stage import PROMPTS_CUT, UNUSED, check_parser, make_documents, open_corpus
from xkd_pipeline.tables.writer import Built, Outcome, locked
from xkd_pipeline.workers.contract import Workers
from xkd_schemas.cache.manifest import Plan, record_or_none
from xkd_schemas.cache.table import Table, check_name, only_teacher
from xkd_schemas.codecs import PLAIN
from xkd_schemas.config import AUTO, RunConfig
from xkd_schemas.console import say
from xkd_schemas.corpus.sources import Source, read_documents
from xkd_schemas.durable_files import inside
from xkd_schemas.errors import UsageError, XkdError
from xkd_schemas.signals import Signal
from xkd_schemas.text.templates import chosen_template
from xkd_trainer.losses.declaration import Levels
from xkd_trainer.losses.registry import loss_named, settings_of
from xkd_trainer.models.compute_dtype import Choice, choose_dtype, dtype_named, this_device
from xkd_trainer.models.loading import check_model_name, load_tokenizer

SECONDS: Final = 60
FLOPS: Final = {"cpu": 50e9, "cuda": 100e12}
"""What a core and a GPU may do in a second of a teacher's pass; of either there are slower and faster ones."""
USUAL_WEIGHTS: Final = {"cpu": 200e6, "cuda": 7e9}  # of a teacher that nobody has named yet
CHARS_PER_TOKEN: Final = 4
MOST_CHARS: Final = 400_000  # of a shard, which lies in memory while it is made
DISK: Final = 2e9  # bytes of a streamed teacher's weights that are read in a second, where it was not measured
PLACES: Final = 4
ROWS_AT_A_PLACE: Final = 64


def documents_stage(run: RunConfig, workers: Workers | None = None, echo: Callable[[str], None] = say) -> Outcome:
    """Read and parse the corpus, as `xkd-cache documents`; `echo` is told at once what each source was taken for.

    `workers` are those of the run file unless given, and without their GPUs.
    """
    d = run.documents
    check_parser(d.parser)
    sources = open_corpus(d)
    for source in sources:
        echo(source.describe())
    rows, why = rows_per_shard(run, sources)
    if why:
        echo(f"shards of {rows} rows: {why}; documents.rows_per_shard=N sets it")
    root = Path(run.cache)
    with locked(root):
        built = make_documents(root, sources, d.model_copy(update={"rows_per_shard": rows}), on_cpus(run, workers))
    m = built.manifest
    rejected = sum(c.rejects.rows for c in m.commits if c.rejects)
    extra = "".join(f", {name} {number}" for name, number in _counts(m, "parser:").items())
    extra += f", {m.count(PROMPTS_CUT)} prompts cut to {d.max_prompt_tokens} tokens" if d.max_prompt_tokens else ""
    unused = _counts(m, UNUSED)
    extra += "; keys not used: " + ", ".join(f"{name} ({n})" for name, n in unused.items()) if unused else ""
    values = {
        "sources": [source.describe() for source in sources], "words": m.count("words"),
        "phrases": m.count("phrases"), "rejected": rejected, "unused": unused,
        "prompts_cut": m.count(PROMPTS_CUT) if d.max_prompt_tokens else 0,
    }  # fmt: skip
    words = f"{m.count('words')} words, {m.count('phrases')} phrases"
    return _outcome(built, f"{m.rows} documents, {words}, {rejected} rows rejected{extra}", values)


def on_cpus(run: RunConfig, workers: Workers | None) -> Workers:
    """The workers of a stage without a model: those that were given, else those of the run file, without GPUs."""
    return replace(workers or Workers.of(run), gpus=0.0)


def rows_per_shard(run: RunConfig, sources: Sequence[Source]) -> tuple[int, str]:
    """Rows of a shard, and why it is so many where that is decided now: "" where run file or plan have it."""
    if run.documents.rows_per_shard:
        return run.documents.rows_per_shard, ""
    if begun := record_or_none(Path(run.cache) / "documents" / "plan.json", Plan):
        return int(begun.spec["rows_per_shard"]), ""
    device = this_device()
    weights, whose, streamed = USUAL_WEIGHTS[device], "a teacher", ""
    if run.teacher.model:
        with contextlib.suppress(XkdError):  # said by the stage that needs it
            weights, whose = float(sizes_of(run.teacher.model).weights), "the teacher"
            streamed = why_streamed(run.teacher, dtype_named(teacher_dtype(run, device).dtype), device)
    flops = FLOPS[device] * (run.teacher.threads if device == "cpu" else 1)
    tokens = max(SECONDS * flops / (2 * weights), 4 * flops / DISK if streamed else 0)  # 4 times as long as reading
    chars = min(MOST_CHARS, round(tokens) * CHARS_PER_TOKEN)
    rows = max(1, int(chars / max(1.0, *(_mean_chars(source, run.documents.max_chars) for source in sources))))
    about = f"about {chars:,} characters, which {whose} of {weights / 1e9:.2g} billion weights reads in a minute"
    about += f" or less on this {'CPU' if device == 'cpu' else 'GPU'}"
    more = ", and so many that its blocks are not read from disk most of the time" if streamed else ""
    return rows, about + more


def _mean_chars(source: Source, max_chars: int) -> float:
    """Mean length of a row, at the place of the source where rows are longest."""
    found = [0.0]
    for place in range(PLACES):
        rows = list(islice(source.rows(place * source.num_rows // PLACES), ROWS_AT_A_PLACE))
        documents, _ = read_documents(source.name, source.form, source.columns, rows, max_chars=max_chars)
        found.append(sum(len(document.text) for document in documents) / max(1, len(rows)))
    return max(found)


def signals_for(run: RunConfig, num_layers: int) -> list[Signal]:
    """The signals that the named losses declare, plus the teacher's own choice, which evaluation compares with."""
    t = run.teacher
    pairs = teacher_layers(num_layers, t.word_layers, t.phrase_layers)
    levels = Levels(pairs, num_layers=num_layers, states=[layer for layer, _ in pairs])
    wanted, settings = {Signal("argmax")}, settings_of(t.losses, run.losses)
    for name in t.losses:
        wanted.update(loss_named(name).needs(settings[name], levels))
    numbered = (replace(s, top=t.samples if s.kind.drawn else t.topk) if s.kind.top else s for s in wanted)
    return sorted(numbered, key=lambda s: s.column)


def teacher_dtype(run: RunConfig, device: str) -> Choice:
    """The dtype that this run's teacher gets on `device`; auto goes on in that of its table, where it is begun."""
    table = f"teachers/{run.teacher.name or plain_name(run.teacher.model)}"
    if run.teacher.dtype == AUTO:
        begun = record_or_none(inside(Path(run.cache), *table.split("/")) / "plan.json", Plan)
        if begun:
            return replace(choose_dtype(begun.spec["dtype"], device), why=f"as {table} was begun")
    return choose_dtype(run.teacher.dtype, device)


def device_map_of(run: RunConfig, workers: Workers) -> str:
    """Where the teacher's weights go: as the run or its JSON file says, and on all GPUs of a worker with several."""
    asked = run.teacher.device_map
    if asked.endswith(".json") and Path(asked).is_file():
        return Path(asked).read_text(encoding="utf-8", errors="replace")
    return asked or (AUTO if workers.gpus > 1 else "")


def teacher_stage(run: RunConfig, workers: Workers | None = None, echo: Callable[[str], None] = say) -> Outcome:
    """Run the teacher over the documents and keep its signals, as `xkd-cache teacher`.

    `workers` are those of the run file unless given; `echo` is told at once in which dtype it runs, and why.
    """
    t, workers = run.teacher, workers or Workers.of(run)
    if not t.model:
        raise UsageError("no teacher is named", fix="xkd-cache teacher CACHE --model FOLDER --for mta,sra,dwa")
    check_name(t.name, "--name")
    settings_of(t.losses, run.losses)  # what is wrong with a loss is said before anything is loaded
    root = Path(run.cache)
    Table(root, "documents")
    check_model_name(t.model)
    template = chosen_template(t.template, load_tokenizer(t.model))
    echo(f"template: {template}")
    device = "cuda" if workers.gpus else this_device()
    dtype = teacher_dtype(run, device)
    echo(dtype.line)
    settled = {"template": template, "dtype": dtype.dtype, "device": device, "device_map": device_map_of(run, workers)}
    settings = TeacherSettings(**t.model_dump() | settled)
    if why := why_streamed(settings, dtype_named(dtype.dtype), this_device()):
        echo(f"the teacher's blocks are read from disk one after another: {why}")
    with locked(root):
        built = make_teacher(root, t.name or plain_name(t.model), settings, lambda n: signals_for(run, n), workers)
    m = built.manifest
    size = sum(c.size for c in m.commits)
    tokens = m.count("tokens")
    kept = ", ".join(m.spec["signals"])
    line = f"{tokens} tokens, {size / 1e6:.1f} MB ({size / max(1, tokens):.0f} bytes a token), kept: {kept}"
    line += _codec_error(m) + _dequantized(m) + _extended(m) + _unusable(m)
    values = {"tokens": tokens, "bytes": size, "signals": list(m.spec["signals"]), "extended": m.count("extended")}
    rate = built.tokens / built.seconds if built.made else None
    values |= {"codec_error": m.constants.get("codec_error", {}), "tokens_per_second": rate}
    outcome = _outcome(built, line, values | {"seconds": built.seconds if built.made else None})
    said = f" in {built.seconds:.1f} s, {rate:.1f} tokens per second" if rate is not None else ""
    return replace(outcome, line=outcome.line + said)


def align_stage(run: RunConfig, workers: Workers | None = None, _echo: Callable[[str], None] = say) -> Outcome:
    """Tokenize and align for one student, as `xkd-cache align`; there is nothing to tell before it ends."""
    s = run.student
    tokenizer = s.tokenizer or ("" if s.model.startswith("new:") else s.model)
    if not tokenizer:
        raise UsageError("no student tokenizer is named", fix="xkd-cache align CACHE --student FOLDER")
    root = Path(run.cache)
    check_name(s.name, "--name")
    taught = run.teacher.name or only_teacher(root)
    check_name(taught, "--teacher")
    Table(root, f"teachers/{taught}")
    template = chosen_template(s.template, load_tokenizer(tokenizer))
    settings = s.model_copy(update={"tokenizer": tokenizer, "template": template})
    with locked(root):
        built = make_students(root, s.name or plain_name(tokenizer), taught, settings, on_cpus(run, workers))
    m = built.manifest
    targets, exact, spans = m.count("targets"), m.count("exact_pairs"), m.count("spans")
    values = {"tokens": m.count("tokens"), "targets": targets, "spans": spans, "exact_pairs": exact}
    values["extended"] = m.count("extended")
    line = (
        f"template {template}, {values['tokens']} student tokens, {spans} aligned spans, "
        f"{100 * exact / max(1, spans):.1f} % of them one token to one{_extended(m)}{_unusable(m)}"
    )
    return _outcome(built, line, values)


def _outcome(built: Built, line: str, values: dict[str, Any]) -> Outcome:
    m = built.manifest
    made = f"{built.made} shards made, {built.kept} reused" if built.made else f"all {built.kept} shards reused"
    smaller = [c.care.batch for c in m.commits if c.care and c.care.batch]
    if smaller:
        made += f"; {len(smaller)} for want of memory in batches down to {min(smaller)}"
    common = {
        "table": m.table, "documents": m.rows, "made": built.made, "reused": built.kept, "root": m.root,
        "smaller_batches": len(smaller),
    }  # fmt: skip
    return Outcome(line=f"{m.table}: {line}; {made}", values={**common, **values})


def _counts(manifest: Any, prefix: str) -> dict[str, int]:
    names = sorted({name for c in manifest.commits for name in c.counts if name.startswith(prefix)})
    return {name.removeprefix(prefix): manifest.count(name) for name in names}


def _codec_error(manifest: Any) -> str:
    """What the codec and drawn classes cost, in words; nothing where signals are stored as they are."""
    error = dict(manifest.constants.get("codec_error", {}))
    draws = {name: error.pop(name) for name in list(error) if name.startswith("sampled#")}
    kl = f", next-token KL {error.pop('kl_nats'):.2g} nats" if "kl_nats" in error else ""
    coded = error and manifest.spec["codec"] != PLAIN
    said = f"; codec {manifest.spec['codec']}: largest relative error {max(error.values()):.2g}{kl}" if coded else ""
    return said + "".join(f"; {name}: relative error {value:.2g}, right on average" for name, value in draws.items())


def _dequantized(manifest: Any) -> str:
    """Which quantised weights are kept as plain numbers, for losses multiply with them."""
    parts = " and ".join(manifest.constants.get("dequantized", ()))
    return f"; quantised {parts} kept as plain numbers" if parts else ""


def _extended(manifest: Any) -> str:
    tokens, documents = manifest.count("extended"), manifest.count("extended_documents")
    return f"; extended intervals: {tokens} tokens of {documents} documents" if tokens else ""


def _unusable(manifest: Any) -> str:
    parts = [f"{number} {status}" for status, number in _counts(manifest, "status:").items() if status != "ok"]
    parts += [f"{manifest.count('cut')} cut to fit"] if manifest.count("cut") else []
    return f"; documents not used or cut: {', '.join(parts)}" if parts else ""


def plain_name(model: str) -> str:
    """A table name made of a path or hub name.

    >>> plain_name("models/SmolLM2-135M/")
    'SmolLM2-135M'
    """
    last = model.replace("\\", "/").rstrip("/").rpartition("/")[2]
    return re.sub(r"[^A-Za-z0-9._-]+", "-", last.removesuffix(".gguf")).strip("-._")[:128] or "model"


def preprocess(run: RunConfig, workers: Workers | None = None, echo: Callable[[str], None] = say) -> list[Outcome]:
    """All three stages in order, as `xkd-cache preprocess`; what is there is reused. `echo` is told of each result."""
    settings_of(run.teacher.losses, run.losses)  # refuses a misspelt one before the corpus is parsed
    outcomes = []
    for stage in (documents_stage, teacher_stage, align_stage):
        outcomes.append(stage(run, workers, echo))
        echo(outcomes[-1].line)
    return outcomes

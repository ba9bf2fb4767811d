"""What a cache will need before it is made, in numbers and in lines for people: bytes, shards, memory, time.

Reads a sample and a model's config only; of a teacher that will be streamed also a few bytes, to know how fast they
come.

The sample is parsed and tokenized as the run would do it. Its signals are counted: values of a document times bytes of
a value. What is not in the sample is taken to be like it.
"""

import os
import re
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa

from xkd_pipeline.alignment import align_rows
from xkd_pipeline.capture.artifacts import Sizes, sizes_of, weight_files
from xkd_pipeline.capture.measure import LOGIT_BYTES
from xkd_pipeline.capture.passes import why_streamed
from xkd_pipeline.parsing.stage import columns_of, parser_for, plan_shards
from xkd_pipeline.reports.sample import Sample, read_sample, reasons
from xkd_pipeline.stages import DISK, FLOPS, rows_per_shard, signals_for, teacher_dtype
from xkd_pipeline.tables.shard import DocumentRows, encoder_for, token_columns, token_counts
from xkd_schemas.codecs import CODECS
from xkd_schemas.config import RunConfig
from xkd_schemas.documents import DOCUMENTS, DocumentBatch, Spans, checked_spans
from xkd_schemas.durable_files import bytes_below
from xkd_schemas.errors import UsageError
from xkd_schemas.page import format_size
from xkd_schemas.progress import Progress, show_time
from xkd_schemas.ragged import Ragged, batch_of
from xkd_schemas.signals import count_values, signal_bytes, teacher_schema
from xkd_schemas.text.encode import TRIED, Encoder
from xkd_schemas.tokens import OK, STUDENTS, TOKEN_FIELDS, TokenBatch
from xkd_trainer.models.compute_dtype import dtype_named, this_device
from xkd_trainer.models.forward import check_ids

LIBRARIES: Final = 600 * 2**20  # resident bytes of Python with torch and transformers
PADDING: Final = 1.01  # of Arrow's buffers, as a share of their bytes
TIMED: Final = 64 * 2**20  # bytes of a streamed teacher that are read, to know how fast its disk is
CHECKS: Final = 7  # times that a streamed teacher is read before its first shard
_SIZE: Final = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(I?)B?")


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanSample:
    """A sample as the teacher reads it."""

    sample: Sample
    spans: tuple[Spans, ...]
    encoder: Encoder  # the teacher's
    tokens: TokenBatch
    counts: Counter[str]  # see `count_values`
    shards: int  # of one table of the whole corpus

    def of_corpus(self, number: float) -> int:
        """A number of the sample for the whole corpus."""
        return round(number * self.sample.scale)

    def table_bytes(self, schema: pa.Schema, columns: Mapping[str, Any]) -> int:
        """Bytes of the corpus's table that has these columns of the sample."""
        return self.of_corpus(PADDING * batch_of(schema, dict(columns)).serialize().size) + self.frame_bytes(schema)

    def frame_bytes(self, schema: pa.Schema) -> int:
        """Bytes of a table without rows: the schema at both ends of each shard, and the header of its record batch."""
        return self.shards * int(2 * schema.serialize().size + pa.RecordBatch.from_pylist([], schema).serialize().size)


def read_plan_sample(run: RunConfig, wanted: int) -> PlanSample:
    """Read, parse and tokenize a sample of at most `wanted` rows; raises as those do."""
    sample = read_sample(run, wanted)
    encoder = encoder_for(run.teacher.model, run.teacher)
    encoder.check(sample.documents[:TRIED])
    with Progress("parse the sample", len(sample.documents)):
        parsed = parser_for(run.documents).parse(sample.documents)
    spans = tuple(checked_spans(d, s) for d, s in zip(sample.documents, parsed, strict=True))
    tokens = encoder.encode_batch(sample.documents)
    return PlanSample(
        sample=sample, spans=spans, encoder=encoder, tokens=tokens,
        counts=sum((count_values(t, s.words, s.phrases) for t, s in zip(tokens, spans, strict=True)), Counter()),
        shards=len(plan_shards(sample.sources, rows_per_shard(run, sample.sources)[0])),
    )  # fmt: skip


def teacher_parts(run: RunConfig, look: PlanSample, model: Sizes, codec: str) -> dict[str, int]:
    """Bytes of the corpus's teacher table by column, the largest first; "tokens" are the shared columns."""
    signals, tokens = signals_for(run, model.layers), pa.schema(TOKEN_FIELDS)
    documents = look.sample.documents
    sizes = {s.column: signal_bytes(s, model.width, codec, look.counts, len(documents)) for s in signals}
    parts = {column: look.of_corpus(PADDING * size) for column, size in sizes.items()}
    shared = {"doc_id": [d.doc_id for d in documents], **token_columns(look.tokens)}
    parts["tokens"] = look.table_bytes(tokens, shared)
    parts["frames"] = look.frame_bytes(teacher_schema(signals, model.width, codec)) - look.frame_bytes(tokens)
    return dict(sorted(parts.items(), key=lambda part: -part[1]))


def losses_of(run: RunConfig, layers: int) -> dict[str, list[str]]:
    """Column -> the losses that need it, or "evaluation"."""
    found: dict[str, list[str]] = {}
    for loss in ("evaluation", *run.teacher.losses):
        teacher = run.teacher.model_copy(update={"losses": () if loss == "evaluation" else (loss,)})
        for signal in signals_for(run.model_copy(update={"teacher": teacher}), layers):
            if found.get(signal.column) != ["evaluation"]:
                found.setdefault(signal.column, []).append(loss)
    return found


def student_bytes(look: PlanSample, encoder: Encoder) -> int:
    """Bytes of the students table."""
    documents = look.sample.documents
    rows = DocumentRows(
        doc_ids=[d.doc_id for d in documents], block=DocumentBatch.of(documents),
        words=Ragged.of([spans.words for spans in look.spans], np.int32, 2),
        phrases=Ragged.of([spans.phrases for spans in look.spans], np.int32, 2),
    )  # fmt: skip
    return look.table_bytes(STUDENTS, align_rows(encoder, rows, look.tokens)[1])


def tokenizer_bytes(encoders: Iterable[Encoder]) -> int:
    """Bytes of these tokenizers as they are saved in a cache."""
    size = 0
    for encoder in encoders:
        with tempfile.TemporaryDirectory(prefix="xkd-plan-") as folder:
            encoder.tokenizer.save_pretrained(folder)
            size += bytes_below(Path(folder))
    return size


def memory_parts(
    run: RunConfig, look: PlanSample, model: Sizes, dtype: str, teacher: int, *, streamed: bool
) -> dict[str, int]:
    """Estimated peak of one worker of the teacher stage, in bytes."""
    layers = len({s.layer for s in signals_for(run, model.layers) if s.layer is not None})
    size = dtype_named(dtype).itemsize
    longest = int(np.diff(look.tokens.first).max())
    tokens = max(run.teacher.batch_tokens, longest)
    kept = model.weights
    if streamed:  # a block that runs, one that is read, and one for what its reading takes
        kept = max(model.file_numbers, kept - model.layers * model.block) + 3 * model.block
    return {
        "libraries": LIBRARIES,
        "weights": model.stored_bytes or kept * size,
        "states": tokens * (model.width * (size * 8 + 8 * layers) + size * 3 * model.inner + 4 * longest),
        "logits": 3 * LOGIT_BYTES,
        "shard": 3 * teacher // max(1, look.shards),
    }


def plan_stream(run: RunConfig, model: Sizes, dtype: str, tokens: int, shards: int, rate: float) -> dict[str, Any]:
    """How long reading the blocks takes and how long computing, where they are streamed; {} where they are not."""
    device = this_device()
    why = why_streamed(run.teacher, dtype_named(dtype), device)
    if not why:
        return {}
    stored, disk = model.weights * model.number_bytes, disk_rate(run.teacher.model)
    flops = FLOPS[device] * (run.teacher.threads if device == "cpu" else 1)
    speed = rate or flops / (2 * model.weights)
    group, size = tokens / max(1, shards), dtype_named(dtype).itemsize
    seconds = {"read": (shards + CHECKS) * stored / (disk or DISK), "compute": tokens / speed}
    return {
        "why": why, "group_tokens": round(group), "group_bytes": round(group * model.width * size),
        "bytes": stored, "disk_rate": disk or DISK, "disk_measured": bool(disk), "compute_rate": speed,
        "rate_given": bool(rate), "read_seconds": seconds["read"], "compute_seconds": seconds["compute"],
        "limit": "reading" if seconds["read"] > seconds["compute"] else "computing",
    }  # fmt: skip


def disk_rate(name: str) -> float:
    """Bytes of a model's weights that come from its disk in a second; 0.0 where they are not here."""
    try:
        file = max(weight_files(name), key=lambda path: path.stat().st_size)
        size = min(file.stat().st_size, TIMED)
        with file.open("rb", buffering=0) as opened:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(opened.fileno(), 0, size, os.POSIX_FADV_DONTNEED)  # not what is in memory already
            start = time.perf_counter()
            opened.read(size)
            return size / (time.perf_counter() - start)
    except (OSError, ValueError):
        return 0.0


def give_or_take(values: Sequence[int], sizes: Sequence[int], scale: float) -> float:
    """Two standard errors of a total that grows with `sizes` and is estimated from these values, as a share of it.

    >>> [round(give_or_take([1, 3, 1, 3], sizes, scale=100.0), 2) for sizes in ([1, 1, 1, 1], [10, 30, 10, 30])]
    [0.57, 0.0]
    """
    if sum(values) == 0 or sum(sizes) == 0 or len(values) < 2:
        return 0.0
    rest = np.array(values, np.float64) - np.array(sizes) * (sum(values) / sum(sizes))
    error = float(np.std(rest, ddof=1)) * float(np.sqrt(max(0.0, 1 - 1 / scale) / len(values)))
    return 2 * error / float(np.mean(values))


def make_plan(
    run: RunConfig, *, sample: int = 256, budget: int | None = None, rate: float | None = None
) -> dict[str, Any]:
    """What the cache will need, as `xkd-cache plan --json`; loads no weights.

    Args:
        run: Corpus, teacher, losses, and a student if its table is to be counted.
        sample: Rows to read at most.
        budget: Bytes that the whole cache may take.
        rate: Tokens that the teacher reads in a second, if known.
    """
    t, s = run.teacher, run.student
    model = sizes_of(t.model)
    signals_for(run, model.layers)  # refuses an unknown loss or layer before anything is read
    dtype = teacher_dtype(run, this_device())
    look = read_plan_sample(run, sample)
    check_ids(look.tokens.ids, look.encoder.tokenizer, model.embeddings)
    documents, lengths = look.sample.documents, np.diff(look.tokens.first).tolist()
    student = s.tokenizer or ("" if s.model.startswith("new:") else s.model)
    students = [encoder_for(student, s)] if student else []
    fixed = {
        "documents": look.table_bytes(DOCUMENTS, columns_of(documents, look.spans)),
        "students": student_bytes(look, students[0]) if students else None,
        "tokenizers": tokenizer_bytes([look.encoder, *students]),
        "files": model.file_numbers * min(model.number_bytes, dtype_named(dtype.dtype).itemsize),
    }
    others = sum(size or 0 for size in fixed.values())
    by_codec = {codec: teacher_parts(run, look, model, codec) for codec in CODECS}
    parts, needs = by_codec[t.codec], losses_of(run, model.layers)
    teacher = sum(parts.values())
    tokens = look.of_corpus(sum(lengths))
    stream = plan_stream(run, model, dtype.dtype, tokens, look.shards, rate or 0.0)
    memory = memory_parts(run, look, model, dtype.dtype, teacher, streamed=bool(stream))
    seconds = max(stream["read_seconds"], stream["compute_seconds"]) if stream else tokens / rate if rate else None
    cache = Path(run.cache).absolute()
    there = next(path for path in (cache, *cache.parents) if path.is_dir())
    return {
        "corpus": [source.describe() for source in look.sample.sources],
        "rows": look.sample.corpus_rows,
        "sample": {
            "rows": look.sample.rows, "documents": len(documents), "rejected": len(look.sample.rejected),
            "reasons": reasons(look.sample.rejected), "unusable": sum(s != OK for s in look.tokens.statuses),
            "cut": token_counts([d.text for d in documents], look.tokens)["cut"],
        },
        "model": {
            **{name: getattr(model, name) for name in ("architecture", "layers", "width", "classes", "weights")},
            **({"quantization": model.quantization} if model.quantization else {}),
        },
        "template": look.encoder.template,
        "dtype": dtype.dtype, "dtype_why": dtype.why, "dtype_warning": dtype.warning,
        "tokens": tokens,
        "give_or_take": give_or_take(lengths, look.sample.sizes, look.sample.scale),
        "targets": look.of_corpus(look.counts["N"]),
        "words": look.of_corpus(sum(len(s.words) for s in look.spans)),
        "phrases": look.of_corpus(sum(len(s.phrases) for s in look.spans)),
        "columns": [
            {"column": name, "bytes": size, "bytes_per_token": size / max(1, tokens), "losses": needs.get(name, [])}
            for name, size in parts.items()
        ],
        "teacher_bytes": teacher, "bytes_per_token": teacher / max(1, tokens),
        **{f"{name}_bytes": size for name, size in fixed.items()},
        "bytes": teacher + others, "free": shutil.disk_usage(there).free,
        "codec": t.codec,
        "codecs": {c: others + sum(sizes.values()) for c, sizes in by_codec.items() if c != t.codec},
        "shards": look.shards, "shard_bytes": teacher // max(1, look.shards),
        "memory": memory, "memory_bytes": sum(memory.values()),
        "seconds": seconds, "rate": rate, "stream": stream,
        "budget": budget,
    }  # fmt: skip


def plan_lines(plan: dict[str, Any]) -> Iterator[str]:
    """Lines of `make_plan`'s result."""
    yield from plan["corpus"]
    yield from _describe_sample(plan)
    yield ""
    yield f"{'kept, codec ' + plan['codec']:<28}{'bytes per token':>16}{'corpus':>12}  needed by"
    for column in plan["columns"]:
        size = format_size(column["bytes"])
        losses = ", ".join(column["losses"])
        yield f"{column['column']:<28}{column['bytes_per_token']:>16.1f}{size:>12}  {losses}".rstrip()
    yield f"{'teachers/':<28}{plan['bytes_per_token']:>16.1f}{format_size(plan['teacher_bytes']):>12}"
    for title, name in (("documents/", "documents"), ("students/", "students"), ("tokenizers", "tokenizers"),
                        ("head and embeddings", "files")):  # fmt: skip
        size = plan[f"{name}_bytes"]
        yield f"{title:<44}" + ("  not counted: no --student" if size is None else f"{format_size(size):>12}")
    yield ""
    yield from _describe_needs(plan)
    if plan["budget"] is not None:
        yield from _advise(plan)


def _describe_sample(plan: dict[str, Any]) -> Iterator[str]:
    sample, model = plan["sample"], plan["model"]
    why = f" ({sample['reasons']})" if sample["reasons"] else ""
    yield (
        f"sample: {sample['rows']} of {plan['rows']} rows, {sample['rejected']} rejected{why}, {sample['unusable']} "
        f"unusable for the teacher, {sample['cut']} cut to its length"
    )
    yield (
        f"teacher: {model['architecture']}, {model['layers']} layers, width {model['width']}, {model['classes']} "
        f"classes, {model['weights'] / 1e6:.1f} M weights in {plan['dtype']}; only its configuration was read"
    )
    if "quantization" in model:
        yield (
            f"quantised: {model['quantization']['quant_method']}; what that costs is measured by "
            "xkd-cache verify --recompute K --model FULL"
        )
    yield f"template: {plan['template']}"
    yield f"dtype: {plan['dtype']}, {plan['dtype_why']}"
    if plan["dtype_warning"]:
        yield f"warning: {plan['dtype_warning']}"
    of = "in the corpus"
    if sample["rows"] < plan["rows"]:
        of += f", give or take {100 * plan['give_or_take']:.0f} % as this sample varies (a larger --sample is closer)"
    yield (
        f"{plan['tokens']} tokens, {plan['targets']} of them predicted, {plan['words']} words, "
        f"{plan['phrases']} phrases {of}"
    )


def _describe_needs(plan: dict[str, Any]) -> Iterator[str]:
    fits = "fits" if plan["bytes"] <= plan["free"] else "DOES NOT FIT"
    yield f"needed: {format_size(plan['bytes'])}; free on that disk: {format_size(plan['free'])}: {fits}"
    yield f"shards: {plan['shards']} of {format_size(plan['shard_bytes'])}"
    parts = ", ".join(f"{name} {format_size(size)}" for name, size in plan["memory"].items())
    yield f"memory of one worker, an estimate: {format_size(plan['memory_bytes'])} ({parts})"
    if plan["stream"]:
        yield from _describe_stream(plan["stream"])
    elif plan["seconds"] is None:
        yield (
            "time: not known. Run xkd-cache teacher on a few hundred rows, and give the tokens per second of its last "
            "line with --tokens-per-second"
        )
    else:
        yield f"time: {show_time(plan['seconds'])} at {plan['rate']:g} tokens per second"


def _describe_stream(stream: dict[str, Any]) -> Iterator[str]:
    yield f"the teacher's blocks are read from disk one after another: {stream['why']}"
    yield (
        f"group for which a block is read once: a shard of {stream['group_tokens']:,} tokens, whose states take "
        f"{format_size(stream['group_bytes'])} between two blocks; documents.rows_per_shard=N sets it"
    )
    disk = f"{format_size(stream['disk_rate'])} per second, {'measured' if stream['disk_measured'] else 'assumed'}"
    rate = f"{stream['compute_rate']:.3g} tokens per second, {'as given' if stream['rate_given'] else 'by arithmetic'}"
    read, compute = (show_time(stream[f"{what}_seconds"]) for what in ("read", "compute"))
    yield f"time: reading {read} ({disk}), computing {compute} ({rate}), both at once: {stream['limit']} is the limit"


def _advise(plan: dict[str, Any]) -> Iterator[str]:
    budget, excess = plan["budget"], plan["bytes"] - plan["budget"]
    if excess <= 0:
        yield f"budget {format_size(budget)}: the cache fits"
        return
    yield f"budget {format_size(budget)}: the cache is {format_size(excess)} too large. What to change:"
    smaller = [f"--codec {codec} needs {format_size(size)}" for codec, size in plan["codecs"].items()]
    yield f"  {'; '.join(smaller)}: bf16-planes loses nothing, int8 rounds states to 255 steps"
    yield (
        "  drop a loss from --for, or name fewer --word-layers and --phrase-layers: the table above begins with the "
        "largest signals; --set losses.mta.hid=off drops span_vectors; rskd, for one tokenizer, needs no hidden_last"
    )
    once = plan["files_bytes"] + plan["tokenizers_bytes"]
    if once < budget:
        yield f"  keep {100 * (budget - once) / (plan['bytes'] - once):.0f} % of the documents, or lower --max-tokens"
    else:
        yield f"  head, embeddings and tokenizers alone take {format_size(once)}: use a teacher with fewer classes"


def parse_size(text: str) -> int:
    """A size as people write it; GB is 10^9 bytes, GiB 2^30.

    >>> parse_size("200GB"), parse_size("1.5 MiB")
    (200000000000, 1572864)
    """
    found = _SIZE.fullmatch(text.strip().upper())
    if found is None:
        raise UsageError(f"{text!r} is not a size", fix="e.g. --budget 200GB")
    return int(float(found[1]) * (1024 if found[3] else 1000) ** " KMGT".index(found[2] or " "))

"""What a cache will need before it is made: bytes, shards, memory, time. Reads a sample and a model's config only;
of a teacher that will be streamed also a few bytes, to know how fast they come.

The sample is parsed and tokenized as the run would do it. Its signals are counted: values of a document times bytes of
a value. What is not in the sample is taken to be like it.

Legend for this file
    T tokens    R kept rows    N predicted targets    K words or phrases of a document (see xkd_schemas.signals)
"""

import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
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
from xkd_schemas.codecs import CODECS, bits_of
from xkd_schemas.config import RunConfig
from xkd_schemas.documents import DOCUMENTS, Spans, checked_spans
from xkd_schemas.durable_files import bytes_below
from xkd_schemas.progress import Progress
from xkd_schemas.ragged import Ragged, batch_of
from xkd_schemas.signals import Signal, count_pairs, teacher_schema
from xkd_schemas.text.batches import DocumentBatch, TokenBatch
from xkd_schemas.text.encode import TRIED, Encoder
from xkd_schemas.tokens import OK, STUDENTS, TOKEN_FIELDS, Tokens, kept_rows, predictors
from xkd_trainer.models.compute_dtype import dtype_named, this_device
from xkd_trainer.models.forward import check_ids

LIBRARIES: Final = 600 * 2**20  # resident bytes of Python with torch and transformers
PADDING: Final = 1.01  # of Arrow's buffers, as a share of their bytes
VALUE_BYTES: Final = {"bf16": 2, "float16": 2, "float32": 4, "int32": 4}
OFFSET_BYTES: Final = 8  # a list column has one offset for each row
TIMED: Final = 64 * 2**20  # bytes of a streamed teacher that are read, to know how fast its disk is
CHECKS: Final = 7  # times that a streamed teacher is read before its first shard


def count_values(tokens: Tokens, words: Iterable[Any], phrases: Iterable[Any]) -> Counter[str]:
    """How many values each kind of signal has of a document, by T, R, N, "word K", "phrase K(K-1)/2" and so on.

    Nothing of a document that the teacher cannot read; intervals count up to where it reads (see `spans_read`).
    """
    end = tokens.num_chars if len(tokens.ids) else 0
    found = Counter(T=len(tokens.ids), R=len(kept_rows(tokens.targets)), N=len(predictors(tokens.targets)))
    for unit, spans in (("word", words), ("phrase", phrases)):
        k = sum(start < end for start, _ in spans)
        found.update({f"{unit} K": k, f"{unit} K(K-1)/2": count_pairs(k)})
    return found


def signal_bytes(signal: Signal, width: int, codec: str, counts: Mapping[str, int], documents: int) -> int:
    """Bytes of one signal's columns in the teacher table of so many documents, which have `counts` together."""
    values = counts.get(f"{signal.unit} {signal.kind.per}" if signal.unit else signal.kind.per, 0)
    if signal.kind.wide:
        size = vector_bytes(codec, width, values // max(1, documents))
    else:
        size = VALUE_BYTES[signal.kind.dtype] * (signal.top or 1)
    return round(size * values) + OFFSET_BYTES * documents


def vector_bytes(codec: str, width: int, vectors: int) -> float:
    """Bytes of one vector, measured on made-up states of a document with `vectors` of them.

    What a codec compresses depends on the numbers; the exponents of states are spread about as those of a normal draw.
    """
    states = np.random.default_rng(0).standard_normal((max(1, vectors), width)).astype(np.float32)
    encoded = CODECS[codec].encode("states", [bits_of(states)])
    return float(sum(rows[0].nbytes for rows in encoded.columns.values()) / len(states))


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


def make_plan(run: RunConfig, *, sample: int, budget: int | None, rate: float | None) -> dict[str, Any]:
    """Everything `xkd-cache plan` says, of at most `sample` rows; `rate` is the teacher's tokens per second."""
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

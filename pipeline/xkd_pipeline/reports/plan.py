"""What a cache will need before it is made: bytes, shards, memory, time. Reads a sample and a model's config only.

The sample is parsed and tokenized as the run would do it, and table_size.py counts bytes. What is not in the sample is
taken to be like it.
"""

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa

from xkd_pipeline.alignment import align_rows
from xkd_pipeline.capture.artifacts import Sizes, sizes_of
from xkd_pipeline.capture.measure import LOGIT_BYTES
from xkd_pipeline.parsing.stage import columns_of, parser_for, plan_shards
from xkd_pipeline.reports.sample import Sample, read_sample, reasons
from xkd_pipeline.reports.table_size import Counts, batches_bytes, counts_of, frame_bytes, signal_bytes
from xkd_pipeline.stages import rows_per_shard, signals_for, teacher_dtype
from xkd_pipeline.tables.shard import ROWS_PER_BATCH, DocumentRows, encoder_for, token_columns, token_counts
from xkd_schemas.codecs import CODECS
from xkd_schemas.config import RunConfig
from xkd_schemas.documents import DOCUMENTS, Spans, checked_spans
from xkd_schemas.durable_files import bytes_below
from xkd_schemas.progress import Progress
from xkd_schemas.ragged import Ragged
from xkd_schemas.signals import teacher_schema
from xkd_schemas.text.batches import DocumentBatch, TokenBatch
from xkd_schemas.text.encode import TRIED
from xkd_schemas.tokens import OK, STUDENTS, TOKEN_FIELDS
from xkd_trainer.models.compute_dtype import dtype_named, this_device
from xkd_trainer.models.loading import load_tokenizer

LIBRARIES: Final = 600 * 2**20
"""Resident bytes of Python with torch and transformers."""
PADDING: Final = 1.01
"""Of Arrow's buffers, as a share of their bytes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanSample:
    """A sample as the teacher reads it."""

    sample: Sample
    spans: tuple[Spans, ...]
    tokens: TokenBatch
    counts: list[Counts]
    shards: int
    """Of one table of the whole corpus."""
    batches: int
    """Record batches of these shards."""
    template: str

    def of_corpus(self, number: float) -> int:
        """A number of the sample for the whole corpus."""
        return round(number * self.sample.scale)


def read_plan_sample(run: RunConfig, wanted: int) -> PlanSample:
    """Read, parse and tokenize a sample of at most `wanted` rows; raises as those do."""
    sample = read_sample(run, wanted)
    t = run.teacher
    encoder = encoder_for(t.model, t)
    encoder.check(sample.documents[:TRIED])
    with Progress("parse the sample", len(sample.documents)):
        parsed = parser_for(run.documents).parse(sample.documents)
    spans = tuple(checked_spans(d, s) for d, s in zip(sample.documents, parsed, strict=True))
    tokens = encoder.encode_batch(sample.documents)
    units = plan_shards(sample.sources, rows_per_shard(run, sample.sources)[0])
    counts = [counts_of(t, s.words, s.phrases) for t, s in zip(tokens, spans, strict=True)]
    return PlanSample(
        sample=sample, spans=spans, tokens=tokens, counts=counts, shards=len(units),
        batches=sum(-(-unit.rows // ROWS_PER_BATCH) for unit in units), template=encoder.template,
    )  # fmt: skip


def teacher_parts(run: RunConfig, look: PlanSample, model: Sizes) -> dict[str, int]:
    """Bytes of the corpus's teacher table by column, the largest first; "tokens" are the shared columns."""
    signals, codec = signals_for(run, model.layers), run.teacher.codec
    sizes = {s.column: signal_bytes(s, model.width, codec, look.counts) for s in signals}
    shared = {"doc_id": [d.doc_id for d in look.sample.documents], **token_columns(look.tokens)}
    sizes["tokens"] = batches_bytes(pa.schema(TOKEN_FIELDS), shared)
    parts = {name: look.of_corpus(PADDING * size) for name, size in sizes.items()}
    parts["frames"] = frame_bytes(teacher_schema(signals, model.width, codec), look.shards, look.batches)
    return dict(sorted(parts.items(), key=lambda part: -part[1]))


def table_bytes(schema: pa.Schema, columns: dict[str, Any], look: PlanSample) -> int:
    """Bytes of the corpus's table with these columns of the sample."""
    return look.of_corpus(PADDING * batches_bytes(schema, columns)) + frame_bytes(schema, look.shards)


def losses_of(run: RunConfig, layers: int) -> dict[str, list[str]]:
    """Column -> the losses that need it, or "evaluation"."""
    wanted = {loss: signals_for(_with_teacher(run, losses=(loss,)), layers) for loss in run.teacher.losses}
    found = {s.column: [loss for loss in wanted if s in wanted[loss]] for s in signals_for(run, layers)}
    return found | {s.column: ["evaluation"] for s in signals_for(_with_teacher(run, losses=()), layers)}


def _with_teacher(run: RunConfig, **changes: Any) -> RunConfig:
    return run.model_copy(update={"teacher": run.teacher.model_copy(update=changes)})


def _student_of(run: RunConfig) -> str:
    """Name of the student's tokenizer, "" without a student."""
    s = run.student
    return s.tokenizer or ("" if s.model.startswith("new:") else s.model)


def tokenizer_bytes(*names: str) -> int:
    """Bytes of these tokenizers as they are saved in a cache; "" is none."""
    size = 0
    for name in filter(None, names):
        with tempfile.TemporaryDirectory(prefix="xkd-plan-") as folder:
            load_tokenizer(name).save_pretrained(folder)
            size += bytes_below(Path(folder))
    return size


def student_bytes(run: RunConfig, look: PlanSample) -> int | None:
    """Bytes of the students table; None without a student."""
    s, name = run.student, _student_of(run)
    if not name:
        return None
    documents = look.sample.documents
    rows = DocumentRows(
        doc_ids=[d.doc_id for d in documents], block=DocumentBatch.of(documents),
        words=Ragged.of([spans.words for spans in look.spans], np.int32, 2),
        phrases=Ragged.of([spans.phrases for spans in look.spans], np.int32, 2),
    )  # fmt: skip
    return table_bytes(STUDENTS, align_rows(encoder_for(name, s), rows, look.tokens)[1], look)


def memory_parts(run: RunConfig, look: PlanSample, model: Sizes, dtype: str, teacher: int) -> dict[str, int]:
    """Estimated peak of one worker of the teacher stage, in bytes."""
    layers = len({s.layer for s in signals_for(run, model.layers) if s.layer is not None})
    size = dtype_named(dtype).itemsize
    longest = max((c.tokens for c in look.counts), default=0)
    tokens = max(run.teacher.batch_tokens, longest)
    return {
        "libraries": LIBRARIES,
        "weights": model.weights * size,
        "states": tokens * (model.width * (size * 8 + 8 * layers) + size * 3 * model.inner + 4 * longest),
        "logits": 3 * LOGIT_BYTES,
        "shard": 3 * teacher // max(1, look.shards),
    }


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
    model = sizes_of(run.teacher.model)
    signals_for(run, model.layers)  # refuses an unknown loss or layer before anything is read
    dtype = teacher_dtype(run, this_device())
    look = read_plan_sample(run, sample)
    parts = teacher_parts(run, look, model)
    teacher = sum(parts.values())
    tokens = look.of_corpus(sum(c.tokens for c in look.counts))
    fixed = {
        "documents": table_bytes(DOCUMENTS, columns_of(look.sample.documents, look.spans), look),
        "students": student_bytes(run, look),
        "tokenizers": tokenizer_bytes(run.teacher.model, _student_of(run)),
        "files": model.file_numbers * min(model.number_bytes, dtype_named(dtype.dtype).itemsize),
    }
    others = sum(size or 0 for size in fixed.values())
    memory = memory_parts(run, look, model, dtype.dtype, teacher)
    codecs = {
        codec: others + sum(teacher_parts(_with_teacher(run, codec=codec), look, model).values())
        for codec in CODECS
        if codec != run.teacher.codec
    }
    needs = losses_of(run, model.layers)
    share = max(1, tokens)
    cache = Path(run.cache).absolute()
    there = next(path for path in (cache, *cache.parents) if path.is_dir())
    return {
        "corpus": [source.describe() for source in look.sample.sources],
        "rows": look.sample.corpus_rows,
        "sample": {
            "rows": look.sample.rows,
            "documents": len(look.sample.documents),
            "rejected": len(look.sample.rejected),
            "reasons": reasons(look.sample.rejected),
            "unusable": sum(status != OK for status in look.tokens.statuses),
            "cut": token_counts([d.text for d in look.sample.documents], look.tokens)["cut"],
        },
        "model": {name: getattr(model, name) for name in ("architecture", "layers", "width", "classes", "weights")},
        "template": look.template,
        "dtype": dtype.dtype,
        "dtype_why": dtype.why,
        "dtype_warning": dtype.warning,
        "codec": run.teacher.codec,
        "tokens": tokens,
        "give_or_take": give_or_take([c.tokens for c in look.counts], look.sample.sizes, look.sample.scale),
        "targets": look.of_corpus(sum(c.targets for c in look.counts)),
        "words": look.of_corpus(sum(len(s.words) for s in look.spans)),
        "phrases": look.of_corpus(sum(len(s.phrases) for s in look.spans)),
        "columns": [
            {"column": name, "bytes": size, "bytes_per_token": size / share, "losses": needs.get(name, [])}
            for name, size in parts.items()
        ],
        "teacher_bytes": teacher,
        "bytes_per_token": teacher / share,
        **{f"{name}_bytes": size for name, size in fixed.items()},
        "bytes": teacher + others,
        "free": shutil.disk_usage(there).free,
        "shards": look.shards,
        "shard_bytes": teacher // max(1, look.shards),
        "memory": memory,
        "memory_bytes": sum(memory.values()),
        "seconds": tokens / rate if rate else None,
        "rate": rate,
        "budget": budget,
        "codecs": codecs,
    }

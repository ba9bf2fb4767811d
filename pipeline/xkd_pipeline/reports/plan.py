"""What a cache will need before it is made: bytes, shards, memory, time. Reads a sample and a model's config only.

Sizes are counted, not guessed: the sample is parsed and tokenized as the run would do it, and `size` knows what an
Arrow file makes of that. What is not in the sample is taken to be like it.
"""

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa

from xkd_pipeline.alignment import align_rows
from xkd_pipeline.capture.measure import LOGIT_BYTES
from xkd_pipeline.capture.model_sizes import Sizes, bytes_per_number, sizes_of
from xkd_pipeline.parsing.parsers import parser_for
from xkd_pipeline.parsing.stage import columns_of, units_of
from xkd_pipeline.reports.budget import way_down
from xkd_pipeline.reports.sample import Sample, encoder_for, read_sample, reasons
from xkd_pipeline.reports.table_size import Counts, body_bytes, counts_of, overhead, signal_bytes, written
from xkd_pipeline.shard_rows import rows_per_shard
from xkd_pipeline.stages import signals_for, teacher_dtype
from xkd_pipeline.tables.read_units import DocumentRows
from xkd_pipeline.tables.shard import ROWS_PER_BATCH
from xkd_pipeline.tables.token_columns import token_columns
from xkd_schemas.config import RunConfig
from xkd_schemas.documents import DOCUMENTS, Spans, checked_spans
from xkd_schemas.durable_files import bytes_below
from xkd_schemas.progress import Progress
from xkd_schemas.signals import teacher_schema
from xkd_schemas.text.batches import TokenBatch
from xkd_schemas.text.encode import TRIED
from xkd_schemas.tokens import OK, STUDENTS, TOKEN_FIELDS, spans_read
from xkd_trainer.models.compute_dtype import this_device
from xkd_trainer.models.loading import load_tokenizer

LIBRARIES: Final = 600 * 2**20
"""Resident bytes of Python with torch and transformers."""


@dataclass(frozen=True, kw_only=True)
class PlanSample:
    """A sample as the teacher reads it."""

    sample: Sample
    spans: tuple[Spans, ...]
    tokens: TokenBatch
    rows_per_shard: int
    template: str

    @cached_property
    def counts(self) -> list[Counts]:
        """What the signals are counted in, one for each document."""
        both = zip(self.columns["words"], self.columns["phrases"], strict=True)
        read = (
            [len(spans_read(spans, t.num_chars)) for spans in pair] for t, pair in zip(self.tokens, both, strict=True)
        )
        return [counts_of(t, *numbers) for t, numbers in zip(self.tokens, read, strict=True)]

    @cached_property
    def columns(self) -> dict[str, list[Any]]:
        """Columns of the documents table, intervals as arrays."""
        found: dict[str, list[Any]] = columns_of(self.sample.documents, self.spans)
        for name in ("segments", "words", "phrases"):
            found[name] = [np.array(pairs, np.int32).reshape(-1, 2) for pairs in found[name]]
        return found

    @property
    def batch_rows(self) -> int:
        """Rows of a full record batch."""
        return min(ROWS_PER_BATCH, self.rows_per_shard)

    @cached_property
    def shape(self) -> tuple[int, int]:
        """Shards and record batches of one table."""
        units = units_of(self.sample.sources, self.rows_per_shard)
        usable = len(self.sample.documents) / self.sample.rows
        return len(units), sum(-(-round(unit.rows * usable) // ROWS_PER_BATCH) for unit in units)

    @cached_property
    def scale(self) -> tuple[float, float]:
        """By what a number of the sample is that of the corpus, and how far off that may be, as a share of it.

        By rows or by their sizes, whichever tells the tokens of the sample's documents better.
        """
        tokens = [c.tokens for c in self.counts]
        rows, sizes = self.sample.scale, self.sample.size_scale
        ways = [(give_or_take(tokens, rows), rows), (give_or_take(tokens, sizes, self.sample.sizes), sizes)]
        error, scale = min(ways)
        return scale, error

    def of_corpus(self, number: float) -> int:
        """A number of the sample for the whole corpus."""
        return round(number * self.scale[0])


def look_at(run: RunConfig, wanted: int) -> PlanSample:
    """Read, parse and tokenize a sample of at most `wanted` rows; raises as those do."""
    sample = read_sample(run, wanted)
    t = run.teacher
    encoder = encoder_for(t.model, t)
    encoder.check(sample.documents[:TRIED])
    with Progress("parse the sample", len(sample.documents)):
        parsed = parser_for(run.documents).parse(sample.documents)
    spans = tuple(checked_spans(d, s) for d, s in zip(sample.documents, parsed, strict=True))
    tokens = encoder.encode_batch(sample.documents)
    return PlanSample(
        sample=sample, spans=spans, tokens=tokens, rows_per_shard=rows_per_shard(run, sample.sources)[0],
        template=encoder.template,
    )  # fmt: skip


def teacher_parts(run: RunConfig, look: PlanSample, model: Sizes) -> dict[str, int]:
    """Bytes of the corpus's teacher table by column; "tokens" are the shared columns, "frames" all the rest."""
    signals = signals_for(run, model.layers)
    codec = run.teacher.codec
    found = {
        signal.column: look.of_corpus(signal_bytes(signal, model.width, codec, look.counts, look.batch_rows))
        for signal in signals
    }
    schema = teacher_schema(signals, model.width, codec)
    added = {key: text for s in signals for key, text in written(s, model.width, codec, 1)[1].items()}
    schema = schema.with_metadata({**schema.metadata, **added})
    shared = {"doc_id": look.columns["doc_id"], **token_columns(look.tokens)}
    found["tokens"] = look.of_corpus(body_bytes(pa.schema(TOKEN_FIELDS), shared, look.batch_rows))
    return {**found, "frames": overhead(schema, *look.shape)}


def table_bytes(schema: pa.Schema, columns: dict[str, list[Any]], look: PlanSample) -> int:
    """Bytes of the corpus's table with these columns of the sample."""
    return look.of_corpus(body_bytes(schema, columns, look.batch_rows)) + overhead(schema, *look.shape)


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
    encoder = encoder_for(name, s)
    names = list(look.columns)
    rows: Sequence[Any] = [dict(zip(names, row, strict=True)) for row in zip(*look.columns.values(), strict=True)]
    return table_bytes(STUDENTS, align_rows(encoder, DocumentRows.of(rows), look.tokens)[1], look)


def memory_parts(run: RunConfig, look: PlanSample, model: Sizes, dtype: str, teacher: int) -> dict[str, int]:
    """Estimated peak of one worker of the teacher stage, in bytes."""
    layers = len({s.layer for s in signals_for(run, model.layers) if s.layer is not None})
    size = bytes_per_number(dtype)
    longest = max((c.tokens for c in look.counts), default=0)
    tokens = max(run.teacher.batch_tokens, longest)
    return {
        "libraries": LIBRARIES,
        "weights": model.weights * size,
        "states": tokens * (model.width * (size * 8 + 8 * layers) + size * 3 * model.inner + 4 * longest),
        "logits": 3 * LOGIT_BYTES,
        "shard": 3 * teacher // max(1, look.shape[0]),
    }


def naive_bytes(tokens: int, layers: int, width: int, classes: int) -> int:
    """bfloat16 states of so many layers and full bfloat16 logits of so many tokens.

    >>> naive_bytes(1, layers=4, width=4096, classes=152_000)
    336768
    """
    return tokens * 2 * (layers * width + classes)


def give_or_take(values: Sequence[int], scale: float, sizes: Sequence[int] = ()) -> float:
    """Two standard errors of a total that is estimated from these values, as a share of it; 0 if nothing is left out.

    With the `sizes` of what the values are of, of a total that is taken to grow with them.

    >>> give_or_take([1, 3, 1, 3], scale=1.0), round(give_or_take([1, 3, 1, 3], scale=100.0), 2)
    (0.0, 0.57)
    >>> give_or_take([1, 3, 1, 3], scale=100.0, sizes=[10, 30, 10, 30])
    0.0
    """
    mean = float(np.mean(values)) if len(values) else 0.0
    if mean == 0.0 or len(values) < 2:
        return 0.0
    rest = np.array(values, np.float64)
    if sum(sizes):
        rest -= np.array(sizes) * (sum(values) / sum(sizes))
    error = float(np.std(rest, ddof=1)) * float(np.sqrt(max(0.0, 1 - 1 / scale) / len(values)))
    return 2 * error / mean


def make_plan(run: RunConfig, *, sample: int, budget: int | None, rate: float | None) -> dict[str, Any]:
    """Everything `xkd-cache plan` says, as numbers.

    Args:
        run: Corpus, parser, teacher, losses, and a student if its table is to be counted.
        sample: Rows to read at most.
        budget: Bytes that the whole cache may take.
        rate: Tokens a second of the teacher; None if not known.
    """
    model = sizes_of(run.teacher.model)
    signals_for(run, model.layers)  # refuses an unknown loss or layer before anything is read
    dtype = teacher_dtype(run, this_device())
    look = look_at(run, sample)
    parts = teacher_parts(run, look, model)
    teacher = sum(parts.values())
    tokens = look.of_corpus(sum(c.tokens for c in look.counts))
    fixed = {
        "documents": table_bytes(DOCUMENTS, look.columns, look),
        "students": student_bytes(run, look),
        "tokenizers": tokenizer_bytes(run.teacher.model, _student_of(run)),
        "files": model.file_numbers * min(model.number_bytes, bytes_per_number(dtype.dtype)),
    }
    others = sum(size or 0 for size in fixed.values())
    layers = sorted({s.layer for s in signals_for(run, model.layers) if s.layer is not None})
    naive = naive_bytes(tokens, len(layers), model.width, model.classes)
    memory = memory_parts(run, look, model, dtype.dtype, teacher)
    free = shutil.disk_usage(_standing(Path(run.cache))).free

    def size_of(smaller: RunConfig) -> int:
        return others + sum(teacher_parts(smaller, look, model).values())

    steps = [] if budget is None else [step for step, _ in way_down(run, model.layers, size_of, budget)]
    return {
        "corpus": [source.describe() for source in look.sample.sources],
        "rows": look.sample.corpus_rows,
        "sample": _sample_values(look),
        "model": {name: getattr(model, name) for name in ("architecture", "layers", "width", "classes", "weights")},
        "template": look.template,
        "dtype": dtype.dtype,
        "dtype_why": dtype.why,
        "dtype_warning": dtype.warning,
        "codec": run.teacher.codec,
        "tokens": tokens,
        "give_or_take": look.scale[1],
        "targets": look.of_corpus(sum(c.targets for c in look.counts)),
        "words": look.of_corpus(sum(len(s.words) for s in look.spans)),
        "phrases": look.of_corpus(sum(len(s.phrases) for s in look.spans)),
        "columns": [{"column": n, "bytes": b, "bytes_per_token": b / max(1, tokens)} for n, b in parts.items()],
        "teacher_bytes": teacher,
        "bytes_per_token": teacher / max(1, tokens),
        **{f"{name}_bytes": size for name, size in fixed.items()},
        "bytes": teacher + others,
        "free": free,
        "shards": look.shape[0],
        "shard_bytes": teacher // max(1, look.shape[0]),
        "memory": memory,
        "memory_bytes": sum(memory.values()),
        "seconds": tokens / rate if rate else None,
        "rate": rate,
        "naive": {"layers": layers, "bytes": naive, "share": teacher / naive if naive else None},
        "budget": budget,
        "steps": steps,
    }


def _sample_values(look: PlanSample) -> dict[str, Any]:
    cut = sum(
        t.status == OK and t.num_chars < len(d.text) for t, d in zip(look.tokens, look.sample.documents, strict=True)
    )
    return {
        "rows": look.sample.rows,
        "documents": len(look.sample.documents),
        "rejected": len(look.sample.rejected),
        "reasons": reasons(look.sample.rejected),
        "unusable": sum(t.status != OK for t in look.tokens),
        "cut": cut,
    }


def _standing(path: Path) -> Path:
    """The path, or the nearest folder above it that is there."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())

"""Peak memory of a training step on one document of 16,384 tokens and on one of 8,192, for each loss at its defaults.

Small random models. Every size runs in a process of its own.
"""

import ctypes
import gc
import itertools
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from benchmarks.bench_step import Step
from benchmarks.measure import Options, Result, forget_peak, in_subprocess, memory, peak_bytes
from benchmarks.pair import TEMPLATE, Shape, made, texts_of
from xkd_pipeline.alignment import make_students
from xkd_pipeline.workers.contract import Workers
from xkd_schemas.config import StudentSection
from xkd_trainer.losses.registry import LOSSES, loss_named

BAR = 2.1
SHAPE = Shape(
    documents=1, teacher_layers=2, teacher_width=32, student_layers=2, student_width=32, teacher_classes=2_000,
    student_classes=2_000,
)  # fmt: skip


def run(options: Options) -> list[Result]:
    """A row for each loss, and one for capture."""
    sizes = (options.size(8_192, 512), options.size(16_384, 1_024))
    names = ("ce", "mta", "sra", "dwa") if options.quick else tuple(LOSSES)
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # what is freed goes back to the system, so that a peak is one
    short, long = (in_subprocess(peaks_of, size, *names) for size in sizes)
    what = f"peak of {{}} at {sizes[1]:,} tokens / at {sizes[0]:,}"
    return [memory(what.format(name), long[name], short[name], bar=BAR) for name in short]


def peaks_of(size: str, *names: str) -> dict[str, int]:
    """The bytes that capture and one step of each loss took beyond what was held before."""
    tokens = int(size)
    with tempfile.TemporaryDirectory(prefix="xkd-bench-") as scratch:
        text = "\n".join(itertools.islice(texts_of(1_000), tokens // 100))
        before = _settle()
        pair = made(Path(scratch), SHAPE, [text[: 6 * tokens]], names, tokens)
        peaks = {"capture": peak_bytes() - before}
        same = StudentSection(tokenizer=pair.teacher, template=TEMPLATE, max_tokens=tokens)
        make_students(pair.cache, "same", "teacher", same, Workers())
        for name in names:
            read = replace(pair, tokenizer=pair.teacher) if loss_named(name).one_tokenizer else pair
            step = Step(read, f"ce=0+{name}" if name != "ce" else "ce", 1)
            before = _settle()
            step()
            peaks[name] = peak_bytes() - before
            print(name, round(peaks[name] / 2**20), file=sys.stderr, flush=True)
            del step
    return peaks


def _settle() -> int:
    """Give free memory back to the system, and let the peak start again; what is held now."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return forget_peak()

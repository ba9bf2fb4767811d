"""How soon training asks for its first batch on a cache of very many shards, in seconds of CPU from the command on.

The command is xkd-train itself, in a process of its own that notes the first shard it opens: nothing is opened before
a batch is asked for (which a test holds it to). Importing torch and the models of transformers takes longer than the
bar by itself, so it is a row of its own. And how much longer a run takes to its first step that goes on in the middle
of an epoch: the first one is stopped after one step, and its checkpoint is written as that of the middle.
"""

import contextlib
import importlib
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.bench_memory import repeated
from benchmarks.measure import Options, Result, Row, cost, in_subprocess
from benchmarks.pair import Pair, Shape, pair_of

SHARDS = 10_000
SECONDS = 2.0
RESUME_SECONDS = 3.0
TINY = replace(Shape().small(), documents=2, characters=80)


def run(options: Options) -> list[Result]:
    """On ten thousand shards and on one. Making them takes a minute."""
    pair = pair_of(options, TINY)
    shards = options.size(SHARDS, 40)
    caches = {1: pair.cache, shards: repeated(pair.cache, options.scratch / "many", shards)}
    found = {number: _fastest(pair, cache, options.size(3, 1)) for number, cache in caches.items()}
    many, one = (found[number]["first"] - found[number]["imports"] for number in (shards, 1))
    what = f"start of training on {shards} shards"
    return [
        Row(what=f"{what}, seconds after the imports", ratio=many, bar=SECONDS, ours=many, theirs=1.0, unit="s"),
        cost(f"{what} after the imports / on one shard", many, one),
        cost(f"{what} from the command on / importing torch and transformers", found[shards]["first"],
             found[shards]["imports"]),
        *_resume(pair, caches[shards], options.scratch / "out", shards),
    ]  # fmt: skip


def _fastest(pair: Pair, cache: Path, times: int) -> dict[str, float]:
    runs = []
    for _ in range(times):
        with tempfile.TemporaryDirectory(dir=cache.parent) as out:
            given = (cache, pair.student, pair.tokenizer, pair.template, Path(out) / "student")
            runs.append(in_subprocess(started, *given))
    return min(runs, key=lambda run: run["first"] - run["imports"])


LIBRARIES = (
    "torch", "accelerate", "transformers.models.auto.tokenization_auto", "transformers.models.llama.modeling_llama"
)  # fmt: skip


def started(cache: str, student: str, tokenizer: str, template: str, out: str) -> dict[str, float]:
    """Run xkd-train for one step; when it had its imports, and when it opened a shard."""
    for module in LIBRARIES:
        importlib.import_module(module)
    imports, opened = time.process_time(), []

    def watch(event: str, details: tuple[Any, ...]) -> None:
        if event == "open" and str(details[0]).endswith(".arrow"):
            opened.append(time.process_time())

    sys.addaudithook(watch)
    from xkd_trainer.cli import main as command

    settings = (f"student.template={template}", "train.batch_size=2", "train.threads=1")
    sys.argv = [
        "xkd-train", "--shards", cache, "--student", student, "--student-tokenizer", tokenizer, "--out", out,
        "--loss", "dwa", "--steps", "1", *(word for one in settings for word in ("--set", one)),
    ]  # fmt: skip
    try:
        command()
    except SystemExit as end:
        if end.code:
            raise
    return {"imports": imports, "first": opened[0]}


def _resume(pair: Pair, cache: Path, out: Path, shards: int) -> list[Result]:
    """Seconds of CPU from the command to the end of its first step, fresh and in the middle of an epoch."""
    given = (cache, pair.student, pair.tokenizer, pair.template, out)
    fresh, resumed = (in_subprocess(first_step_of, *given) for _ in range(2))
    assert resumed["step"] == fresh["middle"] > 0
    more = max(0.0, resumed["seconds"] - fresh["seconds"])
    return [
        Row(what=f"resume in the middle of {shards} shards, seconds more than a fresh start", ratio=max(more, 1e-3),
            bar=RESUME_SECONDS, ours=resumed["seconds"], theirs=fresh["seconds"], unit="s"),
        Row(what="of that run, shards opened by its first step", ratio=resumed["opened"], ours=resumed["opened"],
            theirs=shards, unit="shards"),
    ]  # fmt: skip


class _Stopped(Exception):
    pass


def first_step_of(cache: str, student: str, tokenizer: str, template: str, out: str) -> dict[str, float]:
    """Run xkd-train to the end of its first step; when that was, which step, and how many shards were opened."""
    from xkd_trainer.cli import main as command
    from xkd_trainer.training import loop

    start, opened, said = time.process_time(), [], {}
    step_of = loop._Run._step

    def first_step(self: loop._Run, step: int, batches: list[loop.Batch]) -> None:
        step_of(self, step, batches)
        middle = self.batches.order.steps_per_epoch // 2
        said.update(seconds=time.process_time() - start, step=step, middle=middle, opened=len(set(opened)))
        self._save(middle)
        raise _Stopped

    def watch(event: str, details: tuple[object, ...]) -> None:
        if event == "open" and str(details[0]).endswith(".arrow"):
            opened.append(str(details[0]))

    sys.addaudithook(watch)
    loop._Run._step = first_step  # type: ignore[assignment]
    sys.argv = [
        "xkd-train", "--shards", cache, "--student", student, "--student-tokenizer", tokenizer, "--out", out, "--loss",
        "dwa", "--epochs", "1", "--batch-size", "2", "--threads", "1", "--template", template, "--json",
    ]  # fmt: skip
    with contextlib.suppress(_Stopped):
        command()
    return said

"""How much longer a run takes to its first step that goes on in the middle of an epoch of very many shards.

The command is xkd-train itself, in processes of their own. The first one is stopped after one step, and its checkpoint
is written as that of the middle.
"""

import contextlib
import sys
import time

from benchmarks.bench_memory import repeated
from benchmarks.bench_start import SHARDS, TINY
from benchmarks.measure import Options, Result, Row, in_subprocess
from benchmarks.pair import pair_of

SECONDS = 3.0


def run(options: Options) -> list[Result]:
    """Seconds of CPU from the command to the end of its first step. Making the cache takes a minute."""
    pair, shards = pair_of(options, TINY), options.size(SHARDS, 40)
    cache = repeated(pair.cache, options.scratch / "many", shards)
    given = (cache, pair.student, pair.tokenizer, pair.template, options.scratch / "out")
    fresh, resumed = (in_subprocess(first_step_of, *given) for _ in range(2))
    assert resumed["step"] == fresh["middle"] > 0
    more = max(0.0, resumed["seconds"] - fresh["seconds"])
    return [
        Row(what=f"resume in the middle of {shards} shards, seconds more than a fresh start", ratio=max(more, 1e-3),
            bar=SECONDS, ours=resumed["seconds"], theirs=fresh["seconds"], unit="s"),
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
        middle = self.order.steps_per_epoch // 2
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

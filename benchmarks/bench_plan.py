"""What `xkd-train plan` says of a training process's memory, against the peak of one that trains.

Both run in processes of their own.
"""

from pathlib import Path

from benchmarks.measure import Options, Result, in_subprocess, peak_bytes, ratio
from benchmarks.pair import Pair, pair_of
from xkd_trainer.training.loop import train
from xkd_trainer.training.plan import plan_training

STEPS = 14
BATCH = 8
LOSSES = ("mta", "mta+sra+dwa")


def run(options: Options) -> list[Result]:
    """One row a loss: planned against measured, and the same of what comes on top of an idle process."""
    pair, rows = pair_of(options), list[Result]()
    for loss in LOSSES[: options.size(2, 1)]:
        given = (pair.cache, pair.student, pair.tokenizer, pair.template, loss)
        planned = in_subprocess(plan_or_train, *given, "plan")
        measured = in_subprocess(plan_or_train, *given, options.scratch / loss)
        idle, mib = planned["bytes"]["process"], 2**20
        what = f"memory planned for training with {loss} / its peak"
        rows.append(ratio(what, planned["total"] / mib, measured / mib, "MiB", bar=0.85, at_least=True))
        what = f"the same, without the {idle / mib:.0f} MiB of Python and its libraries"
        rows.append(ratio(what, (planned["total"] - idle) / mib, (measured - idle) / mib, "MiB"))
    return rows


def plan_or_train(cache: str, student: str, tokenizer: str, template: str, loss: str, out: str) -> object:
    """What is planned, or the peak of training."""
    pair = Pair(teacher="", student=student, tokenizer=tokenizer, cache=Path(cache), template=template)
    settings = pair.run_file(loss, out=Path(out), steps=STEPS, batch_size=BATCH)
    if out == "plan":
        return plan_training(settings)
    train(settings, quiet=True)
    return peak_bytes()

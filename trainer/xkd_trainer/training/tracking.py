"""What is seen of a run while it goes on: two files of lines, and trackers that get the same values.

OUT/metrics.jsonl  what the run computed; a resumed run has the same bytes as one that was never stopped
OUT/timing.jsonl   how long that took and how much memory; other numbers each time
"""

import importlib.util
import itertools
import json
import resource
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any, Final, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor

from xkd_schemas.console import warn
from xkd_schemas.durable_files import digest, disk_errors, rename, replace
from xkd_schemas.errors import InputMissing
from xkd_schemas.page import flatten
from xkd_trainer.data.batch import Batch
from xkd_trainer.run_folder import METRICS, TIMING, read_lines

T = TypeVar("T")

Value = TypeVar("Value", float, Tensor)


def check_trackers(names: Sequence[str]) -> None:
    """InputMissing where the package of a tracker is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise InputMissing(f"--track {name}: {name} is not installed", fix=f"pip install {name}")


class Metrics:
    """Appends lines to OUT/metrics.jsonl: one JSON object each, what a run measured, in that order.

    A run that goes on takes up what its checkpoint says was logged `before`. One that starts at its first step gets a
    new file, and what an earlier run measured is kept as metrics-1.jsonl, metrics-2.jsonl, ...
    """

    def __init__(self, out: Path, *, before: bytes | None, name: str = METRICS) -> None:
        self.path = out / name
        if before is not None:
            replace(self.path, before)
        elif self.path.exists():
            numbered = (out / f"{self.path.stem}-{number}.jsonl" for number in itertools.count(1))
            rename(self.path, next(path for path in numbered if not path.exists()))

    def write(self, **values: Any) -> None:
        """Append one line."""
        with disk_errors(self.path), self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(values) + "\n")


def add_values(sums: dict[str, Value], values: Mapping[str, Value]) -> None:
    """Add numbers or tensors by name to what is there, or put them there."""
    for name, value in values.items():
        sums[name] = sums[name] + value if name in sums else value


@dataclass(kw_only=True, slots=True)
class Window:
    """Sums of the terms and of their counts since the last logged step; a checkpoint holds it."""

    steps: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, float] = field(default_factory=dict)

    def add(self, terms: Mapping[str, float], counts: Mapping[str, float]) -> None:
        """Add a step."""
        self.steps += 1
        add_values(self.sums, terms)
        add_values(self.counts, counts)


class Meter:
    """Times the steps since the last logged one, without what is done between them: logs, evaluations, checkpoints."""

    def __init__(self) -> None:
        self._steps = self._tokens = 0
        self._waited = self._worked = self._began = 0.0

    def watch(self, items: Iterator[T]) -> Iterator[T]:
        """The same items, none of them None; the time until each is there is time spent waiting."""
        asked = perf_counter()
        while (item := next(items, None)) is not None:
            self._began = perf_counter()
            self._waited += self._began - asked
            yield item
            asked = perf_counter()

    def count(self, batches: Sequence[Batch]) -> None:
        """The step with the newest item is done."""
        self._worked += perf_counter() - self._began
        self._steps += 1
        self._tokens += sum(int(b.student_valid_BS.sum()) for b in batches if bool(b.predict_valid_BN.any()))

    def take(self, accelerator: Accelerator) -> dict[str, float]:
        """What was measured since the last call: tokens of all processes, time and memory of this one."""
        tokens = float(accelerator.reduce(torch.tensor(float(self._tokens), device=accelerator.device)))
        seconds = max(self._waited + self._worked, 1e-9)
        found = {
            "steps": self._steps,
            "seconds_per_step": seconds / max(1, self._steps),
            "tokens_per_second": tokens / seconds,
            "waiting_share": self._waited / seconds,
            "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _RSS_UNIT,
        }
        if torch.cuda.is_available():
            found["peak_gpu_bytes"] = torch.cuda.max_memory_allocated()
        self._steps, self._tokens, self._waited, self._worked = 0, 0, 0.0, 0.0
        return found


_RSS_UNIT: Final = 1 if sys.platform == "darwin" else 1024  # bytes of what the system counts in


class Records:
    """Writes both files of a run, and hands every line to its trackers, which never end it."""

    def __init__(
        self, out: Path, accelerator: Accelerator, fingerprint: Mapping[str, Any], *, before: bytes | None, start: int
    ) -> None:
        timed = [line for line in read_lines(out / TIMING) if line.get("step", 0) <= start]
        lines = "".join(json.dumps(line) + "\n" for line in timed)
        self._total = int(fingerprint["steps"])
        self._metrics = Metrics(out, before=before)
        self._timing = Metrics(out, before=None if before is None else lines.encode(), name=TIMING)
        self._trackers: list[Any] = []
        if accelerator.log_with:
            options = _init_options(out, fingerprint, start)
            try:
                accelerator.init_trackers("xkd", dict(flatten(dict(fingerprint))), options)
                self._trackers = list(accelerator.trackers)
            except Exception as error:  # other people's code: accounts, servers, versions
                warn(f"no tracker: {error}; the run goes on, {self._metrics.path} has the values")

    def write(self, step: int, values: Mapping[str, float], timing: Mapping[str, float] | None = None) -> None:
        """Append what was measured up to a step."""
        self._metrics.write(step=step, **values)
        if timing is not None:
            self._timing.write(step=step, total=self._total, **timing)
        timed = {f"timing/{name}": value for name, value in (timing or {}).items() if name != "steps"}
        for tracker in list(self._trackers):
            try:
                tracker.log({**values, **timed}, step=step)
            except Exception as error:
                self._trackers.remove(tracker)
                warn(f"{tracker.name} failed: {error}; the run goes on, {self._metrics.path} has the values")

    def close(self) -> None:
        """Let the trackers send what they still hold."""
        for tracker in self._trackers:
            try:
                tracker.finish()
            except Exception as error:
                warn(f"{tracker.name} failed at its end: {error}; {self._metrics.path} has the values")


def _init_options(out: Path, fingerprint: Mapping[str, Any], start: int) -> dict[str, dict[str, Any]]:
    """So that a resumed run goes on in its place; tensorboard drops what came after its checkpoint."""
    name = out.resolve().name
    same = digest([str(out.resolve()), json.loads(json.dumps(dict(fingerprint)))])[:16]
    return {
        "tensorboard": {"purge_step": start + 1},
        "trackio": {"name": name, "resume": "allow"},
        "wandb": {"name": name, "id": same, "resume": "allow"},
        "mlflow": {"run_name": name},
    }

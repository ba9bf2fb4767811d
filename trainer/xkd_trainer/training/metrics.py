"""metrics.jsonl: one JSON object per line, appended; what a run measured, in the order it measured it."""

import contextlib
import itertools
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from xkd_schemas.durable_files import disk_errors, rename, replace
from xkd_schemas.errors import BadData


class Metrics:
    """Appends lines to OUT/metrics.jsonl.

    After a resume, lines of steps that are done again are dropped first. A run that starts at its first step gets a
    new file, and what an earlier run measured is kept as metrics-1.jsonl, metrics-2.jsonl, ...
    """

    def __init__(self, out: Path, *, resumed_step: int) -> None:
        self.path = out / "metrics.jsonl"
        with disk_errors(self.path):
            out.mkdir(parents=True, exist_ok=True)
            lines = self.path.read_bytes().splitlines(keepends=True) if self.path.exists() else []
        if resumed_step:
            whole = [line for line in lines if line.endswith(b"\n")]  # the last one may be half of a killed run's
            kept = [line for n, line in enumerate(whole, start=1) if self._step(line, n) <= resumed_step]
            replace(self.path, b"".join(kept))
        elif lines:
            taken = {path.name for path in out.glob("metrics-*.jsonl")}
            free = next(name for n in itertools.count(1) if (name := f"metrics-{n}.jsonl") not in taken)
            rename(self.path, out / free)

    def write(self, **values: Any) -> None:
        """Append one line."""
        with disk_errors(self.path), self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(values) + "\n")

    def _step(self, line: bytes, number: int) -> int:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            return int(json.loads(line)["step"])
        raise BadData(
            f"{self.path}: line {number} is no JSON object with a step", kept="the checkpoints",
            fix=f"mv {self.path} {self.path}.damaged, and run the same command again",
        )  # fmt: skip


@dataclass(kw_only=True, slots=True)
class Window:
    """Means of the terms and totals of their counts since the last logged line."""

    steps: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, float] = field(default_factory=dict)

    def add(self, terms: dict[str, float], counts: dict[str, float]) -> None:
        """One more step."""
        self.steps += 1
        for sums, values in ((self.sums, terms), (self.counts, counts)):
            for name, value in values.items():
                sums[name] = sums.get(name, 0.0) + value

    def means(self) -> dict[str, float]:
        """Mean of every term."""
        return {name: value / self.steps for name, value in self.sums.items()}

    def idle(self) -> list[str]:
        """Terms that nothing qualified for."""
        return sorted(name for name, count in self.counts.items() if count == 0)

    def totals(self) -> dict[str, float]:
        """Sum of every count."""
        return {f"{name}.count": round(value, 6) for name, value in self.counts.items()}

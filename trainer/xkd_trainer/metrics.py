"""metrics.jsonl: one JSON object per line, appended; what a run measured, in the order it measured it."""

import json
from pathlib import Path
from typing import Any

from xkd_schemas.files import disk_errors


class Metrics:
    """Appends lines to OUT/metrics.jsonl; after a resume, lines of steps that are done again are dropped first."""

    def __init__(self, out: Path, *, resumed_step: int) -> None:
        self.path = out / "metrics.jsonl"
        with disk_errors(self.path):
            out.mkdir(parents=True, exist_ok=True)
            kept = [line for line in self._lines() if _step(line) <= resumed_step] if resumed_step else []
            self.path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")

    def _lines(self) -> list[str]:
        return self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []

    def write(self, **values: Any) -> None:
        """Append one line."""
        with disk_errors(self.path), self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(values) + "\n")


def _step(line: str) -> int:
    try:
        return int(json.loads(line).get("step", 0))
    except ValueError:  # the last line of a run that was killed while writing it
        return 2**62

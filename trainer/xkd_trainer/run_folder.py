"""What lies in the folder of a run, and how it is read. Without torch, so that a look at a run is quick."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from xkd_schemas.cache.manifest import OWN
from xkd_schemas.durable_files import digest
from xkd_schemas.errors import BadData

METRICS: Final = "metrics.jsonl"
TIMING: Final = "timing.jsonl"
BEST: Final = "best"  # folder of the weights of the best evaluation, until the student is finished
UNFINISHED: Final = "xkd-unfinished.json"  # names the run while its student is being saved
PROVENANCE: Final = "xkd.json"  # the mark of a finished student


def refusal(folder: Path) -> str:
    """What to do with a student whose files are not as they were saved."""
    return f"delete {folder} and train again; if you changed it yourself, delete {PROVENANCE}"


def read_provenance(folder: Path) -> dict[str, Any]:
    """What `xkd.json` says; nothing where there is none; BadData where it is damaged."""
    path = folder / PROVENANCE
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_bytes())
        if data.pop(OWN) == digest(data) and all(isinstance(data.get(key, {}), dict) for key in ("files", "run")):
            return dict(data)
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError):
        pass
    raise BadData(f"{path} does not match its own digest", fix=refusal(folder))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file of JSON objects that may be written to now; none where there is no file."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    found = []
    for line in text.splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            continue  # the last one, half written
        found += [value] if isinstance(value, dict) else []
    return found


def evaluation_of(out: Path, *, best: bool) -> dict[str, float]:
    """What the best evaluation of a run measured, or the last one; nothing where it has none."""
    lines = [line for line in read_lines(out / METRICS) if "eval.bits_per_byte" in line]
    found = [{name.removeprefix("eval."): value for name, value in line.items()} for line in lines]
    return (best_of(found) if best else {}) or (found or [{}])[-1]


def best_of(evaluations: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The first with the fewest bits per byte; empty where none has a finite number."""
    finite = (one for one in evaluations if math.isfinite(one["bits_per_byte"]))
    return dict(min(finite, key=lambda one: one["bits_per_byte"], default={}))

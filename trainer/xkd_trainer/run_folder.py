"""What lies in the folder of a run, and how it is read, while the run goes on and afterwards.

Without torch, so that a look at a run is quick. Nothing is loaded, nothing is written.
"""

import json
import math
import os
import re
import socket
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from xkd_schemas.cache.manifest import OWN
from xkd_schemas.durable_files import digest
from xkd_schemas.errors import BadData, InputMissing
from xkd_schemas.page import flatten

METRICS: Final = "metrics.jsonl"
TIMING: Final = "timing.jsonl"
BEST: Final = "best"  # folder of the weights of the best evaluation, until the student is finished
UNFINISHED: Final = "xkd-unfinished.json"  # names the run while its student is being saved
PROVENANCE: Final = "xkd.json"  # the mark of a finished student
TRAINING: Final = "training"
FINISHED: Final = "finished"
STOPPED: Final = "stopped"

Line = dict[str, Any]


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


def read_lines(path: Path) -> list[Line]:
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
    found = _find_evaluations(read_lines(out / METRICS))
    return (best_of(found) if best else {}) or (found or [{}])[-1]


def _find_evaluations(lines: Sequence[Line]) -> list[Line]:
    found = (line for line in lines if "eval.bits_per_byte" in line)
    return [{name.removeprefix("eval."): value for name, value in line.items()} for line in found]


def best_of(evaluations: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The first with the fewest bits per byte; empty where none has a finite number."""
    finite = (one for one in evaluations if math.isfinite(one["bits_per_byte"]))
    return dict(min(finite, key=lambda one: one["bits_per_byte"], default={}))


@dataclass(frozen=True, kw_only=True)
class SeenRun:
    """What is known of one run."""

    out: Path
    state: str  # training, finished or stopped
    settings: dict[str, str]  # dotted names; empty before the first checkpoint
    metrics: list[Line]  # of logged steps
    evaluations: list[Line]  # the keys without "eval."
    timing: list[Line]

    @property
    def step(self) -> int:
        """The last logged step; 0 before it."""
        return int(self.metrics[-1]["step"]) if self.metrics else 0

    @property
    def total(self) -> int:
        """Steps of the whole run; 0 where that is not known yet."""
        return int(self.timing[-1]["total"]) if self.timing else int(self.settings.get("steps", "0"))

    @property
    def best(self) -> Line:
        """The evaluation with the fewest bits per byte; empty without any."""
        return best_of(self.evaluations)

    @property
    def terms(self) -> list[str]:
        """Names of the loss terms, in the order of the log."""
        return [name for name in (self.metrics or [{}])[-1] if f"{name}.count" in self.metrics[-1]]

    @property
    def seconds_per_step(self) -> float:
        """The median of all logged stretches: the first has what is compiled and loaded once; 0 without any."""
        return float(statistics.median([line["seconds_per_step"] for line in self.timing] or [0.0]))


def read_run(out: Path) -> SeenRun:
    """Read the files of a run; InputMissing where there is none."""
    lines = read_lines(out / METRICS)
    if not lines and not (out / "LOCK").is_file():
        raise InputMissing(f"{out} holds no run: there is no {METRICS}", fix="name the --out folder of xkd-train")
    fingerprint = read_provenance(out).get("run") or _fingerprint_of_checkpoint(out)
    return SeenRun(
        out=out, state=_find_state(out), settings=dict(flatten(fingerprint)),
        metrics=[line for line in lines if "loss" in line],
        evaluations=_find_evaluations(lines), timing=read_lines(out / TIMING),
    )  # fmt: skip


def _fingerprint_of_checkpoint(out: Path) -> dict[str, Any]:
    for path in sorted((out / "checkpoints").glob("step-[0-9]*/state.json"), reverse=True):
        try:
            found: dict[str, Any] = json.loads(path.read_bytes())["fingerprint"]
        except (OSError, ValueError, KeyError):
            continue  # a newer one has just taken its place
        return found
    return {}


def _find_state(out: Path) -> str:
    """Finished; or training, as long as the process that LOCK names lives, which is taken for granted elsewhere."""
    if read_provenance(out) and not (out / UNFINISHED).exists():
        return FINISHED
    text = (out / "LOCK").read_text(errors="replace") if (out / "LOCK").is_file() else ""
    owner = re.fullmatch(r"pid (\d+) on (.*)", text)
    if owner is None or (owner[2] == socket.gethostname() and not _is_alive(int(owner[1]))):
        return STOPPED
    return TRAINING


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except OSError as error:
        return isinstance(error, PermissionError)  # somebody else's
    return True

"""A run as its files show it, while it goes on and afterwards. Nothing is loaded, nothing is written."""

import json
import os
import re
import socket
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from xkd_schemas.errors import InputMissing
from xkd_schemas.page import flatten
from xkd_trainer.run_folder import METRICS, TIMING, UNFINISHED, best_of, read_lines, read_provenance

TRAINING: Final = "training"
FINISHED: Final = "finished"
STOPPED: Final = "stopped"

Line = dict[str, Any]


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
    evaluated = [line for line in lines if "eval.bits_per_byte" in line]
    return SeenRun(
        out=out, state=_find_state(out), settings=dict(flatten(fingerprint)),
        metrics=[line for line in lines if "loss" in line],
        evaluations=[{name.removeprefix("eval."): value for name, value in line.items()} for line in evaluated],
        timing=read_lines(out / TIMING),
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

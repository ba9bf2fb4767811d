"""CPU time of interleaved calls, peak memory of this process, and measurements in a process of their own."""

import contextlib
import importlib
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What a benchmark is told."""

    quick: bool
    """Small sizes and few repeats: shows that it runs, not how fast."""
    demo: Path | None
    """Folder with teacher/, tokenizer/ and cache/; None: make random models here."""
    scratch: Path
    """An empty folder, in memory where possible; emptied by the caller."""
    repeats: int

    def size(self, full: int, quick: int) -> int:
        """`full`, or `quick` with --quick."""
        return quick if self.quick else full


def interleaved(
    calls: Mapping[str, Callable[[], object]], repeats: int, clock: Callable[[], float] | None = None
) -> dict[str, float]:
    """Seconds of CPU time, or of another `clock`, of each call: the least of `repeats`, after one that does not count.

    A round runs every call once, so that a slow minute of the machine hits them all.
    """
    clock = clock or time.process_time
    for call in calls.values():
        call()
    best = dict.fromkeys(calls, float("inf"))
    for _ in range(repeats):
        for name, call in calls.items():
            start = clock()
            call()
            best[name] = min(best[name], clock() - start)
    return best


def resident_bytes(field: str = "VmRSS") -> int:
    """A size of /proc/self/status: VmRSS now, VmHWM at its peak, RssAnon without mapped files."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def peak_bytes() -> int:
    """Most memory this process has held, or since `forget_peak`; see `peak_of_children` for others."""
    if Path("/proc/self/status").exists():
        return resident_bytes("VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def peak_of_children() -> int:
    """Most memory that one process held which this one started and waited for."""
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def forget_peak() -> int:
    """Let the peak start again from what is held now, where the system can; returns where it starts."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return peak_bytes()


def in_subprocess(function: Callable[..., object], *arguments: object) -> Any:
    """What a function of a module returns, as JSON gives it, in a process of its own; the arguments come as texts.

    Raises:
        RuntimeError: It failed; its errors are in the message.
    """
    root = Path(__file__).parents[1]
    path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    named = (__name__, function.__module__, function.__name__)
    command = [sys.executable, "-m", *named, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": path})
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    _module, _name, *_arguments = sys.argv[1:]
    print(json.dumps(getattr(importlib.import_module(_module), _name)(*_arguments)))

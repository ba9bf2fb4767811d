"""CPU time of interleaved calls, peak memory, measurements in a process of their own, and the ratios of all these."""

import contextlib
import importlib
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
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


# One line of the result: a ratio, its bar, and the two figures that it was made of.


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One measured ratio.

    >>> Row(what="a", ratio=1.2, bar=1.25, ours=6.0, theirs=5.0, unit="s").met
    True
    """

    what: str
    """Numerator against denominator."""
    ratio: float
    bar: float | None = None
    """None: printed, no bar."""
    at_least: bool = False
    """The ratio must reach the bar; otherwise it must not pass it."""
    ours: float
    """The numerator."""
    theirs: float
    """The denominator."""
    unit: str
    """Of both."""

    @property
    def met(self) -> bool | None:
        """None where there is no bar. A ratio that is no number meets nothing."""
        if self.bar is None:
            return None
        return self.ratio >= self.bar if self.at_least else self.ratio <= self.bar


@dataclass(frozen=True, kw_only=True, slots=True)
class Skipped:
    """A row that could not be measured here, and why."""

    what: str
    why: str


Result = Row | Skipped


def ratio(
    what: str, ours: float, theirs: float, unit: str, *, bar: float | None = None, at_least: bool = False
) -> Row:
    """A row of two figures in the same unit: how many times theirs ours is."""
    return Row(what=what, ratio=ours / theirs, bar=bar, at_least=at_least, ours=ours, theirs=theirs, unit=unit)


def cost(what: str, ours: float, theirs: float, *, bar: float | None = None) -> Row:
    """A row of two CPU times in seconds."""
    return ratio(what, ours * 1e3, theirs * 1e3, "ms", bar=bar)


def memory(what: str, ours: float, theirs: float, *, bar: float) -> Row:
    """A row of two sizes in bytes."""
    return ratio(what, ours / 2**20, theirs / 2**20, "MiB", bar=bar)


def table(results: Sequence[Result]) -> str:
    """Aligned lines for people.

    >>> print(table([Row(what="a / b", ratio=2.0, bar=6, at_least=True, ours=3, theirs=6, unit="ms")]))
    a / b    2.00  >= 6    NOT MET  3 / 6 ms
    """
    width = max((len(r.what) for r in results), default=0)
    return "\n".join(f"{r.what:<{width}}  {_figures(r)}" for r in results)


def _figures(result: Result) -> str:
    if isinstance(result, Skipped):
        return f"skipped: {result.why}"
    verdict = {True: "met", False: "NOT MET", None: ""}[result.met]
    bar = "printed, no bar" if result.bar is None else f"{'>=' if result.at_least else '<='} {result.bar:.3g}"
    small = 0 < abs(result.ratio) < 0.01
    times = f"{result.ratio:.1e}" if small else f"{result.ratio:.2f}"
    raw = f"{result.ours:.3g} / {result.theirs:.3g} {result.unit}".strip()
    return f"{times:>6}  {bar:<7} {verdict:<8} {raw}"


def as_json(benchmark: str, result: Result) -> dict[str, Any]:
    """The same for programs."""
    values = {"benchmark": benchmark, **asdict(result)}
    return values if isinstance(result, Skipped) else {**values, "met": result.met}


if __name__ == "__main__":
    _module, _name, *_arguments = sys.argv[1:]
    print(json.dumps(getattr(importlib.import_module(_module), _name)(*_arguments)))

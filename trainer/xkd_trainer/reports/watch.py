"""How a run is going, in a terminal: its newest logged values, again and again until it ends. Reads files only."""

import time
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from xkd_schemas.page import escape_text
from xkd_schemas.progress import Progress, show_time
from xkd_trainer.run_folder import FINISHED, TRAINING, read_run

PAUSE: Final = 1.0  # seconds between two looks


def status_of(out: Path) -> dict[str, Any]:
    """Where a run is: state, step, total, seconds_left, and its newest metrics, timing and evaluation."""
    run = read_run(out)
    timing = dict(run.timing[-1]) if run.timing else {}
    left = (run.total - run.step) * timing.get("seconds_per_step", 0.0)
    return {
        "out": str(out),
        "state": run.state,
        "step": run.step,
        "total": run.total,
        "seconds_left": 0.0 if run.state == FINISHED else left,
        "metrics": dict(run.metrics[-1]) if run.metrics else {},
        "timing": {name: value for name, value in timing.items() if name not in ("step", "steps", "total")},
        "evaluation": dict(run.evaluations[-1]) if run.evaluations else {},
        "best": dict(run.best),
    }


def follow(out: Path) -> None:
    """Draw the status until the run ends; off a terminal only the last one is printed."""
    with Progress("watch", quiet=True), Live(console=Console(), auto_refresh=False) as live:
        while True:
            status = status_of(out)
            live.update(draw(status), refresh=True)
            if status["state"] != TRAINING:
                return
            time.sleep(PAUSE)


def draw(status: dict[str, Any]) -> Table:
    """A status as a table of two columns."""
    table = Table.grid(padding=(0, 2))
    step, total = status["step"], status["total"]
    table.add_row(Text(escape_text(status["out"]), style="bold"), Text(status["state"]))
    table.add_row("step", Text(f"{step:,} of {total:,}" if total else f"{step:,}"))
    if total:
        table.add_row("", ProgressBar(total=total, completed=step, width=40))
    if status["seconds_left"]:
        table.add_row("time left", Text(show_time(status["seconds_left"])))
    for name, value in _values(status):
        table.add_row(Text(escape_text(name)), Text(value))
    return table


def _values(status: dict[str, Any]) -> list[tuple[str, str]]:
    metrics, timing, best = status["metrics"], status["timing"], status["best"]
    named = [name for name in metrics if name != "step" and not name.endswith(".count")]
    shown = [(name, f"{metrics[name]:.4g}") for name in named]
    if timing:
        shown.append(("tokens per second", f"{timing['tokens_per_second']:,.0f}"))
        shown.append(("waiting for data", f"{100 * timing['waiting_share']:.1f} % of a step"))
        shown.append(("peak memory", f"{timing['peak_memory_bytes'] / 2**30:.2f} GiB"))
    if "peak_gpu_bytes" in timing:
        shown.append(("peak GPU memory", f"{timing['peak_gpu_bytes'] / 2**30:.2f} GiB"))
    for name, value in status["evaluation"].items():
        if name not in ("step", "bytes", "agreement_pairs"):
            shown.append((f"held-out {name.replace('_', ' ')}", f"{value:.4f} at step {status['evaluation']['step']}"))
    if best:
        shown.append(("best bits per byte", f"{best['bits_per_byte']:.4f} at step {best['step']}"))
    return shown

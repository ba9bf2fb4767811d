"""What is shown of runs from their files: one HTML file with curves (`xkd_schemas.page`), and a view in a terminal."""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from xkd_schemas.durable_files import replace
from xkd_schemas.errors import UsageError
from xkd_schemas.page import escape_text, render_page
from xkd_schemas.progress import Progress, show_time
from xkd_trainer.run_folder import FINISHED, TRAINING, SeenRun, read_run

POINTS: Final = 300  # of one curve that are drawn; more are averaged
COLOURS: Final = 8  # of curves; further runs have broken lines
WIDTH, TOP, BOTTOM = 400.0, 20.0, 140.0  # where curves lie in a drawing
PAUSE: Final = 1.0  # seconds between two looks in a terminal

Points = list[tuple[float, float]]


class Curve(NamedTuple):
    """One run in one drawing."""

    style: str  # classes of the page's style
    label: str
    points: str  # as SVG takes them
    dots: list[tuple[float, float]]  # of a curve that is a single point


class Chart(NamedTuple):
    """A drawing of several runs."""

    title: str
    low: float
    high: float
    first: int
    last: int
    curves: list[Curve]


def write_report(outs: Sequence[Path], out: Path, table: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Write the page of some runs to `out`; a sweep has its `table` on it: title, head, rows.

    Raises:
        UsageError: `out` is a folder.
        InputMissing: One of the folders holds no run.
    """
    if out.is_dir():
        raise UsageError(f"--out {out} is a folder", fix=f"--out {out / 'report.html'}")
    runs = [read_run(folder) for folder in outs]
    names = name_runs([run.out for run in runs])
    groups = {title: [c for c in charts if c.curves] for title, charts in _draw_groups(runs, names).items()}
    page = render_page(
        Path(__file__).with_name("report.html.j2"), {"number": show_number}, table=table,
        runs=list(zip(names, map(_style, range(len(runs))), runs, strict=True)),
        differing=find_differing(runs), groups={title: charts for title, charts in groups.items() if charts},
    )  # fmt: skip
    replace(out, page)
    return {"report": str(out), "bytes": len(page), "runs": names}


def name_runs(outs: Sequence[Path]) -> list[str]:
    """The folders' own names where they are different, otherwise their paths."""
    names = [folder.resolve().name for folder in outs]
    return names if len(set(names)) == len(names) else [str(folder) for folder in outs]


def show_number(value: Any) -> str:
    """A number for people; nothing for None.

    >>> show_number(1234567), show_number(0.000123456), show_number(None)
    ('1,234,567', '0.0001235', '')
    """
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def find_differing(runs: Sequence[SeenRun]) -> list[tuple[str, list[str]]]:
    """(setting, its value in each run) for all that are not the same in all runs whose settings are known."""
    known = [run for run in runs if run.settings]
    names = sorted({name for run in known for name in run.settings})
    return [
        (name, [run.settings.get(name, "") for run in runs])
        for name in names
        if len({run.settings.get(name) for run in known}) > 1
    ]


def _draw_groups(runs: Sequence[SeenRun], names: Sequence[str]) -> dict[str, list[Chart]]:
    terms = list(dict.fromkeys(term for run in runs for term in run.terms))

    def draw(title: str, kind: str, key: str, scale: float = 1.0) -> Chart:
        return draw_chart(title, [_series(getattr(run, kind), key, scale) for run in runs], names)

    return {
        "Loss": [draw("loss", "metrics", "loss"), *(draw(term, "metrics", term) for term in terms)],
        "Held-out rows": [
            draw("bits per byte", "evaluations", "bits_per_byte"), draw("agreement, %", "evaluations", "agreement"),
        ],
        "Steps": [draw("gradient norm", "metrics", "grad_norm"), draw("learning rate", "metrics", "lr")],
        "Coverage": [
            draw_chart(f"{term}, things per step", [_per_step(run.metrics, f"{term}.count") for run in runs], names)
            for term in terms
        ],
        "Time and memory": [
            draw("tokens per second", "timing", "tokens_per_second"),
            draw("seconds per step", "timing", "seconds_per_step"),
            draw("waiting for data, % of a step", "timing", "waiting_share", 100.0),
            draw("peak memory, GiB", "timing", "peak_memory_bytes", 2.0**-30),
            draw("peak GPU memory, GiB", "timing", "peak_gpu_bytes", 2.0**-30),
        ],
    }  # fmt: skip


def _series(lines: Sequence[Mapping[str, Any]], key: str, scale: float) -> Points:
    return [(line["step"], scale * line[key]) for line in lines if math.isfinite(line.get(key, math.nan))]


def _per_step(lines: Sequence[Mapping[str, Any]], key: str) -> Points:
    """Counts are sums over a stretch of steps."""
    before = [0, *(line["step"] for line in lines)]
    pairs = zip(before, lines, strict=False)
    return [(line["step"], line[key] / max(1, line["step"] - last)) for last, line in pairs if key in line]


def draw_chart(title: str, series: Sequence[Points], names: Sequence[str]) -> Chart:
    """The curves of all runs that have points, in one frame.

    >>> chart = draw_chart("loss", [[(1, 2.0), (3, 1.0)], []], ["a", "b"])
    >>> chart.curves[0].points, len(chart.curves)
    ('0.0,20.0 400.0,140.0', 1)
    """
    steps, values = zip(*(point for points in series for point in points), strict=True) if any(series) else ([0], [0])
    first, last, low, high = min(steps), max(steps), min(values), max(values)

    def place(points: Points) -> Iterator[tuple[float, float]]:
        for step, value in points:
            right, up = (step - first) / (last - first or 1), (value - low) / (high - low) if high > low else 0.5
            yield round(WIDTH * right, 1), round(BOTTOM - (BOTTOM - TOP) * up, 1)

    curves = []
    for number, (points, name) in enumerate(zip(series, names, strict=True)):
        placed = list(place(thin_out(points)))
        dots = placed if len(placed) == 1 else []
        if placed:
            curves.append(Curve(_style(number), name, " ".join(f"{x},{y}" for x, y in placed), dots))
    return Chart(title, low, high, int(first), int(last), curves)


def thin_out(points: Points) -> Points:
    """At most POINTS points: means of equal stretches.

    >>> len(thin_out([(step, 1.0) for step in range(1000)])), thin_out([(1, 2.0)])
    (250, [(1, 2.0)])
    """
    size = -(-len(points) // POINTS)
    stretches = (points[at : at + size] for at in range(0, len(points), size or 1))
    return [(part[-1][0], sum(value for _, value in part) / len(part)) for part in stretches]


def _style(number: int) -> str:
    return f"c{number % COLOURS} d{min(2, number // COLOURS)}"


# -- in a terminal


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

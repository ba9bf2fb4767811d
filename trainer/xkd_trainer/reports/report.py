"""One HTML file with the curves of several runs and the settings in which they differ; see `xkd_schemas.page`."""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from xkd_schemas.durable_files import replace
from xkd_schemas.errors import UsageError
from xkd_schemas.page import render_page
from xkd_trainer.run_folder import SeenRun, read_run

POINTS: Final = 300  # of one curve that are drawn; more are averaged
COLOURS: Final = 8  # of curves; further runs have broken lines
WIDTH, TOP, BOTTOM = 400.0, 20.0, 140.0  # where curves lie in a drawing

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

"""A report as one HTML file: no script, nothing fetched, no text of the corpus that is not escaped and visible.

Three walls stand between the corpus and the reader: `visible` writes control and bidirectional characters as their
code points, jinja2 escapes every value, and the page's own policy forbids scripts and requests. The SVG of the charts
has no script, no style sheet and no address to fetch.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import jinja2
from markupsafe import Markup

from xkd_pipeline.reports.plan_text import format_size
from xkd_pipeline.reports.render import bracket_phrases, columns_of, escape_text
from xkd_pipeline.reports.report import Alignment, flatten, gather
from xkd_pipeline.tables.read_units import document_at, tokens_at
from xkd_schemas.cache.table import Table
from xkd_schemas.durable_files import replace
from xkd_schemas.errors import UsageError

MAX_COLUMNS: Final = 200
"""Aligned spans of one document that are drawn."""
MAX_CHARS: Final = 1200
"""Characters of one document's text, brackets included, that are shown."""
WIDTH: Final = 560
BAR: Final = 22
"""Height of a horizontal bar with its gap, in pixels."""


def write_report(root: Path, out: Path) -> dict[str, Any]:
    """Write the report of a cache to `out`, whole or not at all.

    Raises:
        InputMissing, BadData: as `gather`.
        UsageError: `out` is a folder, or altair or vl-convert-python is not installed.
        DiskFailed: `out` cannot be written.
    """
    if out.is_dir():
        raise UsageError(f"--out {out} is a folder", fix=f"--out {out / 'report.html'}")
    report = gather(root)
    page = render_page(report, {a.student: list(_draw_worst(root, a)) for a in report["alignments"]}).encode()
    replace(out, page)
    pairs = [(a.teacher, a.student) for a in report["alignments"]]
    return {"report": str(out), "bytes": len(page), "tables": len(report["tables"]), "pairs": pairs}


def _draw_worst(root: Path, alignment: Alignment) -> Iterator[dict[str, Any]]:
    """The worst documents with their phrases in brackets and their tokens over each other."""
    for share, row in alignment.worst:  # a table for each: no more than three shards are open at a time
        source, student = Table(root, "documents")[row], Table(root, f"students/{alignment.student}")[row]
        teacher = Table(root, f"teachers/{alignment.teacher}")[row]
        document, spans = document_at(source), (student["student_spans"], student["teacher_spans"])
        yield {
            "title": document.doc_id,
            "where": escape_text(f"{document.source}:{document.line}"),
            "share": share,
            "text": escape_text(
                bracket_phrases(document.text, [(int(a), int(b)) for a, b in source["phrases"]], source["labels"])
            ),
            "columns": columns_of(document, tokens_at(student), tokens_at(teacher), spans),
        }


def render_page(report: dict[str, Any], worst: dict[str, list[dict[str, Any]]]) -> str:
    """The page as text; `worst` holds the drawings of each student."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"visible": escape_text, "size": format_size, "flatten": flatten}
    kept = [(k, Markup(draw_bars(k.signals, "bytes"))) for k in report["kept"]]
    shapes = {a.student: Markup(draw_bars(a.shapes, "aligned spans", 320)) for a in report["alignments"]}
    charts = [(h, Markup(draw_histogram(h.bars, h.title))) for h in report["histograms"]]
    return environment.get_template("report.html.j2").render(
        report=report, worst=worst, kept=kept, shapes=shapes, histograms=charts, max_chars=MAX_CHARS,
        max_columns=MAX_COLUMNS,
    )  # fmt: skip


def draw_bars(values: Sequence[tuple[str, float]], title: str, width: int = WIDTH) -> str:
    """Horizontal bars in the given order, one for each (name, value); `width` in pixels, without the names."""
    alt = _import_altair()
    rows = [{"name": name, "value": value} for name, value in values]
    axis = alt.Axis(format="~s", tickCount=5, grid=True)
    chart = alt.Chart(alt.Data(values=rows), width=width, height=BAR * len(rows)).mark_bar(size=BAR - 8)
    return _to_svg(
        chart.encode(
            x=alt.X("value:Q", title=title, axis=axis),
            y=alt.Y("name:N", title=None, sort=None, axis=alt.Axis(labelLimit=260)),
        )
    )


def draw_histogram(counts: Sequence[tuple[int, int, int]], title: str) -> str:
    """Touching bars over whole numbers, one for each (first, last, how many)."""
    alt = _import_altair()
    rows = [{"first": first - 0.5, "end": last + 0.5, "count": count} for first, last, count in counts]
    chart = alt.Chart(alt.Data(values=rows), width=400, height=120).mark_bar(binSpacing=1)
    return _to_svg(
        chart.encode(
            x=alt.X(
                "first:Q",
                title=title,
                axis=alt.Axis(grid=False, tickMinStep=1),
                scale=alt.Scale(zero=False, nice=False),
            ),
            x2="end:Q",
            y2=alt.datum(0),
            y=alt.Y("count:Q", title=None, axis=alt.Axis(format="~s", tickCount=4, tickMinStep=1)),
        )
    )


def _import_altair() -> Any:
    try:
        import altair
        import vl_convert  # noqa: F401 # needed right after
    except ImportError as error:
        raise UsageError(f"a report needs {error.name}", fix="pip install 'xkd-toolkit[pipeline]'") from error
    return altair


def _to_svg(chart: Any) -> str:
    import vl_convert

    plain = chart.configure(font="sans-serif", background="transparent").configure_view(stroke=None)
    quiet = plain.configure_axis(domain=False, ticks=False, titleFontWeight="normal", labelPadding=6)
    return str(
        vl_convert.vegalite_to_svg(quiet.to_dict() | {"padding": {"left": 24, "right": 12, "top": 6, "bottom": 4}})
    )

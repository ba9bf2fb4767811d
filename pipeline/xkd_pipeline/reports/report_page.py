"""A report as one HTML file: no script, nothing fetched, no text of the corpus that is not escaped and visible.

Three walls stand between the corpus and the reader: `visible` writes control and bidirectional characters as their
code points, jinja2 escapes every value, and the page's own policy forbids scripts and requests.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import jinja2
from markupsafe import Markup

from xkd_pipeline.reports.render import Column, bracketed, columns_of, visible
from xkd_pipeline.reports.report import gather
from xkd_pipeline.reports.report_charts import bars, histogram
from xkd_pipeline.reports.report_data import Alignment, Report
from xkd_pipeline.tables.read_units import document_at, tokens_at
from xkd_schemas.cache.table import Table
from xkd_schemas.durable_files import replace
from xkd_schemas.errors import UsageError

MAX_COLUMNS: Final = 200
"""Aligned spans of one document that are drawn."""
MAX_CHARS: Final = 1200
"""Characters of one document's text, brackets included, that are shown."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawn:
    """One of the worst documents, ready for the page."""

    title: str
    where: str
    share: float
    text: str
    columns: tuple[Column, ...]
    more_text: int
    """Characters left out."""
    more_columns: int
    """Spans left out."""


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
    page = render_page(report, {a.student: list(_worst(root, a)) for a in report.alignments}).encode()
    replace(out, page)
    pairs = [(a.teacher, a.student) for a in report.alignments]
    return {"report": str(out), "bytes": len(page), "tables": len(report.tables), "pairs": pairs}


def _worst(root: Path, alignment: Alignment) -> Iterator[Drawn]:
    for share, row in alignment.worst:  # a table for each: no more than three shards are open at a time
        yield drawn(root, alignment, share, row)


def drawn(root: Path, alignment: Alignment, share: float, row: int) -> Drawn:
    """One document with its phrases in brackets and its tokens over each other."""
    source = Table(root, "documents")[row]
    document, learned = document_at(source), Table(root, f"students/{alignment.student}")[row]
    taught = tokens_at(Table(root, f"teachers/{alignment.teacher}")[row])
    phrases = [(int(a), int(b)) for a, b in source["phrases"]]
    text = visible(bracketed(document.text, phrases, tuple(source["labels"])))
    spans = (learned["student_spans"], learned["teacher_spans"])
    columns = columns_of(document, tokens_at(learned), taught, spans)
    return Drawn(
        title=document.doc_id, where=visible(f"{document.source}:{document.line}"), share=share, text=text[:MAX_CHARS],
        columns=tuple(columns[:MAX_COLUMNS]), more_text=max(0, len(text) - MAX_CHARS),
        more_columns=max(0, len(columns) - MAX_COLUMNS),
    )  # fmt: skip


def render_page(report: Report, worst: dict[str, list[Drawn]]) -> str:
    """The page as text; `worst` holds the drawings of each student."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"visible": visible, "size": in_bytes}
    kept = [(k, Markup(bars(k.signals, "bytes"))) for k in report.kept]
    shapes = {a.student: Markup(bars(a.shapes, "aligned spans", 320)) for a in report.alignments}
    charts = [(h, Markup(histogram(h.bars, h.title))) for h in report.histograms]
    return environment.get_template("report.html.j2").render(
        report=report, worst=worst, kept=kept, shapes=shapes, histograms=charts
    )


def in_bytes(number: int) -> str:
    """A size in decimal units.

    >>> in_bytes(999), in_bytes(1_234_567)
    ('999 B', '1.2 MB')
    """
    size, unit = float(number), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if size < 1000:
            break
        size, unit = size / 1000, larger
    return f"{number} B" if unit == "B" else f"{size:.1f} {unit}"

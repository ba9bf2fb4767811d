"""A report as one HTML file: no script, nothing fetched, no text of the corpus that is not escaped and visible.

Three walls stand between the corpus and the reader: `visible` writes control and bidirectional characters as their
code points, jinja2 escapes every value, and the page's own policy forbids scripts and requests.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import jinja2

from xkd_pipeline.reports.plan_text import format_size
from xkd_pipeline.reports.render import bracket_phrases, columns_of, escape_text
from xkd_pipeline.reports.report import Alignment, flatten, gather
from xkd_pipeline.tables.shard import document_at, tokens_at
from xkd_schemas.cache.table import Table
from xkd_schemas.durable_files import replace
from xkd_schemas.errors import UsageError

MAX_COLUMNS: Final = 200
"""Aligned spans of one document that are drawn."""
MAX_CHARS: Final = 1200
"""Characters of one document's text, brackets included, that are shown."""


def write_report(root: Path, out: Path) -> dict[str, Any]:
    """Write the report of a cache to `out`, whole or not at all; raises as `gather`."""
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
    return environment.get_template("report.html.j2").render(
        report=report, worst=worst, max_chars=MAX_CHARS, max_columns=MAX_COLUMNS
    )

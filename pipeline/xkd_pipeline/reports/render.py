"""A document drawn for a terminal: its phrases in brackets, and two models' tokens over each other.

    [NP The old lamp] [VP was lit]

    teacher  The│old  │lamp│was│lit
             =   ~     =    =   =
    student  The│o│ld │lamp│was│lit

Nothing of the text reaches the terminal raw that could move its cursor or
turn its writing direction: control, format and bidirectional characters are shown escaped, blanks as signs. Widths
are terminal cells, so that East Asian text and emoji stay in their columns.
"""

import shutil
import unicodedata
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Final

from rich.cells import cell_len, chop_cells, set_cell_size

from xkd_pipeline.tables.shard import document_at
from xkd_schemas.cache.table import Table
from xkd_schemas.documents import Document, Interval, Spans
from xkd_schemas.errors import InputMissing, UsageError
from xkd_schemas.page import escape_text
from xkd_schemas.tokens import CONTENT, END, OK, TEMPLATE, Int32s, Tokens, tokens_at

SIGNS: Final = {" ": "·", "\n": "⏎", "\t": "⇥", "\r": "␍"}  # what stands for a blank in a token
END_SIGN: Final = "∎"
EXACT: Final = "="  # under a pair of one token each
MANY: Final = "~"  # under a span of several tokens on one side
ALONE: Final = " "  # under tokens that are in no aligned span

_JOIN: Final = "│"
_MARGIN: Final = 9


def show_blanks(text: str) -> str:
    """`escape_text`, with blanks as signs: for a single token.

    >>> show_blanks(" a\\n")
    '·a⏎'
    """
    return escape_text("".join(SIGNS.get(char, "␣" if unicodedata.category(char) == "Zs" else char) for char in text))


def bracket_phrases(text: str, phrases: Sequence[Interval], labels: Sequence[str]) -> str:
    """The text with [NP ...] round its phrases.

    A phrase that overlaps another without lying inside it is numbered at both of its brackets, "[2:VP" and "2]".

    >>> bracket_phrases("the lamp", [(0, 8)], ["NP"])
    '[NP the lamp]'
    """
    crossing = _find_crossing(phrases)
    opened: dict[int, list[tuple[int, str]]] = {}
    closed: dict[int, list[tuple[int, str]]] = {}
    for number, ((start, end), label, numbered) in enumerate(zip(phrases, labels, crossing, strict=True), start=1):
        opened.setdefault(start, []).append((-end, f"[{number}:{label} " if numbered else f"[{label} "))
        closed.setdefault(end, []).append((-start, f" {number}]" if numbered else "]"))
    places = sorted({0, len(text), *opened, *closed})
    out = []
    for at, following in zip(places, [*places[1:], len(text)], strict=True):
        out += [bracket for _, bracket in sorted(closed.get(at, []), key=lambda pair: pair[0])]
        out += [bracket for _, bracket in sorted(opened.get(at, []), key=lambda pair: pair[0])]
        out.append(text[at:following])
    return "".join(out)


def _find_crossing(phrases: Sequence[Interval]) -> list[bool]:
    """Which phrases overlap another without one lying inside the other."""
    by_start, by_end = sorted(phrases), sorted((end, start) for start, end in phrases)
    last = max((end for _, end in phrases), default=0)
    found = []
    for start, end in phrases:
        begun = by_start[bisect_right(by_start, (start, last)) : bisect_left(by_start, (end, 0))]
        ended = by_end[bisect_right(by_end, (start, last)) : bisect_left(by_end, (end, 0))]
        found.append(any(other > end for _, other in begun) or any(other < start for _, other in ended))
    return found


def find(documents: Table, doc: str) -> int:
    """Row number of a document, by number or by the beginning of its doc_id; refused where that is not one text."""
    if doc.isdecimal() and int(doc) < len(documents):
        return int(doc)
    found = [(i, row["doc_id"]) for i, row in enumerate(documents) if doc and row["doc_id"].startswith(doc)]
    if not found:
        raise InputMissing(
            f"no document {doc!r} among {len(documents)}", fix="give a row number from 0 on, or a doc_id"
        )
    if len({doc_id for _, doc_id in found}) > 1:
        raise UsageError(f"{len(found)} documents begin with {doc!r}", fix="give more digits of the doc_id")
    return found[0][0]


def draw(root: Path, doc: str, *, teacher: str, student: str, width: int) -> list[str]:
    """Lines of the drawing of a row number or doc_id; "" is no teacher or student, width 0 fits the terminal."""
    documents = Table(root, "documents")
    number = find(documents, doc)
    row = documents[number]
    document = document_at(row)
    phrases = tuple((int(a), int(b)) for a, b in row["phrases"])
    if not teacher:
        text = bracket_phrases(document.text, phrases, row["labels"])
        return [f"{document.doc_id}  {document.source}:{document.line}", *map(escape_text, text.split("\n"))]
    spans = Spans(words=(), phrases=phrases, labels=tuple(row["labels"]))
    columns = width or shutil.get_terminal_size().columns
    taught = tokens_at(Table(root, f"teachers/{teacher}")[number])
    if not student:
        return render(document, spans, None, taught, None, columns).split("\n")
    learned = Table(root, f"students/{student}")[number]
    aligned = (learned["student_spans"], learned["teacher_spans"])
    return render(document, spans, tokens_at(learned), taught, aligned, columns).split("\n")


def render(
    document: Document,
    spans: Spans,
    student: Tokens | None,
    teacher: Tokens,
    aligned: tuple[Int32s, Int32s] | None = None,
    width: int = 100,
) -> str:
    """The whole drawing, lines of at most `width` cells (40 at least), each segment under its role.

    Without a student the teacher's tokens are drawn alone; `aligned` are token ranges (student [K, 2], teacher [K, 2])
    as `align` gives them.
    """
    width = max(width, 40)
    lines = wrap_line(f"{document.doc_id}  {escape_text(document.source)}:{document.line}", width)
    for segment in document.segments:
        inside = [n for n, (start, end) in enumerate(spans.phrases) if segment.start <= start and end <= segment.end]
        phrases = [(spans.phrases[n][0] - segment.start, spans.phrases[n][1] - segment.start) for n in inside]
        text = bracket_phrases(document.text[segment.start : segment.end], phrases, [spans.labels[n] for n in inside])
        lines += ["", f"{segment.role}{' (target)' if segment.target else ''}"]
        lines += [part for line in text.split("\n") for part in wrap_line(escape_text(line), width)]
    lines += ["", *(part for note in _notes(document, student, teacher) for part in wrap_line(note, width)), ""]
    return "\n".join([*lines, *_lay_out(columns_of(document, student, teacher, aligned), width, student is not None)])


def _notes(document: Document, student: Tokens | None, teacher: Tokens) -> list[str]:
    notes = []
    for title, tokens in (("teacher", teacher), ("student", student)):
        if tokens is not None and tokens.status != OK:
            notes.append(f"{title}: no tokens ({escape_text(tokens.status)})")
        elif tokens is not None:
            cut = f", cut at character {tokens.num_chars}" if tokens.num_chars < len(document.text) else ""
            glue = int((tokens.kinds == TEMPLATE).sum())
            notes.append(f"{title}: {len(tokens.ids)} tokens, {glue} of the template (not drawn){cut}")
    return [*notes, f"{EXACT} one token each   {MANY} several   {END_SIGN} end of turn"]


@dataclass(frozen=True, slots=True)
class Column:
    """One aligned span, or the tokens between two."""

    teacher: str
    student: str
    mark: str


def columns_of(
    document: Document, student: Tokens | None, teacher: Tokens, aligned: tuple[Int32s, Int32s] | None
) -> list[Column]:
    """The drawing column by column: aligned spans and what lies between them; arguments as `render` takes them."""
    if student is None or aligned is None:
        texts = (_texts(document, teacher, n, n + 1) for n in range(len(teacher.ids)))
        return [Column(text, "", ALONE) for text in texts if text]

    def column(theirs: tuple[int, int], ours: tuple[int, int], mark: str) -> Column:
        return Column(_texts(document, teacher, *theirs), _texts(document, student, *ours), mark)

    columns = []
    ours = theirs = 0
    for (first, end), (teacher_first, teacher_end) in zip(aligned[0].tolist(), aligned[1].tolist(), strict=True):
        mark = EXACT if end - first == teacher_end - teacher_first == 1 else MANY
        columns.append(column((theirs, teacher_first), (ours, first), ALONE))
        columns.append(column((teacher_first, teacher_end), (first, end), mark))
        ours, theirs = end, teacher_end
    columns.append(column((theirs, len(teacher.ids)), (ours, len(student.ids)), ALONE))
    return [one for one in columns if one.teacher or one.student]


def _texts(document: Document, tokens: Tokens, first: int, end: int) -> str:
    """The characters of the tokens in the range, template tokens left out."""
    shown = []
    for kind, (start, stop) in zip(tokens.kinds[first:end].tolist(), tokens.spans[first:end].tolist(), strict=True):
        if kind == CONTENT:
            shown.append(show_blanks(document.text[start:stop]) or "∅")
        elif kind == END:
            shown.append(END_SIGN)
    return _JOIN.join(shown)


def _lay_out(columns: Iterable[Column], width: int, both: bool) -> list[str]:
    """Groups of lines: teacher over marks over student; columns that do not fit are folded."""
    room = width - _MARGIN
    lines: list[str] = []
    group: list[tuple[str, str, str]] = []
    used = 0
    for column in (part for whole in columns for part in _fold(whole, room - 1)):
        size = max(cell_len(column.teacher), cell_len(column.student), 1)
        if used and used + size + 1 > room:
            lines += _draw_group(group, both)
            group, used = [], 0
        above, mark, below = (set_cell_size(part, size) for part in (column.teacher, column.mark, column.student))
        group.append((above, mark, below))
        used += size + 1
    return lines + _draw_group(group, both)


def _draw_group(group: Sequence[tuple[str, str, str]], both: bool) -> list[str]:
    if not group:
        return []
    above, marks, below = zip(*group, strict=True)
    lines = [f"{'teacher':<{_MARGIN}}{_JOIN.join(above)}"]
    if both:
        lines += [" " * _MARGIN + " ".join(marks), f"{'student':<{_MARGIN}}{_JOIN.join(below)}"]
    return [*(line.rstrip() for line in lines), ""]


def _fold(column: Column, room: int) -> list[Column]:
    """The column in parts of at most `room` cells; only the first has the mark."""
    parts = zip_longest(chop_word(column.teacher, room), chop_word(column.student, room), fillvalue="")
    return [Column(above, below, ALONE if n else column.mark) for n, (above, below) in enumerate(parts)]


def wrap_line(text: str, width: int) -> list[str]:
    """Lines of at most `width` cells, broken at blanks where there are some; [""] for an empty text.

    Blanks at the beginning stay: code is read by them.

    >>> wrap_line("  the old lamp", 10)
    ['  the old', 'lamp']
    """
    lines, line = [], text[: len(text) - len(text.lstrip(" "))][: width - 1]
    for word in text.lstrip(" ").split(" "):
        longer = f"{line} {word}" if line.strip() else line + word
        if cell_len(longer) <= width:
            line = longer
            continue
        lines += [line] if line.strip() else []
        *full, line = chop_word(word, width)
        lines += full
    return [*lines, line]


def chop_word(word: str, width: int) -> list[str]:
    """Parts of at most `width` cells, at least one; nothing is lost, also not what has no width of its own."""
    *full, _ = chop_cells(word, width) or [""]
    return [*full, word[sum(map(len, full)) :]]

"""The drawing: columns that line up, every token in it, nothing a terminal obeys; and finding what to draw."""

import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len

import four_tokenizers
from four_tokenizers import encoder_of, lone
from slow_alignment import align_one
from small_cache import made
from xkd_pipeline.reports.render import (
    _find_crossing,
    bracket_phrases,
    draw,
    find,
    render,
    show_blanks,
    wrap_line,
)
from xkd_schemas.cache.table import Table
from xkd_schemas.documents import Document, Spans, document_of
from xkd_schemas.errors import InputMissing, UsageError
from xkd_schemas.page import escape_text
from xkd_schemas.tokens import CONTENT

NO_SPANS = Spans(words=(), phrases=(), labels=())


def drawn(document: Document, spans: Spans = NO_SPANS, *, width: int = 80, kinds=("byte_level", "unigram")) -> str:
    student, teacher = (encoder_of(kind).encode(document) for kind in kinds)
    aligned = align_one(student, teacher, np.array([s.end for s in document.segments]))
    return render(document, spans, student, teacher, aligned, width)


def lamp() -> Document:
    return document_of([("prompt", "Who lit it?", False), ("response", "The old lamp", True)], source="d", line=1)


def test_phrases_are_in_brackets_under_their_role() -> None:
    spans = Spans(words=(), phrases=((0, 3), (4, 11), (11, 23)), labels=("NP", "VP", "NP"))

    lines = drawn(lamp(), spans).splitlines()

    assert lines[lines.index("prompt") + 1] == "[NP Who] [VP lit it?]"
    assert lines[lines.index("response (target)") + 1] == "[NP The old lamp]"


def test_teacher_and_student_stand_over_each_other_with_marks_between() -> None:
    lines = drawn(lamp(), kinds=("byte_level", "byte_level")).splitlines()

    teacher = next(n for n, line in enumerate(lines) if line.startswith("teacher  "))
    above, marks, below = lines[teacher : teacher + 3]
    assert above.removeprefix("teacher") == below.removeprefix("student")
    assert set(marks) == {" ", "="}
    assert above.count("│") + 1 == marks.count("=")
    assert above.endswith("∎")


def test_a_span_of_several_tokens_has_its_own_mark() -> None:
    document = lone("🙂 ok")

    lines = drawn(document, kinds=("sentencepiece", "unigram")).splitlines()

    assert [line.split() for line in lines if line.strip() and set(line) <= set(" =~")] == [["~", "~", "=", "="]]


@settings(deadline=None, max_examples=60)
@given(text=four_tokenizers.nasty_text, width=st.integers(40, 90))
def test_no_line_is_wider_than_the_terminal_and_none_can_command_it(text: str, width: int) -> None:
    picture = drawn(document_of([("text", text, True)], source="a\x1b]0;b", line=1), width=width)

    for line in picture.split("\n"):
        assert cell_len(line) <= width
        assert not any(unicodedata.category(char) in {"Cc", "Cf", "Zl", "Zp", "Cs"} for char in line)


@settings(deadline=None, max_examples=60)
@given(text=four_tokenizers.nasty_text)
def test_every_token_is_drawn(text: str) -> None:
    document = lone(text)
    teacher = encoder_of("sentencepiece").encode(document)

    picture = render(document, NO_SPANS, None, teacher, width=100)

    body = "".join(line.removeprefix("teacher  ") for line in picture.split("\n") if line.startswith("teacher  "))
    expected = [show_blanks(text[s:e]) for s, e in teacher.spans[teacher.kinds == CONTENT].tolist()]
    signs = str.maketrans("", "", "│∎ ")  # a token without width stands on a blank; blanks of the text are signs
    assert body.translate(signs) == "".join(expected).translate(signs)


def test_east_asian_text_and_emoji_keep_the_columns() -> None:
    document = lone("東京の夜 ok 🙂 静か fine")

    lines = drawn(document, kinds=("byte_level", "sentencepiece")).splitlines()

    start = next(n for n, line in enumerate(lines) if line.startswith("teacher  "))
    above, below = lines[start], lines[start + 2]
    places = [[cell_len(line[:at]) for at, char in enumerate(line) if char == "│"] for line in (above, below)]
    marks = [at for at, char in enumerate(lines[start + 1]) if char in "=~"]
    assert {at - 1 for at in marks[1:]} <= set(places[0]) & set(places[1])


def test_a_row_without_tokens_says_why() -> None:
    document = lone("\x00\x07")

    picture = drawn(document, kinds=("byte_level", "wordpiece"))

    assert "teacher: no tokens (uncovered_characters)" in picture
    assert "\\x00\\x07" in picture


def test_a_cut_is_said() -> None:
    document = lone("the lamp on the wall " * 9)
    teacher = encoder_of("byte_level", 20).encode(document)

    assert f"cut at character {teacher.num_chars}" in render(document, NO_SPANS, None, teacher)


@pytest.mark.parametrize(
    ("phrases", "labels", "expected"),
    [
        ([], [], "a b c d"), ([(0, 3), (4, 7)], ["NP", "VP"], "[NP a b] [VP c d]"),
        ([(0, 7), (2, 5), (4, 5)], ["VP", "NP", "NP"], "[VP a [NP b [NP c]] d]"),
        ([(0, 3), (0, 1)], ["NP", "NP"], "[NP [NP a] b] c d"), ([(0, 1), (1, 3)], ["NP", "VP"], "[NP a][VP  b] c d"),
        ([(0, 5), (2, 7)], ["NP", "VP"], "[1:NP a [2:VP b c 1] d 2]"),
    ],
)  # fmt: skip
def test_brackets_nest_or_are_numbered(phrases: list[tuple[int, int]], labels: list[str], expected: str) -> None:
    assert bracket_phrases("a b c d", phrases, labels) == expected


@settings(deadline=None, max_examples=100)
@given(four_tokenizers.nasty_text, st.integers(10, 40))
def test_wrapping_loses_nothing_but_blanks(text: str, width: int) -> None:
    shown = escape_text(text)
    lines = wrap_line(shown, width)

    assert all(cell_len(line) <= width for line in lines)
    assert "".join(lines).replace(" ", "") == shown.replace(" ", "")


pairs = st.tuples(st.integers(0, 12), st.integers(1, 6)).map(lambda pair: (pair[0], pair[0] + pair[1]))


@given(st.lists(pairs, max_size=12))
def test_phrases_that_cross_are_those_that_overlap_and_do_not_nest(phrases: list[tuple[int, int]]) -> None:
    def cross(one: tuple[int, int], other: tuple[int, int]) -> bool:
        return one[0] < other[0] < one[1] < other[1] or other[0] < one[0] < other[1] < one[1]

    assert _find_crossing(phrases) == [any(cross(one, other) for other in phrases) for one in phrases]


def documents() -> Table:
    return Table(made() / "cache", "documents")


def test_a_document_is_found_by_row_by_id_and_by_the_beginning_of_its_id() -> None:
    ids = [row["doc_id"] for row in documents()]

    assert [find(documents(), str(n)) for n in range(12)] == list(range(12))
    assert [find(documents(), doc_id) for doc_id in ids] == list(range(12))
    short = next(n for n in range(3, 16) if len({i[:n] for i in ids}) == 12 and not ids[5][:n].isdecimal())
    assert find(documents(), ids[5][:short]) == 5


@pytest.mark.parametrize("doc", ["12", "-1", "zzz", "", "²"])
def test_a_document_that_is_not_there_is_missing_with_the_number_there_are(doc: str) -> None:
    with pytest.raises(InputMissing, match=rf"no document {doc!r} among 12\. Next: give a row number"):
        find(documents(), doc)


def test_a_beginning_that_fits_several_texts_is_not_guessed_and_a_text_that_is_there_twice_is_found_once() -> None:
    table = [{"doc_id": doc_id} for doc_id in ("ab10", "ab20", "c300", "c300")]

    with pytest.raises(UsageError, match=r"2 documents begin with 'ab'.*give more digits"):
        find(table, "ab")
    assert (find(table, "ab2"), find(table, "c3")) == (1, 2)


def test_without_any_model_the_phrases_are_drawn(tmp_path: Path) -> None:
    shutil.copytree(made() / "cache" / "documents", tmp_path / "documents")

    lines = draw(tmp_path, "0", teacher="", student="", width=80)

    assert lines[0] == f"{documents()[0]['doc_id']}  corpus.jsonl:1"
    assert "[NP The old keeper] [VP lit] [NP it]" in " ".join(lines[1:])

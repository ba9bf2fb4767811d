"""Documents, spans, signals, columns and blocks of rows; a cache on somebody's disk is read by released programs."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xkd_schemas.documents import DOCUMENTS_READ, Segment, Spans, checked_spans, document_of, documents_schema
from xkd_schemas.errors import BadData, UsageError
from xkd_schemas.ragged import Ragged
from xkd_schemas.signals import KINDS, TEACHERS_VERSION, Signal, signal_named, teacher_schema
from xkd_schemas.tokens import OK, STUDENTS, STUDENTS_VERSION, TOKEN_FIELDS, TokenBatch, Tokens, kept_rows, predictors

PARTS = [("prompt", "Who lit it? ", False), ("response", "The keeper.", True)]


def test_segments_are_adjacent_and_cover_the_joined_text() -> None:
    document = document_of([*PARTS, ("response", "", True)], source="a.jsonl", line=7)

    assert document.text == "Who lit it? The keeper."
    assert document.segments == (
        Segment(role="prompt", start=0, end=12, target=False),
        Segment(role="response", start=12, end=23, target=True),
    )


def test_the_id_depends_on_text_and_segments_and_not_on_the_place() -> None:
    here = document_of(PARTS, source="a", line=1)

    assert here.doc_id == document_of(PARTS, source="b", line=2).doc_id == "f723fe869dcc27d5"
    others = [
        [("prompt", "Who lit it?", False), ("response", " The keeper.", True)],
        [("user", "Who lit it? ", False), ("response", "The keeper.", True)],
        [("prompt", "Who lit it? ", True), ("response", "The keeper.", True)],
        [("prompt", "Who lit it? ", False), ("response", "The keeper!", True)],
    ]
    assert len({here.doc_id, *(document_of(parts, source="a", line=1).doc_id for parts in others)}) == 5


@pytest.mark.parametrize("place", [(-1, 3), (5, 5), (6, 5), (20, 24), (8, 15)])
@pytest.mark.parametrize("kind", ["word", "phrase"])
def test_a_span_outside_the_text_or_across_a_segment_border_names_the_row(place: tuple[int, int], kind: str) -> None:
    words, phrases = ((place,), ()) if kind == "word" else ((), (place,))
    spans = Spans(words=words, phrases=phrases, labels=("NP",) * len(phrases))

    why = "crosses a segment border" if place == (8, 15) else "is not inside the text of 23 char"
    with pytest.raises(BadData, match=rf"a:7: {kind} \[{place[0]}, {place[1]}\) {why}"):
        checked_spans(document_of(PARTS, source="a", line=7), spans)


def test_spans_at_a_segment_border_are_taken() -> None:
    fitting = Spans(words=((0, 3), (12, 15)), phrases=((8, 12), (12, 23)), labels=("NP", "NP"))

    assert checked_spans(document_of(PARTS, source="a", line=7), fitting) is fitting


@given(st.lists(st.booleans(), max_size=30))
def test_states_are_kept_where_the_token_or_the_next_one_is_a_target(targets: list[bool]) -> None:
    targets_T = np.array(targets, np.bool_)

    following = [*targets[1:], False]
    assert kept_rows(targets_T).tolist() == [t for t, here in enumerate(targets) if here or following[t]]
    assert predictors(targets_T).tolist() == [t - 1 for t, here in enumerate(targets) if here and t > 0]
    assert set(predictors(targets_T)) <= set(kept_rows(targets_T))


signals = st.sampled_from(sorted(KINDS)).flatmap(
    lambda name: st.builds(
        Signal,
        st.just(name),
        st.integers(0, 200) if KINDS[name].layer else st.none(),
        st.sampled_from(("word", "phrase")) if KINDS[name].unit else st.none(),
        st.integers(1, 10**6) if KINDS[name].top else st.none(),
    )
)


@given(signals)
def test_a_column_name_says_the_whole_signal(signal: Signal) -> None:
    assert signal_named(signal.column) == signal


@pytest.mark.parametrize(
    "column",
    [
        "", "hidden", "hidden_last@3", "centrality", "centrality@", "centrality@x", "centrality@-1", "span_mass@3",
        "span_mass:word", "span_mass@3:token", "entropy:word", "entropy@1", " entropy", "entropy\n",
        "span_mass@3:word:word", "topk_ids", "topk_ids#", "topk_ids#0", "topk_ids#x", "entropy#4", "topk_ids@3#4",
    ],
)  # fmt: skip
def test_a_name_that_is_no_signal_is_refused_and_the_known_ones_listed(column: str) -> None:
    with pytest.raises(UsageError, match=r"is not known. Next: use one of: hidden_last, .*span_mass@LAYER:word\|"):
        signal_named(column)


def test_the_columns_are_the_tokens_and_then_the_signals_once_each_in_sorted_order() -> None:
    wanted = [Signal("span_mass", 10, "word"), Signal("entropy"), Signal("span_mass", 9, "word"), Signal("entropy")]

    names = teacher_schema(wanted, 8).names

    assert names == [f.name for f in TOKEN_FIELDS] + ["entropy", "span_mass@10:word", "span_mass@9:word"]


GOLDEN = Path(__file__).parents[2] / "golden"
EVERY = [
    Signal(name, 3 if k.layer else None, "word" if k.unit else None, 4 if k.top else None) for name, k in KINDS.items()
]
SCHEMAS = {
    **{f"documents_v{version}": documents_schema(version) for version in DOCUMENTS_READ},
    f"students_v{STUDENTS_VERSION}": STUDENTS,
    f"teachers_v{TEACHERS_VERSION}": teacher_schema(EVERY, 8),
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_schema_is_the_one_that_was_released(name: str) -> None:
    text = SCHEMAS[name].to_string(truncate_metadata=False, show_field_metadata=True) + "\n"

    assert text == (GOLDEN / f"{name}.txt").read_text(encoding="utf-8"), (
        f"the {name.split('_')[0]} schema is no longer version {name[-1]}: bump its VERSION and add a golden file"
    )


ROWS = st.lists(st.lists(st.tuples(st.integers(0, 99), st.integers(0, 99)), max_size=4), max_size=6)


def tokens(size: int, status: str = OK) -> Tokens:
    numbers = np.arange(size, dtype=np.int32)
    return Tokens(
        status=status, num_chars=2 * size, ids=numbers, spans=np.stack([numbers, numbers + 1], axis=1),
        kinds=(numbers % 3).astype(np.uint8), targets=numbers % 2 == 0, extended=size // 2,
    )  # fmt: skip


def plain(row: Tokens) -> tuple[object, ...]:
    arrays = (row.ids, row.spans, row.kinds, row.targets)
    return row.status, row.num_chars, row.extended, *(a.tolist() for a in arrays)


@settings(deadline=None)
@given(rows=ROWS, cut=st.slices(6))
def test_lists_and_their_slices_are_their_rows(rows: list[list[tuple[int, int]]], cut: slice) -> None:
    lists, cut = Ragged.of(rows, np.int32, 2), slice(cut.start, cut.stop)

    assert [row.tolist() for row in lists] == [[list(pair) for pair in row] for row in rows]
    assert [row.tolist() for row in lists[cut]] == [row.tolist() for row in list(lists)[cut]]
    assert lists.counts.tolist() == [len(row) for row in rows]


def test_a_row_behind_the_last_or_in_front_of_the_first_is_not_there() -> None:
    lists, block = Ragged.of([[1], [2, 3]], np.int32), TokenBatch.of([tokens(1), tokens(2)])

    assert (lists[-1].tolist(), block[-2].ids.tolist()) == ([2, 3], [0])
    for rows in (lists, block):
        for index in (2, -3):
            with pytest.raises(IndexError):
                rows[index]


@settings(deadline=None)
@given(sizes=st.lists(st.integers(0, 5), max_size=5), data=st.data())
def test_tokens_come_out_of_a_block_and_an_unusable_row_has_none(sizes: list[int], data: st.DataObject) -> None:
    rows = [tokens(n) for n in sizes]
    usable = np.array(data.draw(st.lists(st.booleans(), min_size=len(sizes), max_size=len(sizes))), bool)
    block = TokenBatch.of(rows)
    statuses = [OK if fine else "no_target" for fine in usable]

    assert [plain(row) for row in block] == [plain(row) for row in block[:]] == [plain(row) for row in rows]
    marked = block.with_statuses(statuses)
    assert [row.status for row in marked] == statuses
    for row, old, fine in zip(marked, rows, usable, strict=True):
        assert plain(row)[1:] == (plain(old) if fine else (OK, old.num_chars, *plain(tokens(0))[2:]))[1:]
    assert TokenBatch.of(marked) is marked

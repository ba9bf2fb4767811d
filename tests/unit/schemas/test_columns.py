"""Documents, spans, signals and columns; a cache on somebody's disk is read by those that were released."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xkd_schemas.documents import DOCUMENTS_READ, Segment, Spans, checked_spans, document_of, documents_schema
from xkd_schemas.errors import BadData, UsageError
from xkd_schemas.signals import KINDS, TEACHERS_VERSION, Signal, signal_named, teacher_schema
from xkd_schemas.tokens import STUDENTS, STUDENTS_VERSION, TOKEN_FIELDS, kept_rows, predictors

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

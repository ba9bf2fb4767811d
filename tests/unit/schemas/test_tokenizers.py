"""The identity of a tokenizer: equal for copies, different for everything that changes what it does."""

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import four_tokenizers
from xkd_schemas.durable_files import digest
from xkd_schemas.errors import UsageError
from xkd_schemas.text.tokenizers import PROBES, encode_texts, identity


def changed(kind: str, change) -> PreTrainedTokenizerFast:
    data = json.loads(four_tokenizers.tokenizer_of(kind).backend_tokenizer.to_str())
    change(data)
    return four_tokenizers.wrapped(Tokenizer.from_str(json.dumps(data)))


def differing(a: PreTrainedTokenizerFast, b: PreTrainedTokenizerFast) -> set[str]:
    ours, theirs = identity(a), identity(b)
    assert ours.keys() == theirs.keys()
    return {key for key in ours if ours[key] != theirs[key]}


@pytest.mark.parametrize("kind", four_tokenizers.KINDS)
def test_a_saved_and_loaded_copy_is_the_same(kind: str, tmp_path: Path) -> None:
    tokenizer = four_tokenizers.fresh(kind)
    tokenizer.chat_template = four_tokenizers.CHAT_TEMPLATE
    tokenizer.save_pretrained(tmp_path)

    assert differing(tokenizer, AutoTokenizer.from_pretrained(tmp_path)) == set()
    assert differing(tokenizer, PreTrainedTokenizerFast.from_pretrained(tmp_path)) == set()


def test_encoding_and_truncating_with_it_does_not_change_it() -> None:
    tokenizer = four_tokenizers.fresh("byte_level")
    before = identity(tokenizer)

    tokenizer(["one two three", "four"], truncation=True, max_length=2, padding="max_length")

    assert identity(tokenizer) == before


def test_two_swapped_entries_of_the_vocabulary_show() -> None:
    def swap(data: dict) -> None:
        vocabulary = data["model"]["vocab"]
        a, b = sorted(vocabulary, key=vocabulary.get)[-2:]
        vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]

    tokenizer = four_tokenizers.tokenizer_of("wordpiece")

    assert "vocabulary" in differing(tokenizer, changed("wordpiece", swap))


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda t: setattr(t, "eos_token", "<|im_end|>"), "special_tokens"),
        (lambda t: t.add_special_tokens({"additional_special_tokens": ["<tool>"]}), "special_tokens"),
        (lambda t: setattr(t, "chat_template", four_tokenizers.CHAT_TEMPLATE), "chat_template"),
    ],
)
def test_another_special_token_or_chat_template_shows(change, part: str) -> None:
    tokenizer, other = four_tokenizers.fresh("byte_level"), four_tokenizers.fresh("byte_level")
    change(other)

    assert differing(tokenizer, other) - {"vocabulary"} == {part}
    assert identity(tokenizer)["chat_template"] == "none"


def test_another_normaliser_shows_in_the_probe_alone() -> None:
    other = four_tokenizers.fresh("byte_level")
    other.backend_tokenizer.normalizer = normalizers.Replace("fox", "ox")

    assert differing(four_tokenizers.tokenizer_of("byte_level"), other) == {"probe"}


def test_a_start_token_added_by_itself_shows_in_the_probe() -> None:
    without = changed("sentencepiece", lambda data: data.update(post_processor=None))

    assert differing(four_tokenizers.tokenizer_of("sentencepiece"), without) == {"probe"}


def test_the_probes_are_many_and_never_change() -> None:
    assert len(set(PROBES)) >= 190
    assert {"\x00", "🙂", "東京の夜", "שלום עולם", " " * 40} <= set(PROBES)
    assert digest(PROBES)[:16] == "0cc336862d5b45b1", "every fingerprint depends on the probes"


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece", "wordpiece"])
def test_what_looks_like_a_special_token_is_text(kind: str) -> None:
    tokenizer = four_tokenizers.tokenizer_of(kind)

    ids = encode_texts(tokenizer, ["a</s>b"]).ids

    assert tokenizer.eos_token_id not in ids.tolist()


def test_texts_are_never_truncated_or_padded() -> None:
    tokenizer = four_tokenizers.fresh("byte_level")
    tokenizer.backend_tokenizer.enable_truncation(3)
    tokenizer.backend_tokenizer.enable_padding(length=50)

    encoded = encode_texts(tokenizer, ["the lamp on the harbour wall", ""])

    assert encoded.first.tolist() == [0, len(encoded.ids), len(encoded.ids)]
    assert len(encoded.ids) > 5
    assert encoded.offsets.shape == (len(encoded.ids), 2)
    assert encoded.ids.dtype == encoded.offsets.dtype == np.int32


def test_a_slow_tokenizer_is_refused_by_name() -> None:
    class Slow:
        is_fast = False
        name_or_path = "some/model"

    with pytest.raises(UsageError, match=r"some/model: this tokenizer gives no character offsets"):
        identity(Slow())

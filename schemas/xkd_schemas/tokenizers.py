"""What is asked of a tokenizer, and what makes two tokenizers the same one.

A name or a class says little: the same vocabulary with another normaliser cuts text elsewhere, and a cache made with
it would be silently wrong. So the identity is a digest of what the tokenizer holds and of what it does to ~200 fixed
strings. transformers is not imported here; anything that behaves like one of its fast tokenizers will do.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, Protocol

import numpy as np

from xkd_schemas.errors import UsageError
from xkd_schemas.manifest import digest
from xkd_schemas.tokens import Int32s

NAMED_TOKENS: Final = ("bos_token", "eos_token", "pad_token", "unk_token")


class FastTokenizer(Protocol):
    """The part of transformers' fast tokenizers that is used here."""

    is_fast: bool
    chat_template: Any
    """str, a dict of named templates, or None."""
    added_tokens_decoder: Mapping[int, Any]
    """Token id -> added token with `content` and flags."""

    def get_vocab(self) -> dict[str, int]:
        """Every token, added ones included, with its id."""

    def __call__(self, text: Any, **options: Any) -> Mapping[str, Any]:
        """Encode one string or a list of strings."""


def encode_texts(tokenizer: FastTokenizer, texts: Sequence[str]) -> list[tuple[Int32s, Int32s]]:
    """Token ids [T] and character offsets [T, 2] of each text, both int32, without any special token.

    Text that looks like a special token ("</s>") is encoded as the characters it is made of, so that what stands in a
    document never ends a turn (a unigram vocabulary may still hold the string as an ordinary piece). Nothing is
    truncated or padded, whatever the tokenizer file asks for.

    Raises:
        UsageError: The tokenizer is a slow one, without offsets.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise UsageError(
            f"{name_of(tokenizer)}: this tokenizer gives no character offsets (it is a slow, pure-Python one)",
            next="use a model whose folder has a tokenizer.json",
        )
    if not texts:
        return []
    encoded = tokenizer(
        list(texts), add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True, padding=False,
        truncation=False, return_attention_mask=False, return_token_type_ids=False, verbose=False,
    )  # fmt: skip
    return [
        (np.array(ids, dtype=np.int32), _pairs(offsets))
        for ids, offsets in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    ]


def _pairs(offsets: Sequence[tuple[int, int]]) -> Int32s:
    """[T, 2]; twice as fast as np.array on a list of pairs."""
    flat = np.fromiter(itertools.chain.from_iterable(offsets), dtype=np.int32, count=2 * len(offsets))
    return flat.reshape(-1, 2)


def name_of(tokenizer: FastTokenizer) -> str:
    """The name or folder it was loaded from, else its class: for messages."""
    return str(getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__)


def identity(tokenizer: FastTokenizer) -> dict[str, str]:
    """Digests that are equal exactly for tokenizers that do the same, whatever their class or folder.

    vocabulary      every token with its id
    special_tokens  added tokens with their ids and flags; which ones are bos, eos, pad and unk
    chat_template   the template, or "none"
    probe           ids and offsets of PROBES, and which special tokens it adds by itself

    Raises:
        UsageError: The tokenizer is a slow one, without offsets.
    """
    encoded = encode_texts(tokenizer, PROBES)
    added = [
        [int(token_id), str(token.content), *(bool(getattr(token, flag, False)) for flag in _FLAGS)]
        for token_id, token in sorted(tokenizer.added_tokens_decoder.items())
    ]
    named = {name: [str(getattr(tokenizer, name)), getattr(tokenizer, f"{name}_id")] for name in NAMED_TOKENS}
    template = tokenizer.chat_template
    by_itself = [int(token_id) for token_id in tokenizer("x", verbose=False)["input_ids"]]
    return {
        "vocabulary": digest(sorted(tokenizer.get_vocab().items())),
        "special_tokens": digest([added, named]),
        "chat_template": digest(template) if template else "none",
        "probe": digest([by_itself, [[ids.tolist(), offsets.tolist()] for ids, offsets in encoded]]),
    }


_FLAGS: Final = ("special", "lstrip", "rstrip", "normalized", "single_word")


def _probes() -> Iterable[str]:
    """~200 strings on which tokenizers differ. Never change one: every cache's fingerprint depends on them."""
    words = (
        "the",
        "Hello",
        "don't",
        "state-of-the-art",
        "naïve",
        "Straße",
        "İstanbul",
        "Ⅷ",
        "ﬁnal",
        "½",
        "①",
        "ＡＢＣ",
    )
    marks = ("e\u0301", "a\u0308\u0323", "\u0301", "ก็", "हिन्दी", "각", "\u1112\u1161\u11ab", "ǆ", "ẞ", "\u0345")
    scripts = (
        "東京の夜",
        "我们在这里",
        "한국어",
        "السلام عليكم",
        "שלום עולם",
        "Здравствуйте",
        "ελληνικά",
        "ไทย",
        "ქართული",
    )
    emoji = ("🙂", "👩‍👩‍👧", "🇩🇪", "👍🏽", "❤️", "🏳️‍🌈", "1️⃣", "🙂🙂", "\U0001f9d1\u200d\U0001f52c")
    hidden = (
        "\x00",
        "\x07",
        "\x1b[0m",
        "\u200b",
        "\u200d",
        "\u200f",
        "\u202e",
        "\ufeff",
        "\u00ad",
        "\ufffd",
        "\U000e0061",
    )
    blanks = (
        " ",
        "  ",
        " " * 7,
        " " * 40,
        "\t",
        "\t\t",
        "\n",
        "\n\n",
        "\n" * 9,
        "\r\n",
        "\u00a0",
        "\u3000",
        "\u2028",
        "\x85",
    )
    numbers = (
        "0",
        "7",
        "42",
        "1987",
        "12,345.67",
        "-3e-10",
        "0x1F",
        "٣٤",
        "1/2",
        "100%",
        "3.14159265358979",
        "0" * 30,
    )
    code = (
        "def f(x):\n    return x",
        "a[i]->b.c",
        "x += 1;",
        "</s>",
        "<s>",
        "<|im_end|>",
        "[INST]",
        "<0x0A>",
        "▁a",
        "Ġb",
        "##c",
        "{{}}",
    )
    pieces = (*words, *marks, *scripts, *emoji, *hidden, *blanks, *numbers, *code)
    yield ""
    yield from pieces
    yield from (f"a{piece}b" for piece in (*marks, *emoji, *hidden, *blanks, *code))
    yield from (f" {piece} " for piece in (*words, *scripts, *emoji, *numbers))
    yield "".join(pieces)
    yield "x" * 300
    yield "The quick brown fox, aged 7, jumps over the lazy dog's 13 bones.\n\nIt was 10:45 p.m. (UTC+2)!"


PROBES: Final = tuple(_probes())
"""What every tokenizer is asked to encode for its identity."""

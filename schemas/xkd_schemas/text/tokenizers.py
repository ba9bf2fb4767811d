"""What is asked of a tokenizer, and what makes two tokenizers the same one.

A name or a class says little: the same vocabulary with another normaliser cuts text elsewhere, and a cache made with
it would be silently wrong. So the identity is a digest of what the tokenizer holds and of what it does to ~200 fixed
strings. transformers is not imported here; anything that behaves like one of its fast tokenizers will do.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from xkd_schemas.durable_files import digest
from xkd_schemas.errors import UsageError
from xkd_schemas.ragged import row_offsets
from xkd_schemas.tokens import Int32s

NAMED_TOKENS: Final = ("bos_token", "eos_token", "pad_token", "unk_token")


class FastTokenizer(Protocol):
    """The part of transformers' fast tokenizers that is used here."""

    is_fast: bool
    chat_template: Any
    """str, a dict of named templates, or None."""
    backend_tokenizer: Any
    """The Tokenizer of the tokenizers library."""
    added_tokens_decoder: Mapping[int, Any]
    """Token id -> added token with `content` and flags."""

    def get_vocab(self) -> dict[str, int]:
        """Every token, added ones included, with its id."""

    def __call__(self, text: Any, **options: Any) -> Mapping[str, Any]:
        """Encode one string or a list of strings."""


class Encoded(NamedTuple):
    """What a tokenizer makes of N texts, C tokens together."""

    ids: Int32s
    """[C]"""
    offsets: Int32s
    """[C, 2] characters of the token's own text."""
    first: npt.NDArray[np.int64]
    """[N + 1]; text n has the tokens first[n] to first[n + 1]."""


def encode_texts(tokenizer: FastTokenizer, texts: Sequence[str]) -> Encoded:
    """Token ids and character offsets of every text, without any special token.

    Text that looks like a special token ("</s>") is encoded as the characters it is made of, so that what stands in a
    document never ends a turn (a unigram vocabulary may still hold the string as an ordinary piece). Nothing is
    truncated or padded, whatever the tokenizer file asks for. The tokenizers library is asked itself: going through
    transformers costs a quarter more, for lists that nobody reads.

    Raises:
        UsageError: The tokenizer is a slow one, without offsets.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise UsageError(
            f"{name_of(tokenizer)}: this tokenizer gives no character offsets (it is a slow, pure-Python one)",
            fix="use a model whose folder has a tokenizer.json",
        )
    return encode_with(set_plain(tokenizer.backend_tokenizer), texts)


def encode_with(backend: Any, texts: Sequence[str]) -> Encoded:
    """`encode_texts` by a tokenizer of the tokenizers library, set by `set_plain`."""
    encodings = backend.encode_batch(list(texts), add_special_tokens=False)
    ids = [encoding.ids for encoding in encodings]
    first = row_offsets([len(found) for found in ids])
    size, chain = int(first[-1]), itertools.chain.from_iterable
    pairs = chain(encoding.offsets for encoding in encodings)
    return Encoded(
        np.fromiter(chain(ids), np.int32, count=size),
        np.fromiter(chain(pairs), np.int32, count=2 * size).reshape(-1, 2),
        first,
    )


def set_plain(backend: Any, *, specials: bool = False) -> Any:
    """The same tokenizer of the tokenizers library, set to neither truncate nor pad.

    With `specials` it knows special tokens in a text, as a chat template's rendering wants it; until the next call.
    """
    if backend.truncation is not None:
        backend.no_truncation()
    if backend.padding is not None:
        backend.no_padding()
    if backend.encode_special_tokens == specials:
        backend.encode_special_tokens = not specials
    return backend


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
    ids, offsets, first = (part.tolist() for part in encode_texts(tokenizer, PROBES))
    probed = [[ids[start:end], offsets[start:end]] for start, end in itertools.pairwise(first)]
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
        "probe": digest([by_itself, probed]),
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
        "\x00", "\x07", "\x1b[0m", "\u200b", "\u200d", "\u200f", "\u202e", "\ufeff", "\u00ad", "\ufffd", "\U000e0061",
    )  # fmt: skip
    blanks = (
        " ", "  ", " " * 7, " " * 40, "\t", "\t\t", "\n", "\n\n", "\n" * 9, "\r\n", "\u00a0", "\u3000", "\u2028",
        "\x85",
    )  # fmt: skip
    numbers = (
        "0", "7", "42", "1987", "12,345.67", "-3e-10", "0x1F", "٣٤", "1/2", "100%", "3.14159265358979", "0" * 30,
    )  # fmt: skip
    code = (
        "def f(x):\n    return x", "a[i]->b.c", "x += 1;", "</s>", "<s>", "<|im_end|>", "[INST]", "<0x0A>", "▁a", "Ġb",
        "##c", "{{}}",
    )  # fmt: skip
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

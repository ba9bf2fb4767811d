"""What is asked of a tokenizer: ids, offsets made into checked intervals, and whether it is the same as another.

Offsets need care: blanks are glued to the front of tokens, pieces of one character repeat its offsets, a normaliser
may drop characters, trim a token to nothing or go back. Many documents are checked at once: they are laid end to end
on one line of characters, a blank between two.

A name or a class says little: the same vocabulary with another normaliser cuts text elsewhere, and a cache made with
it would be silently wrong. So the identity is a digest of what the tokenizer holds and of what it does to ~200 fixed
strings. transformers is not imported here; anything that behaves like one of its fast tokenizers will do.

Shape legend for this file
    R documents    G encoded segments    C content tokens    L characters of the line
"""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np

from xkd_schemas.durable_files import digest
from xkd_schemas.errors import UsageError
from xkd_schemas.ragged import row_offsets
from xkd_schemas.tokens import OK, Bools, Int32s, Int64s

NAMED_TOKENS: Final = ("bos_token", "eos_token", "pad_token", "unk_token")
_LAST_BLANK: Final = 0x3000
_IS_BLANK: Final = np.array([chr(code).isspace() for code in range(_LAST_BLANK + 1)] + [False])
_FLAGS: Final = ("special", "lstrip", "rstrip", "normalized", "single_word")


class Encoded(NamedTuple):
    """What a tokenizer makes of N texts, C tokens together."""

    ids: Int32s  # [C]
    offsets: Int32s  # [C, 2] characters of the token's own text
    first: Int64s  # [N + 1]; text n has the tokens first[n] to first[n + 1]


def encode_texts(tokenizer: Any, texts: Sequence[str]) -> Encoded:
    """Token ids and character offsets of every text, without any special token.

    Text that looks like a special token ("</s>") is encoded as the characters it is made of, so that what stands in a
    document never ends a turn (a unigram vocabulary may still hold the string as an ordinary piece). Nothing is
    truncated or padded, whatever the tokenizer file asks for. The tokenizers library is asked itself, as transformers
    costs a quarter more. UsageError where the tokenizer is a slow one, without offsets.
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
    chain = itertools.chain.from_iterable
    first = row_offsets([len(encoding) for encoding in encodings])
    ids = np.fromiter(chain(encoding.ids for encoding in encodings), np.int32, int(first[-1]))
    ends = np.fromiter(chain(chain(encoding.offsets for encoding in encodings)), np.int32, 2 * len(ids))
    return Encoded(ids, ends.reshape(-1, 2), first)


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


def name_of(tokenizer: Any) -> str:
    """The name or folder it was loaded from, else its class: for messages."""
    return str(getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedText:
    """What of a block of documents a tokenizer was given, and the offsets it gave back."""

    texts: Sequence[str]  # [R], each up to the character where it was cut
    document_G: Int64s  # which document each encoded segment is of; ascending
    segments_G2: Int32s  # its characters in its document, up to the cut
    encoded: Encoded  # of these G segments


def content_intervals(read: EncodedText) -> tuple[Int32s, list[str]]:
    """Intervals [C, 2] int32 in the characters of each token's document; "ok" or what is wrong with each document [R].

    Good intervals stay in their segment and in front of the cut, their starts and ends never decrease, and every
    character that is not blank lies in one. Blanks in front of a token are left out; a token of blanks keeps them.
    """

    def of_documents(numbers: Int64s) -> Bools:
        return np.bincount(numbers, minlength=len(read.texts)) > 0

    base_R = row_offsets([len(text) + 1 for text in read.texts]).astype(np.int32)  # where documents begin on the line
    count_G = np.diff(read.encoded.first)
    low_G2 = read.segments_G2 + base_R[read.document_G][:, None]
    low_C, high_C = np.repeat(low_G2[:, 0], count_G), np.repeat(low_G2[:, 1], count_G)  # each token's segment
    start_C, end_C = read.encoded.offsets.T + low_C  # the library's offsets on the line
    document_C = np.repeat(read.document_G, count_G)
    outside_R = of_documents(document_C[(start_C < low_C) | (end_C > high_C) | (end_C < start_C)])
    np.clip(start_C, low_C, high_C, out=start_C)  # so that they can be looked up; the document is refused below
    np.clip(end_C, low_C, high_C, out=end_C)
    solid_L = ~blanks(" ".join(read.texts))
    solid_before = row_offsets(solid_L).astype(np.int32)  # characters that are not blank in front of each place
    first_solid_C = np.append(np.flatnonzero(solid_L), len(solid_L)).astype(np.int32)[solid_before[start_C]]
    kept_C = (first_solid_C >= end_C) | outside_R[document_C]  # tokens of blanks alone keep their start
    spans_C2 = np.stack([np.where(kept_C, start_C, first_solid_C), end_C], axis=1)  # without blanks in front
    empty = np.flatnonzero(spans_C2[:, 0] == end_C)
    _widen(spans_C2, empty[~outside_R[document_C[empty]]], low_C, high_C, solid_before)
    backward_C = (np.diff(spans_C2, axis=0) < 0).any(axis=1)  # never between documents
    backward_R = of_documents(document_C[1:][backward_C])
    starts_L, ends_L = (np.bincount(places, minlength=len(solid_L) + 1) for places in spans_C2.T)
    hole_L = solid_L & (np.cumsum(starts_L - ends_L)[:-1] == 0)  # characters that are in no token
    holes_R = of_documents(np.searchsorted(base_R, np.flatnonzero(hole_L), side="right") - 1)
    statuses = [
        "outside_text" if outside else "offsets_not_monotone" if backward else "uncovered_characters" if hole else OK
        for outside, backward, hole in zip(outside_R.tolist(), backward_R.tolist(), holes_R.tolist(), strict=True)
    ]
    spans_C2 -= base_R[document_C][:, None]  # in characters of each document
    return spans_C2, statuses


def _widen(spans_C2: Int32s, empty: Int64s, low_C: Int32s, high_C: Int32s, solid_before: Int32s) -> None:
    """Give tokens with an empty interval characters, in place, where there are some they can stand for.

    Some byte-level tokenizers trim a token of blanks to nothing: it gets the blanks between it and the token before.
    One that stands for nothing (a lone "▁") stays empty in front of what follows, and at its segment's end shares
    the interval of the token before, so that an empty interval never stands on the wrong side of a segment border.
    """
    for n in empty:
        follows = n > 0 and low_C[n - 1] == low_C[n]
        at, before = spans_C2[n, 0], spans_C2[n - 1, 1] if follows else low_C[n]
        if before < at and solid_before[before] == solid_before[at]:
            spans_C2[n, 0] = before
        elif at == high_C[n]:
            spans_C2[n] = spans_C2[n - 1] if follows else (low_C[n], high_C[n])


def blanks(text: str) -> Bools:
    """True for every character [L] that is white space to Python's str.isspace.

    >>> blanks("a b").tolist()
    [False, True, False]
    """
    if text.isascii():
        return _IS_BLANK[np.frombuffer(text.encode(), dtype=np.uint8)]
    codes_L = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    return _IS_BLANK[np.minimum(codes_L, _LAST_BLANK + 1)]


def identity(tokenizer: Any) -> dict[str, str]:
    """Digests that are equal exactly for tokenizers that do the same, whatever their class or folder.

    vocabulary      every token with its id
    special_tokens  added tokens with their ids and flags; which ones are bos, eos, pad and unk
    chat_template   the template, or "none"
    probe           ids and offsets of PROBES, and which special tokens it adds by itself
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


def _probes() -> Iterable[str]:
    """~200 strings on which tokenizers differ. Never change one: every cache's fingerprint depends on them."""
    words = (
        "the", "Hello", "don't", "state-of-the-art", "naïve", "Straße", "İstanbul", "Ⅷ", "ﬁnal", "½", "①", "ＡＢＣ",
    )  # fmt: skip
    marks = ("e\u0301", "a\u0308\u0323", "\u0301", "ก็", "हिन्दी", "각", "\u1112\u1161\u11ab", "ǆ", "ẞ", "\u0345")
    scripts = (
        "東京の夜", "我们在这里", "한국어", "السلام عليكم", "שלום עולם", "Здравствуйте", "ελληνικά", "ไทย", "ქართული",
    )  # fmt: skip
    emoji = ("🙂", "👩‍👩‍👧", "🇩🇪", "👍🏽", "❤️", "🏳️‍🌈", "1️⃣", "🙂🙂", "\U0001f9d1\u200d\U0001f52c")
    hidden = ("\x00", "\x07", "\x1b[0m", *"\u200b\u200d\u200f\u202e\ufeff\u00ad\ufffd\U000e0061")
    blanks = (" ", "  ", " " * 7, " " * 40, "\t", "\t\t", "\n", "\n\n", "\n" * 9, "\r\n", *"\u00a0\u3000\u2028\x85")
    numbers = ("0 7 42 1987 12,345.67 -3e-10 0x1F ٣٤ 1/2 100% 3.14159265358979 " + "0" * 30).split()
    code = (
        "def f(x):\n    return x", "a[i]->b.c", "x += 1;", "</s>", "<s>", "<|im_end|>", "[INST]", "<0x0A>", "▁a", "Ġb",
        "##c", "{{}}",
    )  # fmt: skip
    pieces = (*words, *marks, *scripts, *emoji, *hidden, *blanks, *numbers, *code)
    yield from ("", *pieces)
    yield from (f"a{piece}b" for piece in (*marks, *emoji, *hidden, *blanks, *code))
    yield from (f" {piece} " for piece in (*words, *scripts, *emoji, *numbers))
    yield "".join(pieces)
    yield "x" * 300
    yield "The quick brown fox, aged 7, jumps over the lazy dog's 13 bones.\n\nIt was 10:45 p.m. (UTC+2)!"


PROBES: Final = tuple(_probes())  # what every tokenizer is asked to encode for its identity

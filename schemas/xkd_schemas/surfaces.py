"""A tokenizer's offsets from its ids alone, wherever the tokens spell out the text.

The tokenizers library follows every character through its normaliser and hands out a Python tuple for each token:
half as much again as the ids cost. But where the tokens of a text, written one after the other, are the text itself,
their lengths are their offsets. So ids are asked for alone, their spellings are compared with the text character by
character, and only texts that differ anywhere (normalised ones, pieces of a character, unknown and added tokens) are
encoded a second time with the library's own offsets. How a tokenizer writes blanks, whether it trims them, and that
it then gives just these offsets, is tried on PROBES; a tokenizer that does it otherwise is asked for its offsets.

Shape legend for this file
    N texts    C tokens of all texts    L characters of all texts    V vocabulary
"""

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from xkd_schemas.flat import firsts
from xkd_schemas.tokenizers import (
    PROBES,
    Encoded,
    FastTokenizer,
    encode_texts,
    encoded_by,
    native_backend,
    plain_backend,
)
from xkd_schemas.tokens import Bools, Int32s

LEAST_PROBES: Final = 20
"""PROBES that must be spelled out by their tokens for a tokenizer to be believed."""
MOST_MISSED: Final = 0.25
"""Share of tokens in texts that were encoded twice above which offsets are asked for from then on."""
UNSEEN: Final = -2
UNSPELLED: Final = -1

Spelling = Callable[[str], str | None]
Int64s = npt.NDArray[np.int64]


class Surfaces:
    """How one tokenizer's tokens are spelled; results do not depend on what it has seen.

    Args:
        tokenizer: A fast one; it must not be changed afterwards.
    """

    def __init__(self, tokenizer: FastTokenizer) -> None:
        self._tokenizer = tokenizer
        self._added = {int(i): _written_as(token) for i, token in tokenizer.added_tokens_decoder.items()}
        self._missed = self._tokens = 0
        real = encode_texts(tokenizer, PROBES)
        fits = (rule for rule in RULES if self._fits(rule, real))
        self._rule = next(fits, None)

    def encode(self, texts: Sequence[str], *, native: bool = False) -> Encoded:
        """`encode_texts`, to the last offset; with `native` special tokens in a text are what they are."""
        backend = native_backend(self._tokenizer) if native else plain_backend(self._tokenizer)
        if self._rule is None or self._missed > MOST_MISSED * self._tokens:
            return encoded_by(backend, texts)
        encodings = backend.encode_batch_fast(list(texts), add_special_tokens=False)
        ids = [encoding.ids for encoding in encodings]
        first = firsts([len(found) for found in ids])
        ids_C = np.fromiter(itertools.chain.from_iterable(ids), np.int32, count=int(first[-1]))
        offsets_C2, spelled_N = self._spelled(texts, ids_C, first, self._rule)
        missed = np.flatnonzero(~spelled_N).tolist()
        again = encoded_by(backend, [texts[n] for n in missed])
        size_N = np.diff(first)
        self._missed, self._tokens = self._missed + len(again.ids), self._tokens + len(ids_C)
        if not np.array_equal(np.diff(again.first), size_N[missed]):  # a tokenizer with dropout
            return encoded_by(backend, texts)
        at_C = np.repeat(~spelled_N, size_N)
        ids_C[at_C], offsets_C2[at_C] = again.ids, again.offsets
        return Encoded(ids_C, offsets_C2, first)

    def _fits(self, rule: "Rule", real: Encoded) -> bool:
        """Does the rule give the tokenizer's own offsets wherever it spells out the probes, and are these many?"""
        size = max(self._tokenizer.get_vocab().values(), default=0) + 1
        self._length_V = np.full(size, UNSEEN, np.int32)
        self._begin_V, self._trimmed_V2 = np.zeros(size, np.int64), np.zeros((size, 2), np.int32)
        self._codes = np.zeros(0, np.uint32)
        offsets_C2, spelled_N = self._spelled(PROBES, real.ids, real.first, rule)
        own_C = np.repeat(spelled_N, np.diff(real.first))
        return int(spelled_N.sum()) >= LEAST_PROBES and np.array_equal(offsets_C2[own_C], real.offsets[own_C])

    def _spelled(self, texts: Sequence[str], ids_C: Int32s, first: Int64s, rule: "Rule") -> tuple[Int32s, Bools]:
        """Offsets [C, 2] by the lengths of tokens, and which texts their tokens spell out [N]: no others are right."""
        unseen = ids_C[self._length_V[ids_C] == UNSEEN]
        if len(unseen):
            self._learn(np.unique(unseen), rule)
        length_C = self._length_V[ids_C]
        size_N, chars_N = np.diff(first), np.fromiter(map(len, texts), np.int64, count=len(texts))
        behind = firsts(np.maximum(length_C, 0))
        spelled_chars_N = np.diff(behind[first])
        unspelled_N = np.diff(firsts(length_C == UNSPELLED)[first]) > 0
        blank_N = spelled_chars_N == chars_N + 1  # the blank that many tokenizers put before a text
        first_C = first[:-1][blank_N & (size_N > 0)]
        lone_N = np.zeros(len(texts), np.bool_)
        lone_N[blank_N & (size_N > 0)] = length_C[first_C] <= 1
        fine_N = ~unspelled_N & ~lone_N & (blank_N | (spelled_chars_N == chars_N))
        fine_C = np.repeat(fine_N, size_N)
        line = "".join([" " + t if blank else t for t, blank, fine in
                        zip(texts, blank_N.tolist(), fine_N.tolist(), strict=True) if fine])  # fmt: skip
        line_L = np.frombuffer(line.encode("utf-32-le"), np.uint32)
        written_L = self._written(ids_C[fine_C], length_C[fine_C])
        wrong = np.flatnonzero(line_L != written_L)
        ends = np.cumsum(spelled_chars_N[fine_N])
        fine_N[np.flatnonzero(fine_N)[np.unique(np.searchsorted(ends, wrong, side="right"))]] = False
        shift_C = np.repeat(behind[first[:-1]] + blank_N, size_N)
        offsets_C2 = np.stack([behind[:-1] - shift_C, behind[1:] - shift_C], axis=1).astype(np.int32)
        np.maximum(offsets_C2, 0, out=offsets_C2)
        if rule.trims:
            _trim(offsets_C2, self._trimmed_V2[ids_C], keeps_first=rule.keeps_first)
        return offsets_C2, fine_N

    def _written(self, ids_C: Int32s, length_C: Int32s) -> npt.NDArray[np.uint32]:
        """The tokens' spellings one after the other."""
        behind = firsts(length_C)
        at_L = np.repeat(self._begin_V[ids_C] - behind[:-1], length_C)
        at_L += np.arange(len(at_L))
        return self._codes[at_L]

    def _learn(self, ids: Int32s, rule: "Rule") -> None:
        """Look up how tokens are spelled that were not seen before."""
        parts, end = [self._codes], len(self._codes)
        for number in ids.tolist():
            token = self._tokenizer.backend_tokenizer.id_to_token(number)
            text = None if token is None else self._added[number] if number in self._added else rule.spelling(token)
            self._length_V[number] = UNSPELLED if text is None else len(text)
            if text is not None:
                self._begin_V[number] = end
                parts.append(np.frombuffer(text.encode("utf-32-le"), np.uint32))
                end += len(text)
                self._trimmed_V2[number] = _blanks_at_ends(token)
        self._codes = np.concatenate(parts)


def _written_as(token: Any) -> str | None:
    """What an added token stands for in a text; None where blanks round it or other spellings may belong to it."""
    changes = token.lstrip or token.rstrip or token.normalized
    return None if changes or not token.content else str(token.content)


def _blanks_at_ends(token: str) -> tuple[int, int]:
    """How many characters a byte-level tokenizer that trims takes off the token's front and end."""
    blanks = [c == BLANK_BYTE or c.isspace() for c in token]
    leading = sum(1 for _ in itertools.takewhile(bool, blanks))
    return leading, sum(1 for _ in itertools.takewhile(bool, reversed(blanks)))


def _trim(offsets_C2: Int32s, blanks_C2: Int32s, *, keeps_first: bool) -> None:
    """Take leading, then trailing blanks out of the offsets, in place; a single one in front of a text may stay."""
    start_C, end_C = offsets_C2[:, 0], offsets_C2[:, 1]
    if keeps_first:
        blanks_C2[(start_C == 0) & (blanks_C2[:, 0] == 1), 0] = 0
    np.minimum(start_C + blanks_C2[:, 0], end_C, out=start_C)
    np.maximum(end_C - blanks_C2[:, 1], start_C, out=end_C)


def _byte_characters() -> Mapping[str, int]:
    """Byte-level BPE writes each byte as one printable character: itself where it is one, else one from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


BYTE_OF: Final = _byte_characters()
BLANK_BYTE: Final = next(c for c, byte in BYTE_OF.items() if byte == 0x20)
_ASCII_BYTE: Final = re.compile("<0x([0-7][0-9A-F])>")


def byte_level(token: str) -> str | None:
    """What a token of a byte-level tokenizer spells; None for part of a character.

    >>> byte_level("\\u0120lamp"), byte_level("\\u00c3"), byte_level("\\u00c3\\u00a9") == "\\u00e9"
    (' lamp', None, True)
    """
    try:
        return bytes(BYTE_OF[c] for c in token).decode()
    except (KeyError, UnicodeDecodeError):
        return None


def metaspace(token: str) -> str | None:
    """What a token of a SentencePiece tokenizer spells; None for a byte that is no character.

    >>> metaspace("\\u2581lamp"), metaspace("<0x0A>"), metaspace("<0xE2>")
    (' lamp', '\\n', None)
    """
    byte = _ASCII_BYTE.fullmatch(token)
    if byte:
        return chr(int(byte.group(1), 16))
    return None if token.startswith("<0x") else token.replace("\u2581", " ")


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """How tokens are spelled, and what their offsets leave out."""

    spelling: Spelling
    trims: bool = False
    """Offsets leave out the blanks at both ends of a token,"""
    keeps_first: bool = False
    """but a single one at the front of a text stays: it might have been put there."""


RULES: Final[Sequence[Rule]] = (
    Rule(spelling=byte_level),
    Rule(spelling=byte_level, trims=True),
    Rule(spelling=byte_level, trims=True, keeps_first=True),
    Rule(spelling=metaspace),
)
"""Tried in this order; the first that agrees with a tokenizer on the probes is taken."""

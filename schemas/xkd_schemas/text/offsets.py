"""Where a model's tokens stand in the text: from a tokenizer's offsets to checked character intervals, and to a cut.

A tokenizer's offsets need care: blanks are glued to the front of tokens, pieces of one character repeat its offsets,
a normaliser may drop characters, trim a token to nothing or go back. Everything here is arrays in, arrays out, for
many documents at once: they are laid end to end on one line of characters, a blank between two.

Shape legend for this file
    R documents    G encoded segments    C content tokens    T tokens of a row    L characters of the line
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from xkd_schemas.ragged import row_offsets
from xkd_schemas.tokens import CONTENT, OK, Bools, Int32s, Tokens

BORDER_REACH: Final = 200
"""How many characters a cut goes back to find the end of a word; then it is made behind the last whole token."""

Int64s = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedText:
    """What of a block of documents a tokenizer was given, and the offsets it gave back."""

    texts: Sequence[str]
    """[R], each up to the character where it was cut."""
    document_G: Int64s
    """Which document each encoded segment is of; ascending."""
    segments_G2: Int32s
    """Its characters in its document, up to the cut."""
    offsets_C2: Int32s
    """Characters of the token's own segment."""
    first: Int64s
    """[G + 1]; segment g has the tokens first[g] to first[g + 1]."""


def content_intervals(read: EncodedText) -> tuple[Int32s, list[str]]:
    """Intervals [C, 2] int32 in the characters of each token's document; "ok" or what is wrong with each document [R].

    Good intervals stay in their segment and in front of the cut, their starts and ends never decrease, and every
    character that is not blank lies in one. Blanks in front of a token are left out; a token of blanks keeps them.
    """
    base_R = row_offsets([len(text) + 1 for text in read.texts]).astype(np.int32)  # where documents begin on the line
    count_G = np.diff(read.first)
    low_G2 = read.segments_G2 + base_R[read.document_G][:, None]
    low_C, high_C = np.repeat(low_G2[:, 0], count_G), np.repeat(low_G2[:, 1], count_G)  # each token's segment
    start_C, end_C = read.offsets_C2[:, 0] + low_C, read.offsets_C2[:, 1] + low_C  # the library's offsets on the line
    document_C = np.repeat(read.document_G, count_G)
    outside_R = _mask_of(document_C[(start_C < low_C) | (end_C > high_C) | (end_C < start_C)], len(read.texts))
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
    backward_R = _mask_of(document_C[1:][backward_C], len(read.texts))
    first_R = read.first[np.searchsorted(read.document_G, np.arange(len(read.texts) + 1))]  # tokens of each document
    holes_R = _holes(spans_C2, first_R, base_R, solid_before)
    statuses = [
        "outside_text" if outside else "offsets_not_monotone" if backward else "uncovered_characters" if hole else OK
        for outside, backward, hole in zip(outside_R.tolist(), backward_R.tolist(), holes_R.tolist(), strict=True)
    ]
    spans_C2 -= np.repeat(base_R[:-1], np.diff(first_R))[:, None]  # in characters of each document
    return spans_C2, statuses


def _mask_of(numbers: Int64s, size: int) -> Bools:
    """Which of `size` documents are named."""
    named = np.zeros(size, np.bool_)
    named[numbers] = True
    return named


def _holes(spans_C2: Int32s, first_R: Int64s, base_R: Int32s, solid_before: Int32s) -> Bools:
    """In which documents a character that is no blank lies between two tokens, before the first or behind the last."""
    size = len(base_R) - 1
    has_R = np.diff(first_R) > 0
    from_C = np.append(np.int32(0), spans_C2[:, 1])[: len(spans_C2)]  # the end of the token before
    from_C[first_R[:-1][has_R]] = base_R[:-1][has_R]  # of a document's first token, the document's begin
    skipped_C = solid_before[spans_C2[:, 0]] > solid_before[from_C]
    last_R = base_R[:-1].copy()  # the end of each document's last token
    last_R[has_R] = spans_C2[first_R[1:][has_R] - 1, 1]
    tail_R = solid_before[base_R[1:] - 1] > solid_before[last_R]
    numbers = np.searchsorted(first_R, np.flatnonzero(skipped_C), side="right") - 1
    return _mask_of(numbers, size) | tail_R


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


_LAST_BLANK: Final = 0x3000
_IS_BLANK: Final = np.array([chr(code).isspace() for code in range(_LAST_BLANK + 1)] + [False])


def blanks(text: str) -> npt.NDArray[np.bool_]:
    """True for every character [L] that is white space to Python's str.isspace.

    >>> blanks("a b").tolist()
    [False, True, False]
    """
    if text.isascii():
        return _IS_BLANK[np.frombuffer(text.encode(), dtype=np.uint8)]
    codes_L = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    return _IS_BLANK[np.minimum(codes_L, _LAST_BLANK + 1)]


def cut_point(text: str, tokens: Tokens, max_tokens: int) -> int:
    """Where to cut a text whose row is too long: a character before `tokens.num_chars`, 0 if nothing fits.

    Behind the last word of which all tokens are among the first `max_tokens`; where no word ends within
    BORDER_REACH characters before the last whole token's end (Chinese, a long number), right there.
    """
    spans_C2 = tokens.spans[tokens.kinds == CONTENT]
    fitting = int((tokens.kinds[:max_tokens] == CONTENT).sum())
    end_C = spans_C2[:, 1]
    later_C = np.append(spans_C2[1:, 0], tokens.num_chars)
    whole = np.flatnonzero((end_C <= later_C)[:fitting] & (end_C[:fitting] < tokens.num_chars))
    if not len(whole):
        return 0
    last = int(end_C[whole[-1]])
    for at in range(last, max(last - BORDER_REACH, 0), -1):
        if text[at].isspace() and not text[at - 1].isspace():
            return at
    return last

"""Where a model's tokens stand in the text: from a tokenizer's offsets to checked character intervals, and to a cut.

A tokenizer's offsets need care: blanks are glued to the front of tokens, pieces of one character repeat its offsets,
a normaliser may drop characters, trim a token to nothing or go back. Everything here is arrays in, arrays out.

Shape legend for this file
    C content tokens    T tokens of the row    L characters of the text
"""

from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from xkd_schemas.documents import Document
from xkd_schemas.tokens import CONTENT, OK, Int32s, Tokens

BORDER_REACH: Final = 200
"""How many characters a cut goes back to find the end of a word; then it is made behind the last whole token."""

Encoding = tuple[Int32s, Int32s]
"""Ids [C] and offsets [C, 2] in characters of one segment, both int32."""


def content_intervals(document: Document, num_chars: int, encodings: Sequence[Encoding]) -> tuple[Int32s, str]:
    """Intervals [C, 2] int32 of the content tokens in the document's characters, and "ok" or what is wrong with them.

    Good intervals stay in their segment and in front of `num_chars`, their starts and ends never decrease, and every
    character that is not blank lies in one. Blanks in front of a token are left out; a token of blanks keeps them.

    Args:
        document: Its first segments are what was encoded.
        num_chars: The text was read up to here.
        encodings: One for each segment that begins before `num_chars`.
    """
    counts = [len(ids) for ids, _ in encodings]
    read = document.segments[: len(encodings)]
    low_C = np.repeat(np.array([segment.start for segment in read], np.int32), counts)
    high_C = np.repeat(np.array([min(segment.end, num_chars) for segment in read], np.int32), counts)
    spans_C2 = np.concatenate([np.zeros((0, 2), np.int32), *(offsets for _, offsets in encodings)]) + low_C[:, None]
    start_C, end_C = spans_C2[:, 0], spans_C2[:, 1]
    if ((start_C < low_C) | (end_C > high_C) | (end_C < start_C)).any():
        return np.clip(spans_C2, low_C[:, None], high_C[:, None]), "outside_text"
    solid_L = ~blanks(document.text[:num_chars])
    solid_before = np.concatenate([[0], np.cumsum(solid_L)])  # [L + 1]
    first_solid_C = np.append(np.flatnonzero(solid_L), num_chars)[solid_before[start_C]]
    spans_C2[:, 0] = np.where(first_solid_C < end_C, first_solid_C, start_C)
    if (start_C == end_C).any():
        _widen(spans_C2, low_C, high_C, solid_before)
    if (np.diff(spans_C2, axis=0) < 0).any():
        return spans_C2, "offsets_not_monotone"
    skipped = solid_before[np.append(start_C, num_chars)] - solid_before[np.append(0, end_C)]
    return spans_C2, "uncovered_characters" if (skipped > 0).any() else OK


def _widen(spans_C2: Int32s, low_C: Int32s, high_C: Int32s, solid_before: Int32s) -> None:
    """Give tokens with an empty interval characters, in place, where there are some they can stand for.

    Some byte-level tokenizers trim a token of blanks to nothing: it gets the blanks between it and the token before.
    One that stands for nothing (a lone "▁") stays empty in front of what follows, and at its segment's end shares
    the interval of the token before, so that an empty interval never stands on the wrong side of a segment border.
    """
    for n in np.flatnonzero(spans_C2[:, 0] == spans_C2[:, 1]):
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

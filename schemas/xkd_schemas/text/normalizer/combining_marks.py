"""Where a normaliser may swap or drop marks, so that offsets that cover a text stand at the wrong ones.

Canonical order sorts the marks behind a letter by their class (Unicode Standard, section 3.11, D108 to D109); the
offsets of the tokenizers library stay in the old order. A mark that merges with the last letter of what was a ligature
takes that letter's place in its offsets. And its SentencePiece normaliser looks up a letter with its marks as one
string, takes the longest beginning that it knows for all of it, and is one off after a control that it deletes.

Shape legend for this file
    N texts    L characters of all texts
"""

import functools
import unicodedata
from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from xkd_schemas.ragged import row_offsets
from xkd_schemas.tokens import Bools

LETTERS: Final = frozenset("\u0e33\u0eb3\U0001f3fb\U0001f3fc\U0001f3fd\U0001f3fe\U0001f3ff")
"""Vowels and skin tones that are one sign with what is before them, but no marks by their category."""
LINE_BLANKS: Final = "\t\n\f\r"
"""Controls that every normaliser takes for blanks."""
LAST_CODE: Final = 0x1FFFF
"""Characters behind it are no marks and end in none."""


class Classes(NamedTuple):
    """What is looked up for each character up to LAST_CODE."""

    first: npt.NDArray[np.uint8]
    """Combining class of the first character of its compatibility decomposition; 0 for what is no mark."""
    last: npt.NDArray[np.uint8]
    """Of the last character."""
    follows: Bools
    """It may join the character before it or vanish behind it."""
    changes: Bools
    """NFKC or folding its case changes it."""
    controls: Bools
    """It is a control and no blank of a line."""


@functools.cache
def classes() -> Classes:
    """The tables, made once in a process."""
    size = LAST_CODE + 1
    first, last = np.zeros(size, np.uint8), np.zeros(size, np.uint8)
    follows, changes, controls = np.zeros((3, size), np.bool_)
    found = Classes(first, last, follows, changes, controls)
    for code in range(size):
        char = chr(code)
        parts = unicodedata.normalize("NFKD", char) if unicodedata.decomposition(char) else char
        found.first[code], found.last[code] = unicodedata.combining(parts[0]), unicodedata.combining(parts[-1])
        category = unicodedata.category(char)
        joins = category[0] in "MC" or found.first[code] > 0 or char in LETTERS
        found.follows[code] = joins and char not in LINE_BLANKS
        found.controls[code] = category == "Cc" and char not in LINE_BLANKS
        found.changes[code] = char.casefold() != char or unicodedata.normalize("NFKC", char) != char
    return found


def doubtful(texts: Sequence[str], *, deep: bool, maps: bool = False) -> Bools:
    """In which texts [N] marks stand that a normaliser may swap, or merge unseen with a part of what is before them.

    Args:
        texts: Valid Unicode.
        deep: The normaliser takes apart what is only compatible, such as a ligature.
        maps: It looks strings up in a map; then it is `deep` as well.

    >>> [doubtful(["e\\u0301", "q\\u0301\\u0323", "\\ufb01\\u0300"], deep=deep).tolist() for deep in (False, True)]
    [[False, True, False], [False, True, True]]
    """
    found = np.zeros(len(texts), np.bool_)
    numbers = [n for n, text in enumerate(texts) if maps or not text.isascii()]
    if not numbers:
        return found
    codes_L = np.frombuffer("\n".join([texts[n] for n in numbers]).encode("utf-32-le"), np.uint32)
    known = classes()
    at = np.flatnonzero((known.follows if deep else known.first).take(codes_L, mode="clip"))
    code, before = (np.minimum(codes_L[places], LAST_CODE) for places in (at, np.maximum(at - 1, 0)))
    bad = (known.first[code] > 0) & (known.last[before] > known.first[code])
    if deep:
        bad |= known.changes[before]
    if maps:
        bad |= known.controls[code]
    ends = row_offsets([len(texts[n]) + 1 for n in numbers])[1:]
    found[np.array(numbers)[np.searchsorted(ends, at[bad], side="right")]] = True
    return found

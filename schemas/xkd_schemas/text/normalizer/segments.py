"""The smallest parts of a text that a normaliser treats on their own.

Two characters are apart where their normalised forms, one after the other, are the form of both together. Where the
forms of such parts do not add up to the form of the text, more characters on both sides are looked at. Nothing is
assumed about the normaliser or the version of Unicode it knows.

Shape legend for this file
    P parts of a text
"""

import itertools
import re
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from xkd_schemas.ragged import row_offsets
from xkd_schemas.tokens import Bools

REACHES: Final = (1, 2, 4, 8, 16)
"""Characters to the left and right of a cut that must be normalised alike together and apart: more where fewer do not
give the normalised text."""
LONGEST_PART: Final = 64
"""Characters; text that is only normalised in longer stretches is not explained."""
MOST_KNOWN: Final = 100_000
"""Short strings whose normalised form is remembered."""
WORDS: Final = re.compile(r"\s+|\S+")

Int64s = npt.NDArray[np.int64]
Normalise = Callable[[str], str]


class Cut(NamedTuple):
    """The parts of a text, and what became of them."""

    first_P: Int64s
    """[P + 1] where each part begins in the text, and the end of the last."""
    normal_P: Int64s
    """[P + 1] the same in the normalised text."""
    blank_P: Bools
    """[P] nothing of it is left, or only blanks."""


class Parts:
    """Cuts texts into the smallest parts that a normaliser treats on their own."""

    def __init__(self, normalise: Normalise) -> None:
        self.normalise = normalise
        self._form = Memo(normalise)
        self._apart = Memo(self._is_apart)
        self._word = Memo(lambda word: self._cut(word, self._form[word]))

    def of(self, text: str, normal: str) -> Cut | None:
        """The parts of a text and its normalised form; None if it is not explained.

        Words are cut once; only where a text is more than its words one after the other it is cut as a whole.

        >>> import unicodedata
        >>> parts = Parts(lambda text: unicodedata.normalize("NFKC", text))
        >>> [part.tolist() for part in parts.of("e\\u0301 \\ufb01", "\\u00e9 fi")]
        [[0, 2, 3, 4], [0, 1, 2, 4], [False, True, False]]
        """
        words = WORDS.findall(text)
        if max(map(len, words), default=0) <= LONGEST_PART and "".join(map(self._form.__getitem__, words)) == normal:
            pieces = list(map(self._word.__getitem__, words))
        else:
            pieces = [self._cut(text, normal)]
        if not pieces or None in pieces:
            return None
        sizes, forms, blank = (list(itertools.chain.from_iterable(part)) for part in zip(*pieces, strict=True))
        return Cut(row_offsets(sizes), row_offsets(forms), np.array(blank, np.bool_))

    def _cut(self, text: str, normal: str) -> tuple[list[int], list[int], list[bool]] | None:
        """Of each part the length, the length of its form, and whether nothing or only blanks are left of it."""
        cuts: Sequence[int] = range(1, len(text))
        for reach in REACHES:
            sides = ((text[max(0, at - reach) : at], text[at : at + reach]) for at in cuts)
            cuts = list(itertools.compress(cuts, map(self._apart.__getitem__, sides)))
            pieces = [text[start:end] for start, end in itertools.pairwise([0, *cuts, len(text)])]
            if max(len(piece.strip()) for piece in pieces) > LONGEST_PART:
                return None
            forms = [self._form[piece] for piece in pieces]
            if "".join(forms) == normal:
                blank = [not form.replace("▁", " ").strip() for form in forms]
                return [len(piece) for piece in pieces], [len(form) for form in forms], blank
        return None

    def _is_apart(self, sides: tuple[str, str]) -> bool:
        left, right = sides
        return bool(self._form[left + right] == self._form[left] + self._form[right])


class Memo(dict[Any, Any]):
    """What a function gave for short strings; forgotten when it is too much."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self._function = function

    def __missing__(self, key: Any) -> Any:
        if len(self) >= MOST_KNOWN:
            self.clear()
        value = self[key] = self._function(key)
        return value

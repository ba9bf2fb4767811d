"""Offsets in a text whose normaliser merged, swapped or deleted characters, which the tokenizers library loses.

The library gives the token for "e" + U+0301 the interval of the "e" alone, and a deleted character to nobody: both
leave a hole. So the text is cut into the smallest parts whose normalised forms, written one after the other, are the
normalised text. The tokenizer then reads the normalised text, must give the ids it gave before, and a token has the
characters of all parts that it touches there. A part that vanishes joins a neighbour. A text for which this does not
work out is not explained.

Shape legend for this file
    N texts    C tokens    P parts of a text    L characters of a text
"""

import functools
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from xkd_schemas.flat import firsts
from xkd_schemas.intervals import blanks
from xkd_schemas.marks import doubtful
from xkd_schemas.tokenizers import Encoded, FastTokenizer, encoded_by, plain, plain_backend
from xkd_schemas.tokens import Bools, Int32s

REACHES: Final = (1, 2, 4, 8, 16)
"""Characters to the left and right of a cut that must be normalised alike together and apart: more where fewer do not
give the normalised text."""
LONGEST_PART: Final = 64
"""Characters; text that is only normalised in longer stretches is not explained."""
MOST_KNOWN: Final = 100_000
"""Short strings whose normalised form is remembered."""
ENDS: Final = frozenset({"Strip", "Prepend"})
"""Normalisers that do to the ends of a text what they do not inside: they merge nothing and stay in the tokenizer."""
DEEP: Final = frozenset({"NFKC", "NFKD", "Precompiled"})
"""Normalisers that take more apart than canonical forms do."""
BARE: Final[Mapping[str, Any]] = {
    "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "pre_tokenizer": None,
    "post_processor": None, "decoder": None, "model": {"type": "WordLevel", "vocab": {"?": 0}, "unk_token": "?"},
}  # fmt: skip
"""A tokenizer that does nothing, as JSON."""

Int64s = npt.NDArray[np.int64]
Normalise = Callable[[str], str]


class Normalised:
    """Offsets through one tokenizer's normaliser; results do not depend on what it has seen.

    Args:
        tokenizer: A fast one; it must not be changed afterwards.
    """

    def __init__(self, tokenizer: FastTokenizer) -> None:
        self._backend = plain_backend(tokenizer)
        steps = _steps(self._backend.normalizer)
        self._inside = [step for step in steps if step["type"] not in ENDS]
        self._ends = [step for step in steps if step["type"] in ENDS]

    @property
    def changes(self) -> bool:
        """Might the tokenizer change anything inside a text?"""
        return bool(self._inside)

    def doubtful(self, texts: Sequence[str]) -> Bools:
        """In which texts [N] the library's offsets may be wrong although they leave no hole."""
        return doubtful(texts, deep=any(step["type"] in DEEP for step in self._inside))

    def offsets(self, texts: Sequence[str], encoded: Encoded) -> Int32s:
        """The offsets [C, 2] of all texts in characters of each; of a text that is not explained those it had.

        Args:
            texts: Valid Unicode.
            encoded: Their ids and offsets as the tokenizer gave them.
        """
        normal = [self._parts.normalise(text) for text in texts]
        again = encoded_by(self._rest, normal)
        found = encoded.offsets.copy()
        own, other = (itertools.pairwise(e.first.tolist()) for e in (encoded, again))
        for text, form, mine, theirs in zip(texts, normal, own, other, strict=True):
            same = np.array_equal(encoded.ids[slice(*mine)], again.ids[slice(*theirs)])
            parts = self._parts.of(text, form) if same else None
            if parts is not None:
                found[slice(*mine)] = in_text(text, parts, again.offsets[slice(*theirs)])
        return found

    @functools.cached_property
    def _parts(self) -> "Parts":
        return Parts(_normaliser(type(self._backend), self._inside).normalize_str)

    @functools.cached_property
    def _rest(self) -> Any:
        """The tokenizer without what is done inside a text."""
        kind = type(self._backend)
        rest = kind.from_str(self._backend.to_str())
        rest.normalizer = _normaliser(kind, self._ends) if self._ends else None
        return plain(rest)


def _steps(normaliser: Any) -> list[Mapping[str, Any]]:
    """The steps of the library's normaliser in order; none of one that is written in Python."""
    if normaliser is None:
        return []
    try:
        described = json.loads(normaliser.__getstate__())
    except Exception:  # the library's bare one: it cannot be written down
        return []
    return _listed(described)


def _listed(described: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    if described["type"] == "Sequence":
        return [step for part in described["normalizers"] for step in _listed(part)]
    return [described]


def _normaliser(kind: Any, steps: Sequence[Mapping[str, Any]]) -> Any:
    """The library's normaliser of these steps."""
    described = {**BARE, "normalizer": {"type": "Sequence", "normalizers": steps}}
    return kind.from_str(json.dumps(described)).normalizer


def in_text(text: str, parts: "Cut", offsets_C2: Int32s) -> Int32s:
    """Offsets in the normalised text as offsets in the text, [C, 2] int32: those of all parts that a token touches.

    Args:
        text: Before it is normalised.
        parts: Of the text.
        offsets_C2: Of tokens, in the normalised text.

    Example: "e" + U+0301, U+200B, "ﬁ" that became "é", nothing, "fi"

        >>> parts = Cut(np.array([0, 2, 3, 4]), np.array([0, 1, 1, 3]), np.array([False, True, False]))
        >>> in_text("e\u0301\u200b\ufb01", parts, np.array([[0, 1], [1, 2], [2, 3]])).tolist()
        [[0, 3], [3, 4], [3, 4]]
    """
    kept = np.flatnonzero(np.diff(parts.normal_P))
    if not len(kept) or not len(offsets_C2):
        return np.zeros_like(offsets_C2)
    ends = parts.first_P[kept + 1]
    starts = np.append(parts.first_P[kept], ends[-1])
    normal = np.append(parts.normal_P[kept], parts.normal_P[-1])
    from_C = np.searchsorted(normal, offsets_C2[:, 0], side="right") - 1
    to_C = np.searchsorted(normal, offsets_C2[:, 1], side="left") - 1
    found_C2 = np.stack([starts[from_C], np.maximum(ends[to_C], starts[from_C])], axis=1)
    if parts.blank_P.any():
        _join(found_C2, text, np.repeat(parts.blank_P, np.diff(parts.first_P)))
    return found_C2.astype(np.int32)


def _join(found_C2: Int64s, text: str, gone_L: Bools) -> None:
    """Give characters that vanished, where no token has them, to the token that they touch, in place.

    That is the one before them, or behind a blank the one after them. Between blanks they go to the last token before
    them, or to the first.
    """
    steps = np.zeros(len(text) + 1, np.int64)
    np.add.at(steps, found_C2[:, 0], 1)
    np.add.at(steps, found_C2[:, 1], -1)
    blank_L = blanks(text)
    lost_L = gone_L & ~blank_L & (np.cumsum(steps[:-1]) == 0)
    borders = np.flatnonzero(np.diff(lost_L, prepend=False, append=False))
    for start, end in borders.reshape(-1, 2).tolist():
        behind = int(np.searchsorted(found_C2[:, 1], start, side="right"))
        if behind < len(found_C2) and found_C2[behind, 0] <= start:  # it took what came before this as well
            continue
        follows = start > 0 and not blank_L[start - 1]
        touches = end < len(text) and not blank_L[end]
        if behind and (follows or not touches or behind == len(found_C2)):
            found_C2[found_C2[:, 1] == found_C2[behind - 1, 1], 1] = end
        else:
            found_C2[found_C2[:, 0] == found_C2[behind, 0], 0] = start


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
        self._form = Known(normalise)
        self._apart = Known(self._is_apart)

    def of(self, text: str, normal: str) -> Cut | None:
        """The parts of a text and its normalised form; None if it is not explained.

        >>> import unicodedata
        >>> parts = Parts(lambda text: unicodedata.normalize("NFKC", text))
        >>> [part.tolist() for part in parts.of("e\\u0301 \\ufb01", "\\u00e9 fi")]
        [[0, 2, 3, 4], [0, 1, 2, 4], [False, True, False]]
        """
        cuts: Sequence[int] = range(1, len(text))
        for reach in REACHES:
            sides = ((text[max(0, at - reach) : at], text[at : at + reach]) for at in cuts)
            cuts = list(itertools.compress(cuts, map(self._apart.__getitem__, sides)))
            pieces = [text[start:end] for start, end in itertools.pairwise([0, *cuts, len(text)])]
            if max(len(piece.strip()) for piece in pieces) > LONGEST_PART:
                return None
            forms = [self._form[piece] for piece in pieces]
            if "".join(forms) == normal:
                blank_P = np.array([not form or form.isspace() for form in forms], np.bool_)
                return Cut(firsts([len(piece) for piece in pieces]), firsts([len(form) for form in forms]), blank_P)
        return None

    def _is_apart(self, sides: tuple[str, str]) -> bool:
        left, right = sides
        return bool(self._form[left + right] == self._form[left] + self._form[right])


class Known(dict[Any, Any]):
    """What a function gave for short strings; forgotten when it is too much."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self._function = function

    def __missing__(self, key: Any) -> Any:
        if len(self) >= MOST_KNOWN:
            self.clear()
        value = self[key] = self._function(key)
        return value

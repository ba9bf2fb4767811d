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
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from xkd_schemas.text.normalizer.combining_marks import doubtful
from xkd_schemas.text.normalizer.segments import Cut, Parts
from xkd_schemas.text.offsets import blanks
from xkd_schemas.text.tokenizers import Encoded, FastTokenizer, encoded_by, plain, plain_backend
from xkd_schemas.tokens import Bools, Int32s

ENDS: Final = frozenset({"Strip", "Prepend"})
"""Normalisers that do to the ends of a text what they do not inside; they merge nothing."""
BLANKS: Final = " \t\n\r▁"
"""What is taken from the ends."""
DEEP: Final = frozenset({"NFKC", "NFKD", "Precompiled"})
"""Normalisers that take more apart than canonical forms do."""
BARE: Final[Mapping[str, Any]] = {
    "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "pre_tokenizer": None,
    "post_processor": None, "decoder": None, "model": {"type": "WordLevel", "vocab": {"?": 0}, "unk_token": "?"},
}  # fmt: skip
"""A tokenizer that does nothing, as JSON."""

Int64s = npt.NDArray[np.int64]


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
        types = {step["type"] for step in self._inside}
        return doubtful(texts, deep=bool(types & DEEP), maps="Precompiled" in types)

    def offsets(self, texts: Sequence[str], encoded: Encoded) -> Int32s:
        """The offsets [C, 2] of all texts in characters of each; of a text that is not explained those it had.

        Args:
            texts: Valid Unicode.
            encoded: Their ids and offsets as the tokenizer gave them.
        """
        read = [self._backend.normalizer.normalize_str(text) for text in texts]
        again = encoded_by(self._rest, read)
        found = encoded.offsets.copy()
        own, other = (itertools.pairwise(e.first.tolist()) for e in (encoded, again))
        for text, form, mine, theirs in zip(texts, read, own, other, strict=True):
            if np.array_equal(encoded.ids[slice(*mine)], again.ids[slice(*theirs)]):
                offsets_C2 = self._through(text, form, again.offsets[slice(*theirs)])
                found[slice(*mine)] = encoded.offsets[slice(*mine)] if offsets_C2 is None else offsets_C2
        return found

    def _through(self, text: str, form: str, offsets_C2: Int32s) -> Int32s | None:
        """Offsets in the normalised text as offsets in the text; None if it is not explained."""
        normal = self._parts.normalise(text) if self._ends else form
        place = placed(form, normal, "".join(step.get("prepend", "") for step in self._ends))
        parts = None if place is None else self._parts.of(text, normal)
        if place is None or parts is None:
            return None
        start_C, end_C = offsets_C2.T
        inside_C2 = np.stack([np.maximum(start_C + place, 0), np.maximum(end_C + place, np.minimum(end_C, 1))], axis=1)
        return in_text(text, parts, inside_C2)

    @functools.cached_property
    def _parts(self) -> Parts:
        return Parts(_normaliser(type(self._backend), self._inside).normalize_str)

    @functools.cached_property
    def _rest(self) -> Any:
        """The tokenizer without a normaliser."""
        rest = type(self._backend).from_str(self._backend.to_str())
        rest.normalizer = None
        return plain(rest)


def placed(form: str, normal: str, prefix: str) -> int | None:
    """How far a form lies behind a normalised text of which blanks at the ends were taken and a prefix was given.

    >>> placed("▁the lamp", " the lamp  ", "▁"), placed("the", " the", ""), placed("the", "then", "")
    (0, 1, None)
    """
    given = len(prefix) if prefix and form.startswith(prefix) else 0
    for taken in (0, len(normal) - len(normal.lstrip(BLANKS))):
        end = taken + len(form) - given
        if normal[taken:end] == form[given:] and not normal[end:].strip(BLANKS):
            return taken - given
    return None


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


def in_text(text: str, parts: Cut, offsets_C2: Int32s) -> Int32s:
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
    start_C, end_C = starts[from_C], np.maximum(ends[to_C], starts[from_C])
    if parts.blank_P.any():
        _join(start_C, end_C, text, np.repeat(parts.blank_P, np.diff(parts.first_P)))
    return np.stack([start_C, end_C], axis=1).astype(np.int32)


def _join(start_C: Int64s, end_C: Int64s, text: str, gone_L: Bools) -> None:
    """Give characters that vanished, where no token has them, to the token that they touch, in place.

    That is the one before them, or behind a blank the one after them. Between blanks they go to the last token before
    them, or to the first.
    """
    steps = np.zeros(len(text) + 1, np.int64)
    np.add.at(steps, start_C, 1)
    np.add.at(steps, end_C, -1)
    blank_L = blanks(text)
    lost_L = gone_L & ~blank_L & (np.cumsum(steps[:-1]) == 0)
    borders = np.flatnonzero(np.diff(lost_L, prepend=False, append=False))
    for start, end in borders.reshape(-1, 2).tolist():
        behind = int(np.searchsorted(end_C, start, side="right"))
        if behind < len(start_C) and start_C[behind] <= start:  # it took what came before this as well
            continue
        follows = start > 0 and not blank_L[start - 1]
        touches = end < len(text) and not blank_L[end]
        if behind and (follows or not touches or behind == len(start_C)):
            end_C[np.searchsorted(end_C, end_C[behind - 1]) : behind] = end
        else:
            start_C[behind : np.searchsorted(start_C, start_C[behind], side="right")] = start

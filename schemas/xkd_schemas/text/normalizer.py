"""Offsets in a text whose normaliser merged, swapped or deleted characters, which the tokenizers library loses.

The library gives the token for "e" + U+0301 the interval of the "e" alone, and a deleted character to nobody: both
leave a hole. So the text is cut into the smallest parts whose normalised forms, written one after the other, are the
normalised text. The tokenizer then reads the normalised text, must give the ids it gave before, and a token has the
characters of all parts that it touches there. A part that vanishes joins a neighbour. A text for which this does not
work out keeps the library's offsets, and so does a document whose intervals the library gets right.

Nothing is assumed about the normaliser or its version of Unicode: two characters are apart where their normalised
forms, one after the other, are the form of both together. Where the forms of such parts do not add up to the form of
the text, more characters on both sides are looked at.

Offsets that cover a text may still stand at the wrong characters. Canonical order sorts the marks behind a letter by
their class (Unicode Standard, section 3.11, D108 to D109); the offsets of the library stay in the old order. A mark
that merges with the last letter of what was a ligature takes that letter's place in its offsets. And the SentencePiece
normaliser looks up a letter with its marks as one string, takes the longest beginning that it knows for all of it, and
is one off after a control that it deletes. Texts with such marks are repaired too.

Shape legend for this file
    N texts    R documents    G encoded segments    C content tokens    P parts of a text    L characters
"""

import functools
import itertools
import json
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from xkd_schemas.ragged import row_offsets
from xkd_schemas.text.offsets import EncodedText, blanks, content_intervals
from xkd_schemas.text.tokenizers import Encoded, FastTokenizer, encode_with, set_plain
from xkd_schemas.tokens import OK, Bools, Int32s

Int64s = npt.NDArray[np.int64]

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
def mark_classes() -> Classes:
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


def find_doubtful(texts: Sequence[str], *, deep: bool, maps: bool = False) -> Bools:
    """In which texts [N] marks stand that a normaliser may swap, or merge unseen with a part of what is before them.

    Args:
        texts: Valid Unicode.
        deep: The normaliser takes apart what is only compatible, such as a ligature.
        maps: It looks strings up in a map; then it is `deep` as well.

    >>> find_doubtful(["e\\u0301", "q\\u0301\\u0323", "\\ufb01\\u0300"], deep=True).tolist()
    [False, True, True]
    """
    found = np.zeros(len(texts), np.bool_)
    numbers = [n for n, text in enumerate(texts) if maps or not text.isascii()]
    if not numbers:
        return found
    codes_L = np.frombuffer("\n".join([texts[n] for n in numbers]).encode("utf-32-le"), np.uint32)
    known = mark_classes()
    # characters that may have merged with, or changed places with, the one before them
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


REACHES: Final = (1, 2, 4, 8, 16)
"""Characters to the left and right of a cut that must be normalised alike together and apart: more where fewer do not
give the normalised text."""
LONGEST_PART: Final = 64
"""Characters; text that is only normalised in longer stretches is not repair_intervals."""
MOST_KNOWN: Final = 100_000
"""Short strings whose normalised form is remembered."""
WORDS: Final = re.compile(r"\s+|\S+")

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
        """The parts of a text and its normalised form; None if it is not repair_intervals.

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


class Normalised:
    """Offsets through one tokenizer's normaliser; results do not depend on what it has seen.

    Args:
        tokenizer: A fast one; it must not be changed afterwards.
    """

    def __init__(self, tokenizer: FastTokenizer) -> None:
        self._backend = set_plain(tokenizer.backend_tokenizer)
        steps = _steps(self._backend.normalizer)
        self._inside = [step for step in steps if step["type"] not in ENDS]
        self._ends = [step for step in steps if step["type"] in ENDS]

    @property
    def changes(self) -> bool:
        """Might the tokenizer change anything inside a text?"""
        return bool(self._inside)

    def find_doubtful(self, texts: Sequence[str]) -> Bools:
        """In which texts [N] the library's offsets may be wrong although they leave no hole."""
        types = {step["type"] for step in self._inside}
        return find_doubtful(texts, deep=bool(types & DEEP), maps="Precompiled" in types)

    def offsets(self, texts: Sequence[str], encoded: Encoded) -> Int32s:
        """The offsets [C, 2] of all texts in characters of each; of a text that is not repair_intervals those it had.

        Args:
            texts: Valid Unicode.
            encoded: Their ids and offsets as the tokenizer gave them.
        """
        read = [self._backend.normalizer.normalize_str(text) for text in texts]
        again = encode_with(self._rest, read)
        found = encoded.offsets.copy()
        own, other = (itertools.pairwise(e.first.tolist()) for e in (encoded, again))
        for text, form, mine, theirs in zip(texts, read, own, other, strict=True):
            if np.array_equal(encoded.ids[slice(*mine)], again.ids[slice(*theirs)]):
                offsets_C2 = self._through(text, form, again.offsets[slice(*theirs)])
                found[slice(*mine)] = encoded.offsets[slice(*mine)] if offsets_C2 is None else offsets_C2
        return found

    def _through(self, text: str, form: str, offsets_C2: Int32s) -> Int32s | None:
        """Offsets in the normalised text as offsets in the text; None if it is not repair_intervals."""
        normal = self._parts.normalise(text) if self._ends else form
        place = find_shift(form, normal, "".join(step.get("prepend", "") for step in self._ends))
        parts = None if place is None else self._parts.of(text, normal)
        if place is None or parts is None:
            return None
        start_C, end_C = offsets_C2.T
        inside_C2 = np.stack([np.maximum(start_C + place, 0), np.maximum(end_C + place, np.minimum(end_C, 1))], axis=1)
        return map_to_text(text, parts, inside_C2)

    @functools.cached_property
    def _parts(self) -> Parts:
        return Parts(_normaliser(type(self._backend), self._inside).normalize_str)

    @functools.cached_property
    def _rest(self) -> Any:
        """The tokenizer without a normaliser."""
        rest = type(self._backend).from_str(self._backend.to_str())
        rest.normalizer = None
        return set_plain(rest)


def find_shift(form: str, normal: str, prefix: str) -> int | None:
    """How far a form lies behind a normalised text of which blanks at the ends were taken and a prefix was given.

    >>> find_shift("▁the lamp", " the lamp  ", "▁"), find_shift("the", " the", ""), find_shift("the", "then", "")
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
    return _flatten(described)


def _flatten(described: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    if described["type"] == "Sequence":
        return [step for part in described["normalizers"] for step in _flatten(part)]
    return [described]


def _normaliser(kind: Any, steps: Sequence[Mapping[str, Any]]) -> Any:
    """The library's normaliser of these steps."""
    described = {**BARE, "normalizer": {"type": "Sequence", "normalizers": steps}}
    return kind.from_str(json.dumps(described)).normalizer


def map_to_text(text: str, parts: Cut, offsets_C2: Int32s) -> Int32s:
    """Offsets in the normalised text as offsets in the text, [C, 2] int32: those of all parts that a token touches.

    Args:
        text: Before it is normalised.
        parts: Of the text.
        offsets_C2: Of tokens, in the normalised text.

    Example: "e" + U+0301, U+200B, "ﬁ" that became "é", nothing, "fi"

        >>> parts = Cut(np.array([0, 2, 3, 4]), np.array([0, 1, 1, 3]), np.array([False, True, False]))
        >>> map_to_text("e\u0301\u200b\ufb01", parts, np.array([[0, 1], [1, 2], [2, 3]])).tolist()
        [[0, 3], [3, 4], [3, 4]]
    """
    kept = np.flatnonzero(np.diff(parts.normal_P))  # parts of which something is left
    if not len(kept) or not len(offsets_C2):
        return np.zeros_like(offsets_C2)
    ends = parts.first_P[kept + 1]
    starts = np.append(parts.first_P[kept], ends[-1])  # of these parts in the text
    normal = np.append(parts.normal_P[kept], parts.normal_P[-1])  # and in the normalised text
    from_C = np.searchsorted(normal, offsets_C2[:, 0], side="right") - 1
    to_C = np.searchsorted(normal, offsets_C2[:, 1], side="left") - 1
    start_C, end_C = starts[from_C], np.maximum(ends[to_C], starts[from_C])
    if parts.blank_P.any():
        _give_vanished(start_C, end_C, text, np.repeat(parts.blank_P, np.diff(parts.first_P)))
    return np.stack([start_C, end_C], axis=1).astype(np.int32)


def _give_vanished(start_C: Int64s, end_C: Int64s, text: str, gone_L: Bools) -> None:
    """Give characters that vanished, where no token has them, to the token that they touch, in place.

    That is the one before them, or behind a blank the one after them. Between blanks they go to the last token before
    them, or to the first.
    """
    steps = np.zeros(len(text) + 1, np.int64)  # its running sum: tokens that have a character
    np.add.at(steps, start_C, 1)
    np.add.at(steps, end_C, -1)
    blank_L = blanks(text)
    lost_L = gone_L & ~blank_L & (np.cumsum(steps[:-1]) == 0)
    # stretches that no token has, as start and end
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


class Intervals(NamedTuple):
    """Where the tokens of a block stand."""

    spans_C2: Int32s
    """[C, 2] characters of each token's document."""
    statuses: list[str]
    """[R] "ok" or what is wrong with each document's."""
    extended_R: Int32s
    """[R] tokens that have other characters than the library's offsets say."""


def repair_intervals(read: EncodedText, ids_C: Int32s, normalised: Normalised) -> Intervals:
    """`content_intervals`, of what was merged, swapped or deleted too.

    Args:
        read: What the tokenizer was given, and its offsets.
        ids_C: The tokens.
        normalised: Of the tokenizer.
    """
    spans_C2, statuses = content_intervals(read)
    found = Intervals(spans_C2, statuses, np.zeros(len(statuses), np.int32))
    if not normalised.changes:
        return found
    bad_R = normalised.find_doubtful(read.texts) | np.array([status != OK for status in statuses], np.bool_)
    if not bad_R.any():
        return found
    bad_C = np.repeat(bad_R[read.document_G], np.diff(read.first))
    part = _part(read, bad_R, bad_C)
    places = zip(part.document_G.tolist(), part.segments_G2.tolist(), strict=True)
    texts = [part.texts[d][start:end] for d, (start, end) in places]
    offsets_C2 = normalised.offsets(texts, Encoded(ids_C[bad_C], part.offsets_C2, part.first))
    better_C2, better = content_intervals(replace(part, offsets_C2=offsets_C2))
    good_R = bad_R.copy()  # those that the normaliser explains
    good_R[bad_R] = [status == OK for status in better]
    document_C = np.repeat(read.document_G, np.diff(read.first))
    good_C = good_R[document_C]
    better_C2 = better_C2[good_C[bad_C]]
    other_C = (spans_C2[good_C] != better_C2).any(axis=1)
    found.extended_R[:] = np.bincount(document_C[good_C][other_C], minlength=len(statuses))
    spans_C2[good_C] = better_C2
    return found._replace(statuses=[OK if good else s for good, s in zip(good_R.tolist(), statuses, strict=True)])


def _part(read: EncodedText, wanted_R: Bools, wanted_C: Bools) -> EncodedText:
    """The wanted documents alone."""
    wanted_G = wanted_R[read.document_G]
    return replace(
        read, texts=list(itertools.compress(read.texts, wanted_R.tolist())),
        document_G=(np.cumsum(wanted_R) - 1)[read.document_G[wanted_G]], segments_G2=read.segments_G2[wanted_G],
        offsets_C2=read.offsets_C2[wanted_C], first=row_offsets(np.diff(read.first)[wanted_G]),
    )  # fmt: skip

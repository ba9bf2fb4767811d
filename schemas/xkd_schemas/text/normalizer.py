"""Offsets in a text whose normaliser merged, swapped or deleted characters, which the tokenizers library loses.

The library gives the token for "e" + U+0301 the interval of the "e" alone, and a deleted character to nobody. So the
text is cut into the smallest parts whose normalised forms, one after the other, are the normalised text; nothing is
assumed about the normaliser. The tokenizer then reads the normalised text, must give the ids it gave before, and a
token has the characters of all parts that it touches there. A part that vanishes joins a neighbour. A text for which
this does not work out keeps the library's offsets, and so does a document whose intervals the library gets right.

Offsets that cover a text may still stand at the wrong characters, so texts with such marks are repaired too. Canonical
order sorts the marks behind a letter by their class (Unicode Standard, section 3.11, D108 to D109), the offsets stay
in the old order. A mark that merges with the last letter of what was a ligature takes that letter's place. The
SentencePiece normaliser looks up a letter with its marks as one string, and is one off after a control it deletes.

Shape legend for this file
    N texts    R documents    G encoded segments    C content tokens    P parts of a text    L characters
"""

import copy
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
from xkd_schemas.text.tokenizers import Encoded, EncodedText, blanks, content_intervals, encode_with, set_plain
from xkd_schemas.tokens import OK, Bools, Int32s, Int64s

LETTERS: Final = frozenset("\u0e33\u0eb3\U0001f3fb\U0001f3fc\U0001f3fd\U0001f3fe\U0001f3ff")
"""Vowels and skin tones that are one sign with what is before them, but no marks by their category."""
LINE_BLANKS: Final = "\t\n\f\r"  # controls that every normaliser takes for blanks
LAST_CODE: Final = 0x1FFFF  # characters behind it are no marks and end in none
REACHES: Final = (1, 2, 4, 8, 16)  # characters beside a cut that are normalised alike together and apart
LONGEST_PART: Final = 64  # characters; text that is only normalised in longer stretches keeps its intervals
MOST_KNOWN: Final = 100_000  # short strings whose normalised form is remembered
WORDS: Final = re.compile(r"\s+|\S+")
ENDS: Final = frozenset({"Strip", "Prepend"})  # what they do to the ends they do not do inside; they merge nothing
DEEP: Final = frozenset({"NFKC", "NFKD", "Precompiled"})  # they take more apart than canonical forms do


class Classes(NamedTuple):
    """What is looked up for each character up to LAST_CODE."""

    first: npt.NDArray[np.uint8]  # combining class of the first character of its compatibility decomposition
    last: npt.NDArray[np.uint8]  # of the last one
    follows: Bools  # it may join the character before it or vanish behind it
    changes: Bools  # NFKC or folding its case changes it
    controls: Bools  # it is a control and no blank of a line


@functools.cache
def mark_classes() -> Classes:
    """The tables, made once in a process."""
    chars = [chr(code) for code in range(LAST_CODE + 1)]
    parts = [unicodedata.normalize("NFKD", char) for char in chars]
    categories = [unicodedata.category(char) for char in chars]
    first, last = (np.array([unicodedata.combining(part[at]) for part in parts], np.uint8) for at in (0, -1))
    joins = np.array([c[0] in "MC" or char in LETTERS for c, char in zip(categories, chars, strict=True)], np.bool_)
    no_blank = np.array([char not in LINE_BLANKS for char in chars], np.bool_)
    changes = [char.casefold() != char or unicodedata.normalize("NFKC", char) != char for char in chars]
    return Classes(
        first, last, follows=(joins | (first > 0)) & no_blank, changes=np.array(changes, np.bool_),
        controls=(np.array(categories) == "Cc") & no_blank,
    )  # fmt: skip


class Cut(NamedTuple):
    """The parts of a text, and what became of them."""

    first_P: Int64s  # [P + 1] where each part begins in the text, and the end of the last
    normal_P: Int64s  # [P + 1] the same in the normalised text
    blank_P: Bools  # [P] nothing of it is left, or only blanks


class Parts:
    """Cuts texts into the smallest parts that a normaliser treats on their own."""

    def __init__(self, normalise: Callable[[str], str]) -> None:
        remember = functools.lru_cache(MOST_KNOWN)
        self._form = form = remember(normalise)
        self._is_apart = remember(lambda left, right: form(left + right) == form(left) + form(right))
        self._cut_word = remember(lambda word: self._cut(word, form(word)))

    def of(self, text: str, normal: str) -> Cut | None:
        """The parts of a text and its normalised form; None if they do not explain it.

        Words are cut once; only where a text is more than its words one after the other it is cut as a whole.

        >>> import unicodedata
        >>> parts = Parts(lambda text: unicodedata.normalize("NFKC", text))
        >>> [part.tolist() for part in parts.of("e\\u0301 \\ufb01", "\\u00e9 fi")]
        [[0, 2, 3, 4], [0, 1, 2, 4], [False, True, False]]
        """
        words = WORDS.findall(text)
        if max(map(len, words), default=0) <= LONGEST_PART and "".join(map(self._form, words)) == normal:
            found = list(map(self._cut_word, words))
        else:
            found = [self._cut(text, normal)]
        if not found or None in found:
            return None
        sizes, forms, blank = zip(*(part for pieces in found for part in pieces or ()), strict=True)
        return Cut(row_offsets(sizes), row_offsets(forms), np.array(blank, np.bool_))

    def _cut(self, text: str, normal: str) -> list[tuple[int, int, bool]] | None:
        """Of each part the length, the length of its form, and whether nothing or only blanks are left of it."""
        cuts: Sequence[int] = range(1, len(text))
        for reach in REACHES:
            cuts = [at for at in cuts if self._is_apart(text[max(0, at - reach) : at], text[at : at + reach])]
            pieces = [text[start:end] for start, end in itertools.pairwise([0, *cuts, len(text)])]
            if max(len(piece.strip()) for piece in pieces) > LONGEST_PART:
                return None
            forms = [self._form(piece) for piece in pieces]
            if "".join(forms) == normal:
                blank = (not form.replace("▁", " ").strip() for form in forms)
                return list(zip(map(len, pieces), map(len, forms), blank, strict=True))
        return None


class Normalised:
    """Offsets through the normaliser of one fast tokenizer, which must not be changed afterwards.

    Results do not depend on what it has seen.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._backend = set_plain(tokenizer.backend_tokenizer)
        steps = normaliser_steps(self._backend.normalizer)
        self._inside = [step for step in steps if step["type"] not in ENDS]
        self.changes = bool(self._inside)  # the tokenizer might change something inside a text
        self._ends = [step for step in steps if step["type"] in ENDS]

    def find_doubtful(self, texts: Sequence[str]) -> Bools:
        """In which texts [N] marks stand that it may swap, or merge unseen with a part of what is before them."""
        types = {step["type"] for step in self._inside}
        deep, maps = types & DEEP, "Precompiled" in types
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

    def offsets(self, texts: Sequence[str], encoded: Encoded) -> Int32s:
        """The offsets [C, 2] of all texts in characters of each; those it had of a text that the parts do not explain.

        `encoded` is what the tokenizer makes of the texts, which are valid Unicode.
        """
        forms = [self._backend.normalizer.normalize_str(text) for text in texts]
        again = encode_with(self._rest, forms)
        found = encoded.offsets.copy()
        own, other = (itertools.starmap(slice, itertools.pairwise(e.first.tolist())) for e in (encoded, again))
        for text, form, mine, theirs in zip(texts, forms, own, other, strict=True):
            if np.array_equal(encoded.ids[mine], again.ids[theirs]):
                offsets_C2 = self._through(text, form, again.offsets[theirs])
                found[mine] = encoded.offsets[mine] if offsets_C2 is None else offsets_C2
        return found

    def _through(self, text: str, form: str, offsets_C2: Int32s) -> Int32s | None:
        """Offsets in the normalised text as offsets in the text; None if the parts do not explain it."""
        normal = self._inner.normalize_str(text) if self._ends else form
        place = find_shift(form, normal, "".join(step.get("prepend", "") for step in self._ends))
        parts = None if place is None else self._parts.of(text, normal)
        if place is None or parts is None:
            return None
        start_C, end_C = offsets_C2.T
        inside_C2 = np.stack([np.maximum(start_C + place, 0), np.maximum(end_C + place, np.minimum(end_C, 1))], axis=1)
        return map_to_text(text, parts, inside_C2)

    @functools.cached_property
    def _inner(self) -> Any:
        if not self._ends:
            return self._backend.normalizer
        inner = copy.copy(self._backend.normalizer)  # a sequence, as there is more than the ends
        inner.__setstate__(json.dumps({"type": "Sequence", "normalizers": self._inside}).encode())
        return inner

    @functools.cached_property
    def _parts(self) -> Parts:
        return Parts(self._inner.normalize_str)

    @functools.cached_property
    def _rest(self) -> Any:
        rest = type(self._backend).from_str(self._backend.to_str())
        rest.normalizer = None
        return set_plain(rest)


def find_shift(form: str, normal: str, prefix: str) -> int | None:
    """How far a form lies behind a normalised text of which blanks at the ends were taken and a prefix was given.

    >>> find_shift("▁the lamp", " the lamp  ", "▁"), find_shift("the", " the\\x85", ""), find_shift("the", "then", "")
    (0, 1, None)
    """
    given = len(prefix) if prefix and form.startswith(prefix) else 0
    taken = normal.find(form[given:])
    left = normal[:taken] + normal[taken + len(form) - given :]
    return None if taken < 0 or left.replace("▁", " ").strip() else taken - given


def normaliser_steps(normaliser: Any) -> list[Mapping[str, Any]]:
    """The steps of the library's normaliser in order; none of one that is written in Python."""
    try:
        steps = [] if normaliser is None else [json.loads(normaliser.__getstate__())]
    except Exception:  # the library's bare one: it cannot be written down
        return []
    while any(step["type"] == "Sequence" for step in steps):
        steps = [part for step in steps for part in step.get("normalizers", [step])]
    return steps


def map_to_text(text: str, parts: Cut, offsets_C2: Int32s) -> Int32s:
    """Offsets in the normalised text as offsets in the text, [C, 2] int32: those of all parts that a token touches.

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

    spans_C2: Int32s  # [C, 2] characters of each token's document
    statuses: list[str]  # [R] "ok" or what is wrong with each document's
    extended_R: Int32s  # [R] tokens that have other characters than the library's offsets say


def repair_intervals(read: EncodedText, normalised: Normalised) -> Intervals:
    """`content_intervals`, of what was merged, swapped or deleted too; `normalised` is of the tokenizer that read."""
    spans_C2, statuses = content_intervals(read)
    found = Intervals(spans_C2, statuses, np.zeros(len(statuses), np.int32))
    if not normalised.changes:
        return found
    bad_R = normalised.find_doubtful(read.texts) | np.array([status != OK for status in statuses], np.bool_)
    if not bad_R.any():
        return found
    part = _take(read, bad_R)
    places = zip(part.document_G.tolist(), part.segments_G2.tolist(), strict=True)
    offsets_C2 = normalised.offsets([part.texts[d][start:end] for d, (start, end) in places], part.encoded)
    better_C2, better = content_intervals(replace(part, encoded=part.encoded._replace(offsets=offsets_C2)))
    good_R = bad_R.copy()  # those that the normaliser explains
    good_R[bad_R] = [status == OK for status in better]
    document_C = np.repeat(read.document_G, np.diff(read.encoded.first))
    good_C = good_R[document_C]
    better_C2 = better_C2[good_C[bad_R[document_C]]]
    other_C = (spans_C2[good_C] != better_C2).any(axis=1)
    found.extended_R[:] = np.bincount(document_C[good_C][other_C], minlength=len(statuses))
    spans_C2[good_C] = better_C2
    return found._replace(statuses=[OK if good else s for good, s in zip(good_R.tolist(), statuses, strict=True)])


def _take(read: EncodedText, wanted_R: Bools) -> EncodedText:
    wanted_G = wanted_R[read.document_G]
    counts_G = np.diff(read.encoded.first)
    wanted_C = np.repeat(wanted_G, counts_G)
    return EncodedText(
        texts=list(itertools.compress(read.texts, wanted_R.tolist())),
        document_G=(np.cumsum(wanted_R) - 1)[read.document_G[wanted_G]], segments_G2=read.segments_G2[wanted_G],
        encoded=Encoded(read.encoded.ids[wanted_C], read.encoded.offsets[wanted_C], row_offsets(counts_G[wanted_G])),
    )  # fmt: skip

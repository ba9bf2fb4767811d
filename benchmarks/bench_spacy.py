"""The words and phrases of the documents stage, against spaCy's pipeline as it comes.

The other side is `nlp.pipe` with every component and the default batch size. Its spans are read from its documents by
the rules of the stage written down a second time, from spaCy's own objects, and must be the same.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.measure import Options, Result, Skipped, interleaved, ratio
from benchmarks.pair import pair_of
from xkd_pipeline.parsing.spacy_parser import PYPI_PIPELINE, SpacyParser, is_word, joined_spans, select_phrases
from xkd_pipeline.tables.shard import document_at
from xkd_schemas.cache.table import Table
from xkd_schemas.config import DocumentsSection
from xkd_schemas.documents import Interval, Spans
from xkd_schemas.errors import InputMissing


def run(options: Options) -> list[Result]:
    """The cache's first documents: words a second of this core."""
    import spacy

    settings = DocumentsSection(spacy_model=PYPI_PIPELINE)
    try:
        parser = SpacyParser(settings)
    except InputMissing as error:
        return [Skipped(what="spaCy stage / nlp.pipe", why=str(error))]
    table = Table(pair_of(options).cache, "documents")
    documents = [document_at(table[n]) for n in range(min(len(table), options.size(512, 24)))]
    whole = spacy.load(settings.spacy_model)
    pieces = [parser._pieces(d) for d in documents]
    texts = [d.text[start:end] for d, cuts in zip(documents, pieces, strict=True) for start, end in cuts]
    spans = parser.parse(documents)
    assert spans == spans_of(pieces, whole.pipe(texts), settings), "other spans than spaCy's own pipeline"
    seconds = interleaved(
        {
            "ours": lambda: parser.parse(documents),
            "pipe": lambda: list(whole.pipe(texts)),
            "spans": lambda: spans_of(pieces, whole.pipe(texts), settings),
        },
        max(2, options.repeats // 2),
    )
    words = sum(len(s.words) for s in spans)
    ours, pipe, own = (words / seconds[name] / 1e3 for name in ("ours", "pipe", "spans"))
    what, unit = f"words and phrases of {len(documents)} documents", "thousand words a second"
    return [
        ratio(f"{what} / nlp.pipe with all components", ours, pipe, unit, bar=1.6, at_least=True),
        ratio(f"{what} / the same and its spans read", ours, own, unit, at_least=True),
    ]


def spans_of(
    documents: Sequence[Sequence[Interval]], parsed: Iterator[Any], settings: DocumentsSection
) -> list[Spans]:
    """Spans of documents whose pieces were parsed one after the other, by the rules of `SpacyParser`."""
    found = []
    for cuts in documents:
        pieces = []
        for first, _ in cuts:
            doc = next(parsed)
            words = [(t.idx + a, t.idx + b) for t in doc if is_word(t.text) for a, b in [_solid(t.text)]]
            phrases = [(chunk.start_char, chunk.end_char, "NP") for chunk in doc.noun_chunks]
            phrases += [(doc[a].idx, doc[b - 1].idx + len(doc[b - 1]), "VP") for a, b in _verbs(doc)]
            trimmed = [(*_trimmed(doc.text, a, b), label) for a, b, label in phrases]
            kept = select_phrases(trimmed, words, max_words=settings.max_words, drop_contained=True, notes=Counter())
            pieces.append((first, words, kept))
        found.append(joined_spans(pieces))
    return found


def _verbs(doc: Any) -> Iterator[tuple[int, int]]:
    """AUX* ADV* VERB+ ADV* as a regular expression over one letter a token; neighbours may share their adverbs."""
    letters = "".join({"AUX": "x", "ADV": "d", "VERB": "v"}.get(token.pos_, "-") for token in doc)
    for run in re.finditer("v+", letters):
        before = re.search("x*d*$", letters[: run.start()])
        after = re.match("d*", letters[run.end() :])
        yield before.start() if before else run.start(), run.end() + (after.end() if after else 0)


def _solid(text: str) -> tuple[int, int]:
    return len(text) - len(text.lstrip()), len(text.rstrip())


def _trimmed(text: str, start: int, end: int) -> tuple[int, int]:
    first, last = _solid(text[start:end])
    return start + first, max(start + first, start + last)

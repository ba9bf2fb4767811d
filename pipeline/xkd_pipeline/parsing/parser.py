"""What the pipeline asks of a parser, and the probe that tells two parsers apart."""

from collections import Counter
from collections.abc import Sequence
from typing import Final, Protocol

from xkd_pipeline.parsing.parser_probe import PROBE_TEXTS
from xkd_schemas.digests import digest
from xkd_schemas.documents import Document, Spans, document_of

TEXTS_AT_ONCE: Final = 64
"""Texts handed to spaCy at once. Memory grows with it; spans do not depend on it."""


class Parser(Protocol):
    """Finds words and phrases. What it finds in a document depends on that document alone."""

    notes: Counter[str]
    """What could not be parsed in full since the caller last cleared it, by reason."""

    def parse(self, documents: Sequence[Document]) -> list[Spans]:
        """Spans of each document, in order; none crosses a segment border."""

    def identity(self) -> dict[str, str]:
        """Everything the spans depend on: kind, versions, weights, settings, and the probe."""


def probe(parser: Parser) -> str:
    """sha256 over the spans of PROBE_TEXTS: changes with anything that changes what the parser finds."""
    notes = Counter(parser.notes)
    documents = [document_of([("text", text, True)], source="probe", line=1) for text in PROBE_TEXTS]
    spans = parser.parse(documents)
    parser.notes.clear()
    parser.notes.update(notes)
    return digest([[s.words, s.phrases, s.labels] for s in spans])

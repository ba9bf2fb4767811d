"""What the pipeline asks of a parser, its settings, and which parsers there are.

To add a parser, write a class with `parse`, `identity` and `notes` in a module of its own and add
one line to PARSERS. The parsing libraries are imported when a parser is made, not before.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Final, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field

from xkd_pipeline.parsing.parser_probe import PROBE_TEXTS
from xkd_schemas.cache.manifest import digest
from xkd_schemas.documents import Document, Spans, document_of
from xkd_schemas.errors import UsageError

DEFAULT_PIPELINE: Final = "en_core_web_sm"


class Parser(Protocol):
    """Finds words and phrases. What it finds in a document depends on that document alone."""

    notes: Counter[str]
    """What could not be parsed in full since the caller last cleared it, by reason."""

    def parse(self, documents: Sequence[Document]) -> list[Spans]:
        """Spans of each document, in order; none crosses a segment border."""

    def identity(self) -> dict[str, str]:
        """Everything the spans depend on: kind, versions, weights, settings, and the probe."""


class ParserSettings(BaseModel):
    """Which parser, and which of its phrases are kept."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["spacy", "benepar"] = "spacy"
    """spacy: noun chunks and verb groups, as MTA's published code. benepar: constituents NP and VP."""
    model: str = DEFAULT_PIPELINE
    """Name or folder of the spaCy pipeline; for benepar it cuts words and sentences, and may be blank:en."""
    benepar_model: str | None = None
    """Name or path of the benepar model; needed for kind benepar."""
    max_words: int = Field(default=12, ge=0)
    """Words of the longest phrase that is kept; 0: any length. MTA's code has no limit, which spaCy's flat phrases
    hardly need; a verb phrase of a full parse can be most of a sentence, and the reproduction of MTA stops at 12."""
    drop_contained: bool | None = None
    """Leave out phrases that lie inside others. None: True for spacy (as MTA's code), False for benepar."""
    batch_size: int = Field(default=64, ge=1)
    """Texts handed to spaCy at once. Memory grows with it; spans do not depend on it."""

    @property
    def drops_contained(self) -> bool:
        """`drop_contained` with None settled."""
        return self.kind == "spacy" if self.drop_contained is None else self.drop_contained


def _spacy(settings: ParserSettings) -> Parser:
    from xkd_pipeline.parsing.spacy_parser import SpacyParser

    return SpacyParser(settings)


def _benepar(settings: ParserSettings) -> Parser:
    from xkd_pipeline.parsing.benepar_parser import BeneparParser

    return BeneparParser(settings)


PARSERS: Mapping[str, Callable[[ParserSettings], Parser]] = {"spacy": _spacy, "benepar": _benepar}


def parser_for(settings: ParserSettings) -> Parser:
    """Load the parser of these settings.

    Raises:
        InputMissing: the pipeline or model is not installed or not there.
        UsageError: the pipeline cannot do what is asked of it.
        BadData, Refused: the model's files are broken, or would run code.
    """
    try:
        make = PARSERS[settings.kind]
    except KeyError:
        raise UsageError(f"parser '{settings.kind}' is not known", next=f"use {' or '.join(PARSERS)}") from None
    return make(settings)


def probe(parser: Parser) -> str:
    """sha256 over the spans of PROBE_TEXTS: changes with anything that changes what the parser finds."""
    notes = Counter(parser.notes)
    documents = [document_of([("text", text, True)], source="probe", line=1) for text in PROBE_TEXTS]
    spans = parser.parse(documents)
    parser.notes.clear()
    parser.notes.update(notes)
    return digest([[s.words, s.phrases, s.labels] for s in spans])

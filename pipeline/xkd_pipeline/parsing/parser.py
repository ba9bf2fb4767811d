"""What the pipeline asks of a parser, the settings of one, and the probe that tells two parsers apart."""

from collections import Counter
from collections.abc import Sequence
from typing import Final, Protocol

from pydantic import BaseModel, ConfigDict, Field

from xkd_pipeline.parsing.parser_probe import PROBE_TEXTS
from xkd_schemas.digests import digest
from xkd_schemas.documents import Document, Spans, document_of

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

    kind: str = "spacy"
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


def probe(parser: Parser) -> str:
    """sha256 over the spans of PROBE_TEXTS: changes with anything that changes what the parser finds."""
    notes = Counter(parser.notes)
    documents = [document_of([("text", text, True)], source="probe", line=1) for text in PROBE_TEXTS]
    spans = parser.parse(documents)
    parser.notes.clear()
    parser.notes.update(notes)
    return digest([[s.words, s.phrases, s.labels] for s in spans])

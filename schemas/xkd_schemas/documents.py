"""A document is one canonical string cut into segments; words and phrases are intervals over it.

All intervals are half open and count Unicode code points of `text`. Template text (role
markers, system prompts, blank lines between turns) is never part of `text`.

Shape legend for this file
    G segments of all documents of a batch
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from xkd_schemas.errors import BadData
from xkd_schemas.ragged import Ragged, flat_list

DOCUMENTS_VERSION = 2  # bump on any change to DOCUMENTS, and add tests/golden/documents_v<N>.txt

Interval = tuple[int, int]

INTERVALS = pa.large_list(pa.field("item", pa.list_(pa.field("item", pa.int32(), nullable=False), 2), nullable=False))
"""Arrow type of [K, 2] int32 intervals; `column.flatten().flatten()` is one zero-copy buffer."""


DOCUMENTS = pa.schema(
    [
        pa.field("doc_id", pa.string(), nullable=False),  # 16 hex digits of the content, equal texts share it
        pa.field("source", pa.string(), nullable=False),  # file or data set as named on the command line
        pa.field("line", pa.int64(), nullable=False),  # row in that source, first is 1
        pa.field("text", pa.large_string(), nullable=False),
        pa.field("segments", INTERVALS, nullable=False),  # [G, 2] characters, adjacent, covering the text
        pa.field("roles", flat_list(pa.string()), nullable=False),  # [G]
        pa.field("targets", flat_list(pa.bool_()), nullable=False),  # [G] True: the student is trained on it
        pa.field("messages", pa.large_string(), nullable=False),  # "", or messages and tools (conversation.py)
        pa.field("words", INTERVALS, nullable=False),  # [K, 2] characters, sorted, disjoint
        pa.field("phrases", INTERVALS, nullable=False),  # [P, 2] characters, sorted by (start, -end)
        pa.field("labels", flat_list(pa.string()), nullable=False),  # [P] "NP" or "VP"
    ],
    metadata={b"xkd_table": b"documents", b"xkd_schema": str(DOCUMENTS_VERSION).encode()},
)


POLICY: Final = "policy"
"""Field of a row that says who wrote its response, such as student; where the corpus has it, the last column."""


DOCUMENTS_READ = (1, 2)  # versions that this program reads; 1 has no `messages`


def documents_schema(version: int) -> pa.Schema:
    """The columns of a version."""
    if version == DOCUMENTS_VERSION:
        return DOCUMENTS
    fields = [field for field in DOCUMENTS if field.name != "messages"]
    return pa.schema(fields, metadata={**DOCUMENTS.metadata, b"xkd_schema": str(version).encode()})


def schema_of(spec: Mapping[str, Any]) -> pa.Schema:
    """The columns of the documents table with this spec, which says `policy` where there is that column."""
    schema = documents_schema(spec["schema"])
    return schema.append(pa.field(POLICY, pa.string(), nullable=False)) if spec.get(POLICY) else schema


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """A stretch of text by one role; borders between segments are token borders in every model."""

    role: str
    """system, developer, user, assistant, reasoning, tool_call, tool, prompt, instruction, input, response or text."""
    start: int
    end: int
    target: bool  # True where the student learns to produce the text


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """Canonical text, its segments, and where it came from."""

    text: str
    segments: tuple[Segment, ...]
    source: str
    line: int
    messages: str = ""
    """What of a chat row its segments do not say, as JSON (conversation.py); empty where they say all."""
    policy: str = ""
    """Who wrote the response, where the row has the field."""

    @property
    def doc_id(self) -> str:
        """16 hex digits that depend on text, segments and messages only."""
        content: list[object] = [self.text, [[s.role, s.start, s.end, s.target] for s in self.segments]]
        content += [self.messages] if self.messages else []
        return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode()).hexdigest()[:16]


@dataclass(frozen=True, kw_only=True, slots=True)
class Spans:
    """Words and phrases of one document, as character intervals."""

    words: tuple[Interval, ...]
    phrases: tuple[Interval, ...]
    labels: tuple[str, ...]  # NP or VP, one for each phrase


def document_of(parts: Iterable[tuple[str, str, bool]], *, source: str, line: int, messages: str = "") -> Document:
    """Join (role, text, is target) parts into a document; empty parts are left out.

    >>> document_of([("prompt", "Hi?", False), ("response", "Yes", True)], source="a", line=1).segments[1].start
    3
    """
    segments: list[Segment] = []
    texts: list[str] = []
    at = 0
    for role, text, target in parts:
        if text:
            segments.append(Segment(role=role, start=at, end=at + len(text), target=target))
            texts.append(text)
            at += len(text)
    return Document(text="".join(texts), segments=tuple(segments), source=source, line=line, messages=messages)


def checked_spans(document: Document, spans: Spans) -> Spans:
    """Return `spans` unchanged, or raise BadData where one leaves its text or crosses a segment border."""
    borders = {s.start for s in document.segments}
    for name, intervals in (("word", spans.words), ("phrase", spans.phrases)):
        for start, end in intervals:
            what = f"{document.source}:{document.line}: {name} [{start}, {end})"
            if not 0 <= start < end <= len(document.text):
                raise BadData(f"{what} is not inside the text of {len(document.text)} characters")
            if any(start < border < end for border in borders):
                raise BadData(f"{what} crosses a segment border")
    return spans


@dataclass(frozen=True, kw_only=True, slots=True)
class DocumentBatch:
    """Documents side by side: the form in which whole shards are encoded. Segments are adjacent and cover their text.

    numpy's cost per call is that of some hundred tokens, so what is asked of each document alone costs as much as the
    tokenizer. A batch is built from documents or from a table's columns, and gives the documents back one by one.
    """

    texts: Sequence[str]
    segments: Ragged  # [G, 2] int32 characters of the document's own text
    roles: Sequence[str]  # [G] of each segment
    targets_G: npt.NDArray[np.bool_]
    places: Sequence[tuple[str, int]]  # source and line of each document
    messages: Sequence[str]  # as `Document.messages`
    killers: frozenset[int] = frozenset()
    """Documents that no tokenizer may see: each of them killed every process that worked on it."""

    @staticmethod
    def of(documents: Iterable[Document]) -> "DocumentBatch":
        """The batch of these documents."""
        documents = list(documents)
        segments = [s for d in documents for s in d.segments]
        return DocumentBatch(
            texts=[d.text for d in documents],
            segments=Ragged.of(([(s.start, s.end) for s in d.segments] for d in documents), np.int32, 2),
            roles=[s.role for s in segments],
            targets_G=np.array([s.target for s in segments], np.bool_),
            places=[(d.source, d.line) for d in documents],
            messages=[d.messages for d in documents],
        )

    def __len__(self) -> int:
        return len(self.texts)

    def document(self, number: int) -> Document:
        """One document of the batch."""
        own = slice(self.segments.first[number], self.segments.first[number + 1])
        parts = zip(self.segments[number].tolist(), self.roles[own], self.targets_G[own].tolist(), strict=True)
        segments = tuple(Segment(role=role, start=at, end=end, target=target) for (at, end), role, target in parts)
        text, messages, (source, line) = self.texts[number], self.messages[number], self.places[number]
        return Document(text=text, segments=segments, source=source, line=line, messages=messages)

    def take(self, numbers: Sequence[int]) -> "DocumentBatch":
        """The batch of some of the documents."""
        killers = frozenset(at for at, n in enumerate(numbers) if n in self.killers)
        return replace(DocumentBatch.of(self.document(n) for n in numbers), killers=killers)

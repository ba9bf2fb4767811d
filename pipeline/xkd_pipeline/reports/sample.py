"""Some rows of a corpus, spread evenly over it, for commands that look before anything is cached."""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from xkd_pipeline.parsing.stage import cut_prompts, open_corpus, prompt_encoder
from xkd_schemas.config import RunConfig
from xkd_schemas.corpus.files import Content
from xkd_schemas.corpus.sources import RawRow, RejectedRow, Source, read_documents
from xkd_schemas.documents import Document
from xkd_schemas.errors import BadData


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """What was read, and what of."""

    sources: tuple[Source, ...]
    rows: int  # rows that were read, rejected ones included
    documents: tuple[Document, ...]
    rejected: tuple[RejectedRow, ...]
    sizes: tuple[int, ...]  # of each document, the size of the row that it was read from; see `size_of`
    corpus_rows: int  # rows of the whole corpus
    scale: float  # size of the corpus for each size that was read; 1 if all were


def spread_evenly(total: int, wanted: int) -> list[int]:
    """At most `wanted` different numbers below `total`: one from each of as many equal stretches, at a drawn place.

    Always the same ones; drawn, because a corpus may repeat itself at the distance of the stretches.

    >>> len(spread_evenly(100, 4)), spread_evenly(2, 4)
    (4, [0, 1])
    """
    draw = random.Random(0)
    count = min(total, wanted)
    return [draw.randrange(number * total // count, (number + 1) * total // count) for number in range(count)]


def read_sample(run: RunConfig, wanted: int) -> Sample:
    """Read at most `wanted` rows, the same distance apart, from the corpus of a run; the others are only measured.

    Raises:
        UsageError: No corpus is named.
        BadData: It has no row, or none of the rows read can be used.
        InputMissing: A source is not there.
    """
    d = run.documents
    sources = tuple(open_corpus(d))
    total = sum(source.num_rows for source in sources)
    encoder, chosen = prompt_encoder(d), set(spread_evenly(total, wanted))
    documents: list[Document] = []
    rejected: list[RejectedRow] = []
    sizes: list[int] = []
    at = read_size = corpus_size = 0
    for source in sources:
        rows: dict[int, RawRow] = {}
        for row in source.rows():
            corpus_size += size_of(row.content)
            if at in chosen:
                rows[row.line] = row
            at += 1
        name, raw = Path(source.name).name, list(rows.values())
        found, refused = read_documents(name, source.form, source.columns, raw, max_chars=d.max_chars)
        cut = [document for document in cut_prompts(found, encoder, d.max_prompt_tokens) if document is not None]
        documents += cut
        rejected += refused
        sizes += [size_of(rows[document.line].content) for document in cut]
        read_size += sum(size_of(row.content) for row in raw)
    if not documents:
        raise BadData(
            f"none of {len(chosen)} sampled rows can be used ({reasons(rejected)})", fix="check the form of the rows"
        )
    return Sample(
        sources=sources, rows=len(chosen), documents=tuple(documents), rejected=tuple(rejected), sizes=tuple(sizes),
        corpus_rows=total, scale=corpus_size / read_size if read_size else total / len(chosen),
    )  # fmt: skip


def size_of(content: Content) -> int:
    """About how many characters a row has; none for a line that is too long to be read.

    >>> size_of(b'{"text": "abc"}'), size_of({"text": "abc", "n": None})
    (15, 3)
    """
    if isinstance(content, dict):
        return sum(len(value if isinstance(value, str) else repr(value)) for value in content.values() if value)
    return len(content) if isinstance(content, bytes) else 0


def reasons(rejected: Sequence[RejectedRow]) -> str:
    """Reasons with their numbers, e.g. "blank 2, empty 1"."""
    found = Counter(row.reason for row in rejected)
    return ", ".join(f"{name} {number}" for name, number in sorted(found.items()))

"""Some rows of a corpus, spread evenly over it, for commands that look before anything is cached."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from xkd_pipeline.corpus import RawRow, RejectedRow, Source, open_source, read_documents
from xkd_schemas.documents import Document
from xkd_schemas.errors import BadData, UsageError
from xkd_schemas.runfile import RunFile


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """What was read, and what of."""

    sources: tuple[Source, ...]
    rows: int
    """Rows that were read, rejected ones included."""
    documents: tuple[Document, ...]
    rejected: tuple[RejectedRow, ...]

    @property
    def corpus_rows(self) -> int:
        """Rows of the whole corpus."""
        return sum(source.num_rows for source in self.sources)

    @property
    def scale(self) -> float:
        """Rows of the corpus for each row that was read; 1 if all were."""
        return self.corpus_rows / self.rows


def evenly(total: int, wanted: int) -> Iterator[int]:
    """At most `wanted` different numbers below `total`: one from each of as many equal stretches, at a drawn place.

    Always the same ones; drawn, because a corpus may repeat itself at the distance of the stretches.

    >>> len(list(evenly(100, 4))), list(evenly(2, 4))
    (4, [0, 1])
    """
    draw = random.Random(0)
    count = min(total, wanted)
    for number in range(count):
        yield draw.randrange(number * total // count, (number + 1) * total // count)


def read_sample(run: RunFile, wanted: int) -> Sample:
    """Read at most `wanted` rows, the same distance apart, from the corpus of a run.

    Raises:
        UsageError: No corpus is named.
        BadData: It has no row, or none of the rows read can be used.
        InputMissing: A source is not there.
    """
    d = run.documents
    if not d.corpus:
        raise UsageError("no corpus is named", next="name files, folders or data sets")
    sources = tuple(open_source(name, form=d.form, columns=d.columns) for name in d.corpus)
    total = sum(source.num_rows for source in sources)
    if total == 0:
        raise BadData("the corpus has no rows", next="check the paths and the form of the rows")
    chosen = list(evenly(total, wanted))
    documents: list[Document] = []
    rejected: list[RejectedRow] = []
    before = 0
    for source in sources:
        places = [at - before for at in chosen if before <= at < before + source.num_rows]
        found, refused = read_documents(
            Path(source.name).name, source.form, source.columns, _rows(source, places), max_chars=d.max_chars
        )
        documents += found
        rejected += refused
        before += source.num_rows
    if not documents:
        raise BadData(
            f"none of {len(chosen)} sampled rows can be used ({reasons(rejected)})", next="check the form of the rows"
        )
    return Sample(sources=sources, rows=len(chosen), documents=tuple(documents), rejected=tuple(rejected))


def _rows(source: Source, places: Sequence[int]) -> list[RawRow]:
    """The rows at these places, ascending; the source is read once, no further than the last."""
    if not places:
        return []
    wanted, last = set(places), places[-1]
    rows = []
    for at, row in enumerate(source.rows()):
        if at in wanted:
            rows.append(row)
        if at == last:
            break
    return rows


def reasons(rejected: Sequence[RejectedRow]) -> str:
    """Reasons with their numbers, e.g. "blank 2, empty 1"."""
    found = {row.reason for row in rejected}
    return ", ".join(f"{name} {sum(row.reason == name for row in rejected)}" for name in sorted(found))

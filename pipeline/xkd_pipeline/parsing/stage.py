"""Stage 1: corpus rows become documents with words and phrases."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, Final

import numpy as np

from xkd_pipeline.parsing.parser import Parser
from xkd_pipeline.tables.shard import write_shard
from xkd_pipeline.tables.writer import Built, Store, build
from xkd_pipeline.workers.contract import Make, Stage, Workers, local_paths
from xkd_schemas.cache.manifest import Commit, MadeDifferently, Unit
from xkd_schemas.config import DocumentsSection
from xkd_schemas.corpus.rows import rejected_row
from xkd_schemas.corpus.sources import RawRow, Source, open_source, read_documents
from xkd_schemas.documents import DOCUMENTS_VERSION, POLICY, Document, Spans, checked_spans, document_of, schema_of
from xkd_schemas.errors import BadData, UsageError
from xkd_schemas.text.encode import Encoder
from xkd_schemas.tokens import CONTENT, OK, WORKER_KILLED, Tokens

LONG_PROMPT: Final = "long_prompt"  # reason of a row whose prompt is too long and cannot be cut
PROMPTS_CUT: Final = "prompts_cut"  # count of documents whose prompt was cut
_NO_END: Final = 2**31 - 1
PARSERS = {
    "spacy": "xkd_pipeline.parsing.spacy_parser:SpacyParser",
    "benepar": "xkd_pipeline.parsing.benepar_parser:BeneparParser",
}
"""To add a parser, write a class as `Parser` says in a module of its own, which is imported when one is made."""
UNUSED: Final = "unused:"  # begins the names of counts of keys that were not used
_KILLS: Final = "ends the process that reads or parses it, every time"
_LONG: Final = "its prompt is longer than max_prompt_tokens, and has tools or reasoning, or a template as long"


def check_parser(name: str) -> None:
    """Raise UsageError where there is no such parser."""
    if name not in PARSERS:
        raise UsageError(f"--parser: '{name}' is not a parser", fix=f"use {' or '.join(PARSERS)}")


def parser_for(settings: DocumentsSection) -> Parser:
    """Load the parser of these settings; InputMissing, UsageError, BadData or Refused says why it cannot be."""
    check_parser(settings.parser)
    make: Callable[[DocumentsSection], Parser] = resolve_name(PARSERS[settings.parser])
    return make(settings)


@dataclass(frozen=True, kw_only=True, slots=True)
class DocumentsJob:
    """The raw rows of one shard."""

    unit: int
    source: str
    form: str
    columns: dict[str, str]
    rows: list[RawRow]


@dataclass(frozen=True, kw_only=True, slots=True)
class DocumentsStage(Stage):
    """Reads, parses and writes one shard."""

    folder: Path
    settings: DocumentsSection
    spec: Mapping[str, Any]  # not its schema, of which pickle loses which items are never null

    def load(self) -> Make:
        """Load the parser, and the tokenizer that counts prompts, once."""
        parser, encoder = parser_for(self.settings), prompt_encoder(self.settings)
        return lambda job, care: self._make(parser, encoder, job, care)

    def rows(self, job: DocumentsJob) -> int:
        """Rows of a shard."""
        return len(job.rows)

    def paths(self) -> tuple[Path, ...]:
        """The table's folder and the parser's files."""
        s = self.settings
        return local_paths(self.folder, s.spacy_model, s.parser_model, s.prompt_tokenizer)

    def _make(self, parser: Parser, encoder: Encoder | None, job: DocumentsJob, care: MadeDifferently) -> Commit:
        rows = [row for at, row in enumerate(job.rows) if at not in care.lost]
        unused: dict[str, int] = {}
        documents, rejects = read_documents(
            job.source, job.form, job.columns, rows, max_chars=self.settings.max_chars, unused=unused
        )
        killers = [rejected_row(job.source, job.rows[at], WORKER_KILLED, _KILLS) for at in care.lost]
        cut = cut_prompts(documents, encoder, self.settings.max_prompt_tokens)
        whole = {document.line for document, short in zip(documents, cut, strict=True) if short is None}
        too_long = [rejected_row(job.source, row, LONG_PROMPT, _LONG) for row in rows if row.line in whole]
        before, documents = documents, [document for document in cut if document is not None]
        rejects = sorted([*rejects, *killers, *too_long], key=lambda reject: reject.line)
        size = care.batch or max(1, len(documents))
        parsed = [s for at in range(0, len(documents), size) for s in parser.parse(documents[at : at + size])]
        found = [checked_spans(d, s) for d, s in zip(documents, parsed, strict=True)]
        counts = {
            "rows": len(job.rows),
            "characters": sum(len(d.text) for d in documents),
            "words": sum(len(s.words) for s in found),
            "phrases": sum(len(s.phrases) for s in found),
        } | ({PROMPTS_CUT: len(set(map(id, documents)) - set(map(id, before)))} if encoder else {})
        counts.update({f"parser:{reason}": number for reason, number in sorted(parser.notes.items())})
        counts.update({f"{UNUSED}{key}": number for key, number in sorted(unused.items())})
        parser.notes.clear()
        rejected = [asdict(r) for r in rejects]
        columns = columns_of(documents, found)
        return write_shard(self.folder, job.unit, schema_of(self.spec), columns, rejects=rejected, counts=counts)


def open_corpus(documents: DocumentsSection) -> list[Source]:
    """The sources of a run file; UsageError where it names none, BadData where they have no rows."""
    if not documents.corpus:
        raise UsageError("no corpus is named", fix="name files, folders or data sets")
    sources = [open_source(name, form=documents.form, columns=documents.columns) for name in documents.corpus]
    if not any(source.num_rows for source in sources):
        raise BadData("the corpus has no rows", fix="check the paths and the form of the rows")
    return sources


def prompt_encoder(documents: DocumentsSection) -> Encoder | None:
    """What counts the tokens of prompts; None without a limit."""
    if not documents.max_prompt_tokens:
        return None
    if not documents.prompt_tokenizer:
        raise UsageError(
            "documents.max_prompt_tokens is set, and no tokenizer counts them", fix="--prompt-tokenizer STUDENT"
        )
    from xkd_trainer.models.loading import load_tokenizer  # torch, for those alone who set a limit

    tokenizer = load_tokenizer(documents.prompt_tokenizer)
    return Encoder(tokenizer=tokenizer, template=documents.prompt_template, max_tokens=_NO_END)


def cut_prompts(documents: Sequence[Document], encoder: Encoder | None, most: int) -> list[Document | None]:
    """The documents with prompts of at most `most` tokens, None for one that cannot be cut.

    That is one whose template alone is as long, and a chat row with reasoning, tools or calls. A document that the
    tokenizer cannot take stays as it is: the stages that read it say why.
    """
    if encoder is None:
        return list(documents)
    rows = encoder.encode_batch(documents)
    return [_cut(document, row, most) for document, row in zip(documents, rows, strict=True)]


def _cut(document: Document, row: Tokens, most: int) -> Document | None:
    excess = int(np.argmax(row.targets)) - most if row.status == OK else 0
    if excess <= 0:
        return document
    text_T = np.flatnonzero(row.kinds[: most + excess] == CONTENT)
    keep = len(text_T) - excess
    while keep > 0 and row.spans[text_T[keep], 0] < row.spans[text_T[keep - 1], 1]:
        keep -= 1  # pieces of one character stay together
    if document.messages or keep < 1:
        return None
    end = int(row.spans[text_T[keep - 1], 1])
    first = next(segment.start for segment in document.segments if segment.target)
    parts = [
        (s.role, document.text[s.start : s.end if s.start >= first else min(s.end, end)], s.target)
        for s in document.segments
    ]
    return replace(document_of(parts, source=document.source, line=document.line), policy=document.policy)


def columns_of(documents: Sequence[Document], spans: Sequence[Spans]) -> dict[str, list[object]]:
    """Columns of the documents table, one value per document."""
    return {
        "doc_id": [d.doc_id for d in documents],
        "source": [d.source for d in documents],
        "line": [d.line for d in documents],
        "text": [d.text for d in documents],
        "segments": [[(s.start, s.end) for s in d.segments] for d in documents],
        "roles": [[s.role for s in d.segments] for d in documents],
        "targets": [[s.target for s in d.segments] for d in documents],
        "messages": [d.messages for d in documents],
        "words": [s.words for s in spans],
        "phrases": [s.phrases for s in spans],
        "labels": [s.labels for s in spans],
        POLICY: [d.policy for d in documents],
    }


def plan_shards(sources: Sequence[Source], rows_per_shard: int) -> tuple[Unit, ...]:
    """Cut every source into shards by input rows, so that no worker count changes a shard; folders are not named."""
    return tuple(
        Unit(source=Path(source.name).name, first=first, rows=min(rows_per_shard, source.num_rows - first))
        for source in sources
        for first in range(0, source.num_rows, rows_per_shard)
    )


def jobs_of(sources: Sequence[Source], rows_per_shard: int, missing: Iterable[int]) -> Iterator[DocumentsJob]:
    """Jobs in order; each source is read forward once, from the first row that is needed."""
    units = plan_shards(sources, rows_per_shard)
    owners = [number for number, source in enumerate(sources) for _ in plan_shards([source], rows_per_shard)]
    current: tuple[int, int, Iterator[RawRow]] | None = None
    for number in sorted(missing):
        unit, owner = units[number], owners[number]
        source = sources[owner]
        if current is None or current[0] != owner:
            current = (owner, unit.first, source.rows(unit.first))
        _, at, stream = current
        rows = list(islice(stream, unit.first - at + unit.rows))[unit.first - at :]
        current = (owner, unit.first + unit.rows, stream)
        yield DocumentsJob(unit=number, source=unit.source, form=source.form, columns=dict(source.columns), rows=rows)


def make_documents(root: Path, sources: Sequence[Source], settings: DocumentsSection, workers: Workers) -> Built:
    """Make the documents table of `sources`, in shards of `settings.rows_per_shard` rows.

    Raises:
        BadData: More rows than `settings.max_reject` cannot be used, or none can.
        Mismatch: The folder holds documents of another corpus or parser.
    """
    size = settings.rows_per_shard
    units = plan_shards(sources, size)
    total = sum(s.num_rows for s in sources)
    spec: dict[str, Any] = {
        "schema": DOCUMENTS_VERSION,
        "corpus": [
            {"name": Path(s.name).name, "sha256": s.digest, "form": s.form, "columns": dict(s.columns)}
            for s in sources
        ],
        "parser": parser_for(settings).identity(),
        "max_chars": settings.max_chars,
        "rows_per_shard": size,
    }
    if encoder := prompt_encoder(settings):  # without a limit the plan says nothing of it
        identity = {key: value for key, value in encoder.identity().items() if key != "max_tokens"}
        spec["prompts"] = {"tokens": settings.max_prompt_tokens, "name": settings.prompt_tokenizer, **identity}
    if any(POLICY in source.columns for source in sources):
        spec[POLICY] = True
    store = Store(root, "documents", spec, units)
    stage = DocumentsStage(folder=store.folder, settings=settings, spec=spec)

    def watch(commits: Sequence[Commit]) -> None:
        rejected, read = sum(c.rejects.rows for c in commits if c.rejects), sum(units[c.unit].rows for c in commits)
        if rejected > settings.max_reject * total:
            folder = store.folder / "rejects"
            with min(folder.glob("*.jsonl")).open(encoding="utf-8") as lines:
                first = json.loads(next(lines))
            raise BadData(
                f"{rejected} of {read} rows cannot be used ({_reasons(commits)}), more than --max-reject "
                f"{settings.max_reject:g} allows; the first: row {first['line']}, {first['detail']}; all: {folder}",
                kept="every finished shard",
                fix="fix the corpus, or name other columns with --column"
                + f", or accept them with --max-reject {min(1.0, 1.1 * rejected / read):.2g}" * (rejected < read),
            )
        if len(commits) == len(units) and sum(c.rows for c in commits) == 0:
            raise BadData(f"no usable row in {total} ({_reasons(commits)})", fix="check the form of the rows")

    return build(store, stage, lambda missing: jobs_of(sources, size, missing), workers, watch=watch)


def _reasons(commits: Iterable[Commit]) -> str:
    found = Counter[str]()
    for commit in commits:
        found.update(commit.rejects.reasons if commit.rejects else {})
    return ", ".join(f"{reason} {number}" for reason, number in sorted(found.items()))

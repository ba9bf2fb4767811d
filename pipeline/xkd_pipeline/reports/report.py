"""One HTML file about a cache: what it holds, where it comes from, how well it aligns, and its worst documents.

No script, and nothing that is fetched; text of the corpus is the attacker's, and shown as `xkd_schemas.page` does.

Tables are streamed batch by batch; nothing is kept but counts and the worst few. Of a teacher table, whose states are
large, at most SAMPLED_SHARDS shards are read, evenly spaced; the page says so wherever a figure comes from them.

Shape legend for this file
    B documents of one record batch    K aligned spans of the batch, document after document
"""

import heapq
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from xkd_pipeline.reports.render import bracket_phrases, columns_of
from xkd_pipeline.tables.dataset_card import table_states
from xkd_pipeline.tables.shard import document_at
from xkd_schemas.cache.manifest import Manifest
from xkd_schemas.cache.table import Shard, Table, check_cache, sealed_tables
from xkd_schemas.durable_files import bytes_below, inside, replace, sha256_of
from xkd_schemas.errors import BadData, UsageError
from xkd_schemas.page import escape_text, render_page
from xkd_schemas.ragged import lists_of
from xkd_schemas.tokens import OK, TOKEN_FIELDS, tokens_at

WORST: Final = 20  # documents that are drawn
MAX_COLUMNS: Final = 200  # aligned spans of one document that are drawn
MAX_CHARS: Final = 1200  # characters of one document's text, brackets included, that are shown
SAMPLED_SHARDS: Final = 32  # shards of a teacher table that are read at most
MAX_REJECTS: Final = 20  # rejected rows that are shown
MAX_BINS: Final = 24  # bars of a histogram at most

Int64s = npt.NDArray[np.int64]


class Histogram:
    """How often each size was seen; grows with the number of sizes, never with that of things."""

    def __init__(self, title: str, remark: str = "") -> None:
        self.title, self.remark = title, remark
        self._counts = Counter[int]()

    def add(self, sizes: npt.NDArray[Any]) -> None:
        """Count sizes, 0 or more, of any shape."""
        self._counts.update(sizes.ravel().tolist())

    @property
    def bars(self) -> list[tuple[int, int, int]]:
        """(first, last, how many) of equal bins of whole numbers, both ends included, MAX_BINS at most.

        >>> sizes = Histogram("tokens")
        >>> sizes.add(np.array([1, 1, 3]))
        >>> sizes.bars
        [(1, 1, 2), (2, 2, 0), (3, 3, 1)]
        """
        low, high = min(self._counts, default=0), max(self._counts, default=-1)
        step = max(1, -(-(high - low + 1) // MAX_BINS))
        firsts = range(low, high + 1, step)
        return [(at, at + step - 1, sum(self._counts[n] for n in range(at, at + step))) for at in firsts]


class SignalSizes(NamedTuple):
    """Bytes of a teacher's columns."""

    table: str
    signals: list[tuple[str, int]]
    """(signal, bytes) with the largest first; "tokens" stands for ids, intervals and kinds."""
    read: int  # shards that were read
    shards: int


class Alignment(NamedTuple):
    """One student beside its teacher."""

    student: str
    teacher: str
    shapes: dict[str, int]  # 1:1, 1:n, n:1 and n:m (student tokens : teacher tokens) with the number of aligned spans
    spans: int
    worst: list[tuple[float, int]]
    """(share of the document's aligned tokens that stand one to one, row number), the worst first."""


def write_report(root: Path, out: Path) -> dict[str, Any]:
    """Write the report of a cache to `out`, whole or not at all; raises as `gather`."""
    if out.is_dir():
        raise UsageError(f"--out {out} is a folder", fix=f"--out {out / 'report.html'}")
    report = gather(root)
    worst = {alignment.student: list(_draw_worst(root, alignment)) for alignment in report["alignments"]}
    template = Path(__file__).with_name("report.html.j2")
    page = render_page(template, {}, report=report, worst=worst, max_chars=MAX_CHARS, max_columns=MAX_COLUMNS)
    replace(out, page)
    pairs = [(a.teacher, a.student) for a in report["alignments"]]
    return {"report": str(out), "bytes": len(page), "tables": len(report["tables"]), "pairs": pairs}


def _draw_worst(root: Path, alignment: Alignment) -> Iterator[dict[str, Any]]:
    """The worst documents with their phrases in brackets and their tokens over each other."""
    names = ("documents", f"students/{alignment.student}", f"teachers/{alignment.teacher}")
    for share, row in alignment.worst:  # a table for each: no more than three shards are open at a time
        source, student, teacher = (Table(root, name)[row] for name in names)
        document, spans = document_at(source), (student["student_spans"], student["teacher_spans"])
        phrases = [(int(a), int(b)) for a, b in source["phrases"]]
        yield {
            "title": document.doc_id,
            "where": escape_text(f"{document.source}:{document.line}"),
            "share": share,
            "text": escape_text(bracket_phrases(document.text, phrases, source["labels"])),
            "columns": columns_of(document, tokens_at(student), tokens_at(teacher), spans),
        }


def gather(root: Path) -> dict[str, Any]:
    """Read the sealed tables of a cache; what the page shows but for the drawings.

    InputMissing where there is not one, BadData where a shard or manifest is damaged.
    """
    check_cache(root)
    tables = [Table(root, name) for name in sealed_tables(root)]
    documents = tables[0]
    histograms = _measure_documents(documents)
    kept = [_measure_signals(t, histograms) for t in tables[1:] if not t.name.startswith("students/")]
    alignments = [_measure_alignment(t, histograms) for t in tables[1:] if t.name.startswith("students/")]
    manifests = [t.manifest for t in tables]
    reasons = Counter[str]()
    for commit in documents.manifest.commits:
        reasons.update(commit.rejects.reasons if commit.rejects else {})
    unfinished = [state["table"] for state in table_states(root) if not state["sealed"]]
    return {
        "name": root.resolve().name,
        "tables": [(table.manifest, bytes_below(table.folder)) for table in tables],
        "kept": kept,
        "histograms": [histogram for histogram in histograms if histogram.bars],
        "alignments": alignments,
        "reasons": reasons.most_common(),
        "rejects": list(islice(_read_rejects(documents), MAX_REJECTS)),
        "cuts": [cut for m in manifests if not m.table.startswith("signals/") for cut in _count_cuts(m)],
        "codec_errors": [found for m in manifests for found in _codec_errors(m)],
        "remarks": [f"{name} is not finished and is left out" for name in unfinished],
    }


def read_batches(table: Table, units: Sequence[int] | None = None) -> Iterator[tuple[int, pa.RecordBatch]]:
    """(first row, record batch) of the units, every byte checked; a shard is closed before the next is opened."""
    row_offsets = np.cumsum([0, *(c.rows for c in table.manifest.commits)])
    for unit in range(len(table.manifest.commits)) if units is None else units:
        commit = table.manifest.commits[unit]
        shard, at = Shard(table.path(unit), commit), int(row_offsets[unit])
        for number, record in enumerate(commit.batches):
            yield at, shard.batch(number)
            at += record.rows


def _measure_documents(documents: Table) -> list[Histogram]:
    titles = ("words of a document", "phrases of a document", "characters of a phrase")
    words, phrases, lengths = histograms = [Histogram(title) for title in titles]
    for _, batch in read_batches(documents):
        found = lists_of(batch.column("phrases"))
        words.add(lists_of(batch.column("words")).counts)
        phrases.add(found.counts)
        lengths.add(np.diff(found.values, axis=1))
    return histograms


def _measure_signals(table: Table, histograms: list[Histogram]) -> SignalSizes:
    """Bytes of each signal; the sizes of the rows are added to `histograms`."""
    commits = table.manifest.commits
    shards = len(commits)
    units = sorted({int(u) for u in np.linspace(0, shards - 1, min(shards, SAMPLED_SHARDS)).round()})
    remark = f"from {len(units)} of {shards} shards" if len(units) < shards else ""
    tokens, found = Histogram(f"tokens of a document, {table.name}", remark), Counter[str]()
    for _, batch in read_batches(table, units):
        if "token_ids" in batch.schema.names:
            tokens.add(lists_of(batch.column("token_ids")).counts)
        signals = {f.name for f in batch.schema if f.metadata and b"per" in f.metadata}
        for name in batch.schema.names:
            found[_signal(name, signals)] += batch.column(name).nbytes
    histograms.append(tokens)
    scale = sum(c.size for c in commits) / max(1, sum(commits[unit].size for unit in units)) if remark else 1.0
    sized = sorted(((name, round(n * scale)) for name, n in found.items()), key=lambda pair: (-pair[1], pair[0]))
    return SignalSizes(table=table.name, signals=sized, read=len(units), shards=shards)


def _signal(column: str, signals: set[str]) -> str:
    """The signal that a column is or belongs to: a codec may write several columns for one."""
    owners = [name for name in signals if column.startswith(name)]
    if owners:
        return max(owners, key=len)
    return "tokens" if column in {f.name for f in TOKEN_FIELDS} else column


def _measure_alignment(table: Table, histograms: list[Histogram]) -> Alignment:
    titles = ("tokens of a document", "student tokens of an aligned span", "teacher tokens of an aligned span")
    sizes = [Histogram(f"{title}, {table.name}") for title in titles]
    shapes = np.zeros(4, dtype=np.int64)
    worst: list[tuple[float, int]] = []
    for first, batch in read_batches(table):
        spans = [lists_of(batch.column(f"{side}_spans")) for side in ("student", "teacher")]
        ours, theirs = (np.diff(side.values, axis=1)[:, 0] for side in spans)
        for histogram, found in zip(sizes, (lists_of(batch.column("token_ids")).counts, ours, theirs), strict=True):
            histogram.add(found)
        shapes += np.bincount(2 * (ours > 1) + (theirs > 1), minlength=4)
        shares = exact_shares(ours, theirs, spans[0].counts).tolist()
        usable = [at for at, status in enumerate(batch.column("status").to_pylist()) if status == OK]
        worst = heapq.nsmallest(WORST, [*worst, *((shares[at], first + at) for at in usable)])
    histograms += sizes
    return Alignment(
        student=table.name.removeprefix("students/"), teacher=str(table.manifest.spec["teacher"]),
        shapes=dict(zip(("1:1", "1:n", "n:1", "n:m"), shapes.tolist(), strict=True)),
        spans=int(shapes.sum()), worst=worst,
    )  # fmt: skip


def exact_shares(ours_K: npt.NDArray[Any], theirs_K: npt.NDArray[Any], counts_B: Int64s) -> npt.NDArray[np.float64]:
    """[B] share of a document's aligned tokens, both sides, that stand one to one; 0 without any.

    >>> exact_shares(np.array([1, 2, 1]), np.array([1, 2, 1]), np.array([2, 1, 0])).round(3).tolist()
    [0.333, 1.0, 0.0]
    """
    both_K = (ours_K + theirs_K).astype(np.float64)
    owner_K = np.repeat(np.arange(len(counts_B)), counts_B)
    size = len(counts_B)
    all_B = np.bincount(owner_K, both_K, minlength=size)
    exact_B = np.bincount(owner_K, both_K * ((ours_K == 1) & (theirs_K == 1)), minlength=size)
    return np.divide(exact_B, all_B, out=np.zeros(size), where=all_B > 0)


def _read_rejects(documents: Table) -> Iterator[dict[str, str]]:
    for commit in documents.manifest.commits:
        if commit.rejects is not None:
            path = inside(documents.path(commit.unit).parent, "rejects", commit.rejects.file)
            try:
                if sha256_of(path) != commit.rejects.sha256:
                    raise ValueError("it does not match its digest")
                with path.open("rb") as stream:
                    lines = list(islice(stream, MAX_REJECTS))
                yield from ({key: str(value) for key, value in json.loads(line).items()} for line in lines)
            except (OSError, ValueError, AttributeError) as error:
                raise BadData(f"{path} cannot be read: {error}", fix="run xkd-cache documents again") from error


def _count_cuts(manifest: Manifest) -> Iterator[tuple[str, str, int]]:
    titles = {"cut": "cut at the longest length", "cut_below_teacher": "cut before the teacher's cut"}
    titles |= {"extended": "tokens with extended intervals", "extended_documents": "documents with such tokens"}
    for name in sorted({name for c in manifest.commits for name in c.counts}):
        if name.startswith("status:") and name != f"status:{OK}":
            yield manifest.table, f"without tokens: {name.removeprefix('status:')}", manifest.count(name)
        elif name in titles:
            yield manifest.table, titles[name], manifest.count(name)


def _codec_errors(manifest: Manifest) -> Iterator[tuple[str, str, float]]:
    errors = manifest.constants.get("codec_error")
    for signal, error in sorted(errors.items()) if isinstance(errors, dict) else ():
        yield manifest.table, str(signal), float(error)

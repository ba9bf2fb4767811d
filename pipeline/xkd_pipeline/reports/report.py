"""What a cache holds, as plain data for a page: streamed batch by batch, nothing kept but counts and the worst few.

The documents and students tables are read whole. Of a teacher table, whose states are large, at most SAMPLED_SHARDS
shards are read, evenly spaced; the page says so wherever a figure comes from them.

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

from xkd_pipeline.tables.dataset_card import table_states
from xkd_schemas.cache.manifest import Manifest
from xkd_schemas.cache.table import Shard, Table, check_cache, sealed_tables
from xkd_schemas.durable_files import bytes_below, inside, sha256_of
from xkd_schemas.errors import BadData
from xkd_schemas.tokens import OK, TOKEN_FIELDS

WORST: Final = 20
"""Documents that are drawn."""
SAMPLED_SHARDS: Final = 32
"""Shards of a teacher table that are read at most."""
MAX_REJECTS: Final = 20
"""Rejected rows that are shown."""
MAX_BINS: Final = 24
"""Bars of a histogram at most."""

Int64s = npt.NDArray[np.int64]


class Histogram(NamedTuple):
    """How many things have a size between first and last, both included."""

    title: str
    bars: tuple[tuple[int, int, int], ...]
    """(first, last, how many), without a hole."""
    remark: str = ""


class SignalSizes(NamedTuple):
    """Bytes of a teacher's columns."""

    table: str
    signals: tuple[tuple[str, int], ...]
    """(signal, bytes) with the largest first; "tokens" stands for ids, intervals and kinds."""
    read: int
    """Shards that were read."""
    shards: int


class Alignment(NamedTuple):
    """One student beside its teacher."""

    student: str
    teacher: str
    shapes: tuple[tuple[str, int], ...]
    """1:1, 1:n, n:1 and n:m (student tokens : teacher tokens) with the number of aligned spans."""
    spans: int
    worst: tuple[tuple[float, int], ...]
    """(share of the document's aligned tokens that stand one to one, row number), the worst first."""


class Sizes:
    """How often each size was seen; grows with the largest size, never with the number of things."""

    def __init__(self) -> None:
        self.counts: Int64s = np.zeros(0, dtype=np.int64)

    def add(self, sizes: npt.NDArray[Any]) -> None:
        """Count sizes, 0 or more, of any shape."""
        seen = np.bincount(np.asarray(sizes, dtype=np.int64).ravel(), minlength=len(self.counts))
        seen[: len(self.counts)] += self.counts
        self.counts = seen

    def histogram(self, title: str, remark: str = "") -> Histogram:
        """Equal bins of whole numbers, MAX_BINS at most.

        >>> sizes = Sizes()
        >>> sizes.add(np.array([1, 1, 3]))
        >>> sizes.histogram("tokens").bars
        ((1, 1, 2), (2, 2, 0), (3, 3, 1))
        """
        seen = np.flatnonzero(self.counts)
        if not len(seen):
            return Histogram(title=title, bars=(), remark=remark)
        low, high = int(seen[0]), int(seen[-1])
        step = -(-(high - low + 1) // MAX_BINS)
        bars = [(at, at + step - 1, int(self.counts[at : at + step].sum())) for at in range(low, high + 1, step)]
        return Histogram(title=title, bars=tuple(bars), remark=remark)


def gather(root: Path) -> dict[str, Any]:
    """Read the sealed tables of a cache; what the page shows but for the drawings.

    Raises:
        InputMissing: No folder, or not one sealed table in it.
        BadData: A shard or manifest is damaged.
    """
    check_cache(root)
    tables = [Table(root, name) for name in sealed_tables(root)]
    documents = tables[0]
    histograms, kept, alignments = _measure_documents(documents), [], []
    for table in tables[1:]:
        if table.name.startswith(("teachers/", "signals/")):
            kept.append(_measure_signals(table, histograms))
        else:
            alignments.append(_measure_alignment(table, histograms))
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


def _lengths(batch: pa.RecordBatch, column: str) -> Int64s:
    """[B] entries of a list column in each document."""
    lengths: Int64s = np.diff(batch.column(column).offsets.to_numpy()).astype(np.int64)
    return lengths


def _pairs(batch: pa.RecordBatch, column: str) -> npt.NDArray[np.int32]:
    """[K, 2] of all documents of the batch, one after the other."""
    pairs: npt.NDArray[np.int32] = batch.column(column).flatten().flatten().to_numpy().reshape(-1, 2)
    return pairs


def _measure_documents(documents: Table) -> list[Histogram]:
    words, phrases, lengths = Sizes(), Sizes(), Sizes()
    for _, batch in read_batches(documents):
        words.add(_lengths(batch, "words"))
        phrases.add(_lengths(batch, "phrases"))
        lengths.add(np.diff(_pairs(batch, "phrases"), axis=1))
    return [
        words.histogram("words of a document"),
        phrases.histogram("phrases of a document"),
        lengths.histogram("characters of a phrase"),
    ]


def _measure_signals(table: Table, histograms: list[Histogram]) -> SignalSizes:
    """Bytes of each signal; the sizes of the rows are added to `histograms`."""
    shards = len(table.manifest.commits)
    units = sorted({int(u) for u in np.linspace(0, shards - 1, min(shards, SAMPLED_SHARDS)).round()}) if shards else []
    tokens, found = Sizes(), Counter[str]()
    for _, batch in read_batches(table, units):
        if "token_ids" in batch.schema.names:
            tokens.add(_lengths(batch, "token_ids"))
        signals = {f.name for f in batch.schema if f.metadata and b"per" in f.metadata}
        for name in batch.schema.names:
            found[_signal(name, signals)] += batch.column(name).nbytes
    part = sum(table.manifest.commits[unit].size for unit in units)
    scale = sum(c.size for c in table.manifest.commits) / part if len(units) < shards else 1.0
    remark = f"from {len(units)} of {shards} shards" if len(units) < shards else ""
    histograms.append(tokens.histogram(f"tokens of a document, {table.name}", remark))
    sized = sorted(((name, round(n * scale)) for name, n in found.items()), key=lambda pair: (-pair[1], pair[0]))
    return SignalSizes(table=table.name, signals=tuple(sized), read=len(units), shards=shards)


def _signal(column: str, signals: set[str]) -> str:
    """The signal that a column is or belongs to: a codec may write several columns for one."""
    owners = [name for name in signals if column.startswith(name)]
    if owners:
        return max(owners, key=len)
    return "tokens" if column in {f.name for f in TOKEN_FIELDS} else column


def _measure_alignment(table: Table, histograms: list[Histogram]) -> Alignment:
    tokens, ours_, theirs_ = Sizes(), Sizes(), Sizes()
    shapes = np.zeros(4, dtype=np.int64)
    worst: list[tuple[float, int]] = []
    for first, batch in read_batches(table):
        tokens.add(_lengths(batch, "token_ids"))
        ours, theirs = (np.diff(_pairs(batch, f"{side}_spans"), axis=1)[:, 0] for side in ("student", "teacher"))
        ours_.add(ours)
        theirs_.add(theirs)
        shapes += np.bincount(2 * (ours > 1) + (theirs > 1), minlength=4)
        usable = np.array([status == OK for status in batch.column("status").to_pylist()], dtype=bool)
        shares = exact_shares(ours, theirs, _lengths(batch, "student_spans"))
        candidates = [(float(shares[row]), first + int(row)) for row in np.flatnonzero(usable)]
        worst = heapq.nsmallest(WORST, [*worst, *candidates])
    histograms += [
        tokens.histogram(f"tokens of a document, {table.name}"),
        ours_.histogram(f"student tokens of an aligned span, {table.name}"),
        theirs_.histogram(f"teacher tokens of an aligned span, {table.name}"),
    ]
    named = tuple(zip(("1:1", "1:n", "n:1", "n:m"), map(int, shapes), strict=True))
    return Alignment(
        student=table.name.removeprefix("students/"), teacher=str(table.manifest.spec["teacher"]), shapes=named,
        spans=int(shapes.sum()), worst=tuple(worst),
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


def flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted name, text) of every leaf.

    >>> list(flatten({"a": {"b": 1}, "c": ["x", {"d": None}]}))
    [('a.b', '1'), ('c.0', 'x'), ('c.1.d', 'null')]
    """
    if isinstance(value, list) and all(not isinstance(item, dict | list) for item in value) and prefix.count(".") == 1:
        value = ", ".join(map(str, value)) or "none"
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if items is None:
        yield prefix.rstrip("."), value if isinstance(value, str) else json.dumps(value)
        return
    for key, item in items:
        yield from flatten(item, f"{prefix}{key}.")


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

"""The plain data that a report is drawn from."""

from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt

MAX_BINS: Final = 24
"""Bars of a histogram at most."""

Int64s = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Histogram:
    """How many things have a size between first and last, both included."""

    title: str
    bars: tuple[tuple[int, int, int], ...]
    """(first, last, how many), without a hole."""
    remark: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """One sealed table."""

    name: str
    documents: int
    shards: int
    num_bytes: int
    """Of its whole folder."""
    counts: dict[str, int]
    spec: tuple[tuple[str, str], ...]
    """(dotted field, value) of everything that the bytes depend on."""
    constants: tuple[tuple[str, str], ...]
    root: str
    spec_id: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Kept:
    """Bytes of a teacher's columns."""

    table: str
    signals: tuple[tuple[str, int], ...]
    """(signal, bytes) with the largest first; "tokens" stands for ids, intervals and kinds."""
    read: int
    shards: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Alignment:
    """One student beside its teacher."""

    student: str
    teacher: str
    shapes: tuple[tuple[str, int], ...]
    """1:1, 1:n, n:1 and n:m (student tokens : teacher tokens) with the number of aligned spans."""
    spans: int
    worst: tuple[tuple[float, int], ...]
    """(share of the document's aligned tokens that stand one to one, row number), the worst first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """All that the page shows except the drawings."""

    name: str
    tables: tuple[Summary, ...]
    kept: tuple[Kept, ...]
    histograms: tuple[Histogram, ...]
    alignments: tuple[Alignment, ...]
    reasons: tuple[tuple[str, int], ...]
    rejects: tuple[dict[str, str], ...]
    cuts: tuple[tuple[str, str, int], ...]
    """(table, what happened to the documents, how many)"""
    codec_errors: tuple[tuple[str, str, float], ...]
    """(table, signal, error)"""
    remarks: tuple[str, ...] = ()


@dataclass(slots=True)
class Sizes:
    """How often each size was seen; grows with the largest size, never with the number of things."""

    counts: Int64s = field(default_factory=lambda: np.zeros(0, dtype=np.int64))

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

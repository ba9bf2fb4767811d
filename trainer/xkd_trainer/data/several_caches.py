"""Several caches read as one.

Those of one teacher are put one behind the other: `--shards a/ --shards b/=2`. Those of the same documents are joined
by row, and each brings the signals of its teacher.
"""

import functools
import math
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from xkd_schemas.cache.manifest import refuse_differences
from xkd_schemas.errors import UsageError
from xkd_schemas.signals import Signal
from xkd_schemas.tokens import Int64s
from xkd_trainer.data.cache import Cache, Constants, plain_column


def parse_shards(text: str) -> tuple[Path, str, float]:
    """Folder, student table and weight of one `--shards`, FOLDER:TABLE=WEIGHT; a folder of that very name goes first.

    >>> parse_shards("a/"), parse_shards("b:S=0.5")
    ((PosixPath('a'), '', 1.0), (PosixPath('b'), 'S', 0.5))

    Raises:
        UsageError: The weight is not a number above 0.
    """
    root, equals, number = text.rpartition("=")
    if not equals or Path(text).is_dir():
        return *folder_and_table(text), 1.0
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not (root and 0 < weight < math.inf):
        raise UsageError(f"--shards {text}: {number!r} is not a weight above 0", fix="e.g. --shards cache/=2")
    return *folder_and_table(root), weight


def folder_and_table(text: str) -> tuple[Path, str]:
    """A cache folder, and the student table that is named behind a colon; a folder of that very name goes first."""
    root, colon, table = text.rpartition(":")
    return (Path(root), table) if colon and not Path(text).is_dir() else (Path(text), "")


class CacheUnion(Cache):
    """What a `Cache` is, over several; rows are numbered through, and tables are those of the first.

    `weights` say how often the documents of each are seen in an epoch.

    Raises:
        Mismatch: The caches are not of one teacher and one student tokenization; every differing field is named.
    """

    def __init__(self, caches: Sequence[Cache], weights: Sequence[float]) -> None:
        self.caches, self.weights = tuple(caches), tuple(weights)
        first = self.caches[0]
        self._read_as(first)
        for other in self.caches[1:]:
            advice = f"make both with the same settings; several teachers have to read the documents of {first.root}"
            both = {plain_column(s) for s in first.signals} & {plain_column(s) for s in other.signals}
            refuse_differences(other.root, _of_teacher(first, both), _of_teacher(other, both), advice=advice)
        self._firsts = [0, *accumulate(len(cache.students) for cache in caches)]
        self._shares = [round(w * len(cache.usable)) for w, cache in zip(weights, caches, strict=True)]

    def at(self, row: int) -> tuple[Cache, int]:
        """The cache that holds a row of the union, and the row's number there."""
        number = int(np.searchsorted(self._firsts, row, side="right")) - 1
        return self.caches[number], row - self._firsts[number]

    @cached_property
    def usable(self) -> Int64s:
        """Rows that the student can be trained on, ascending."""
        return np.concatenate([f + cache.usable for f, cache in zip(self._firsts, self.caches, strict=False)])

    def rows(self, epoch: int, seed: int) -> Int64s:
        """The rows of one epoch: each cache's as many whole times as its weight says, and a drawn part."""
        found = []
        for number, (cache, share) in enumerate(zip(self.caches, self._shares, strict=True)):
            usable = self._firsts[number] + cache.usable
            whole, part = divmod(share, max(1, len(usable)))
            drawn = np.random.Generator(np.random.PCG64([seed, epoch, number])).permutation(usable)[:part]
            found += [*[usable] * whole, drawn]
        return np.concatenate(found)

    @cached_property
    def signals(self) -> tuple[Signal, ...]:
        """What is stored of the teacher in every cache."""
        common = set.intersection(*(set(cache.signals) for cache in self.caches))
        return tuple(signal for signal in self.caches[0].signals if signal in common)

    @property
    def sizes(self) -> Constants:
        """Those of the teacher; the deviation of its states is over the documents of all caches."""
        each, shares = [cache.sizes for cache in self.caches], np.array(self._shares, np.float64)
        hidden_std = math.sqrt(sum(shares * [s.hidden_std**2 for s in each]) / shares.sum())
        return each[0].model_copy(update={"hidden_std": hidden_std})

    def identity(self, wanted: Iterable[Signal]) -> Any:
        """What names the rows and signals of a run: that of each cache, and its weight."""
        signals = tuple(wanted)
        return [[cache.identity(signals), w] for cache, w in zip(self.caches, self.weights, strict=True)]


class CacheJoin(Cache):
    """Caches of the same documents, each with a teacher: the tables are those of the first, the rows those of all.

    `weights` multiply the losses of each teacher, `wanted` are the signals that these read. Documents that a teacher
    could not read, or that the teachers' limits cut at different places, are left out.

    Raises:
        Mismatch: The student's tokenizer or template is not the same in all.
    """

    def __init__(self, caches: Sequence[Cache], weights: Sequence[float], wanted: Sequence[frozenset[Signal]]) -> None:
        self.caches, self.weights, self.wanted = tuple(caches), tuple(weights), tuple(wanted)
        first = self.caches[0]
        self._read_as(first)
        self.others = tuple(zip(self.caches[1:], self.wanted[1:], strict=True))
        for other, _ in self.others:
            ours, theirs = ({"student": cache.students.manifest.spec["encoder"]} for cache in (first, other))
            refuse_differences(other.root, ours, theirs, advice="align both with the same --student and --template")

    @property
    def by_teacher(self) -> dict[str, tuple[Cache, float]]:
        """By the name of the teacher's table, with `_` for a dot, and `#2` behind that of the second of one name."""
        names = [cache.teacher_name.replace(".", "_") for cache in self.caches]
        before = [names[:place].count(name) for place, name in enumerate(names)]
        labels = [f"{name}#{count + 1}" if count else name for name, count in zip(names, before, strict=True)]
        return dict(zip(labels, zip(self.caches, self.weights, strict=True), strict=True))

    @cached_property
    def usable(self) -> Int64s:
        """Rows that all teachers have read, and whose student tokens are the same in all caches, ascending."""
        common = functools.reduce(np.intersect1d, (cache.usable for cache in self.caches))
        return np.setdiff1d(common, np.array([*self._cut_differently()], np.int64), assume_unique=True)

    def _cut_differently(self) -> Iterator[int]:
        """Rows with other student tokens in one of the caches; reads only shards with another number of tokens."""
        first = 0
        for commits in zip(*(cache.students.manifest.commits for cache in self.caches), strict=True):
            if len({(commit.counts["tokens"], commit.unusable) for commit in commits}) > 1:
                for row in range(first, first + commits[0].rows):
                    ids, *others = (cache.students[row]["token_ids"] for cache in self.caches)
                    if not all(np.array_equal(ids, other) for other in others):
                        yield row
            first += commits[0].rows

    def identity(self, wanted: Iterable[Signal]) -> Any:
        """What names the rows and signals of a run: that of each teacher's cache, and its weight."""
        each = zip(self.caches, self.wanted, self.weights, strict=True)
        return {"teachers": [[cache.identity(signals), weight] for cache, signals, weight in each]}


def _of_teacher(cache: Cache, columns: set[str]) -> dict[str, Any]:
    teacher = cache.teachers.manifest
    return {
        "teacher": {key: teacher.spec[key] for key in ("weights", "encoder")},
        "head": teacher.files.get("head.safetensors", "absent"),
        "classes": {plain_column(s): s.top for s in cache.signals if s.top and plain_column(s) in columns},
        "student": {"encoder": cache.students.manifest.spec["encoder"]},
    }

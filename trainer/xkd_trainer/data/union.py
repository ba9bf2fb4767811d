"""Several caches of one teacher, read as one: `--shards a/ --shards b/=2`.

Rows of the union are numbered through: those of the first cache, then those of the second, and so on.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from xkd_schemas.cache.manifest import refuse_differences
from xkd_schemas.errors import UsageError
from xkd_schemas.signals import Signal
from xkd_schemas.tokens import Bools, Int32s
from xkd_trainer.data.cache import Cache, TeacherSizes

Int64s = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Shards:
    """One `--shards`: a cache folder, and how often its documents are seen in an epoch."""

    root: Path
    weight: float = 1.0


def parse_shards(text: str) -> Shards:
    """`FOLDER` or `FOLDER=WEIGHT`; a folder of that very name goes first.

    >>> parse_shards("a/"), parse_shards("b=0.5").weight
    (Shards(root=PosixPath('a'), weight=1.0), 0.5)

    Raises:
        UsageError: The weight is not a number above 0.
    """
    root, equals, number = text.rpartition("=")
    if not equals or Path(text).is_dir():
        return Shards(Path(text))
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not (root and 0 < weight < math.inf):
        raise UsageError(f"--shards {text}: {number!r} is not a weight above 0", fix="e.g. --shards cache/=2")
    return Shards(Path(root), weight)


class CacheUnion(Cache):
    """What a `Cache` is, over several of them; `teachers` and `students` are the tables of the first.

    Raises:
        Mismatch: The caches are not of one teacher and one student tokenization; every differing field is named.
        UsageError: One cache is named twice.
    """

    def __init__(self, caches: Sequence[Cache], weights: Sequence[float]) -> None:
        self.caches, self.weights = tuple(caches), tuple(weights)
        first = self.caches[0]
        self.root, self.teacher_name, self.beside = first.root, first.teacher_name, first.beside
        self.documents, self.teachers, self.students = first.documents, first.teachers, first.students
        roots = [cache.students.manifest.root for cache in caches]
        if twice := [cache.root for cache, root in zip(caches, roots, strict=True) if roots.count(root) > 1]:
            raise UsageError(
                f"--shards: {twice[0]} and {twice[-1]} are the same cache", fix="give it once, as CACHE=2"
            )
        for other in self.caches[1:]:
            advice = f"train on caches that `xkd-cache teacher` and `align` made with the settings of {first.root}"
            refuse_differences(other.root, _of_teacher(first), _of_teacher(other), advice=advice)
        self._firsts = [0, *accumulate(len(cache.students) for cache in caches)]

    def at(self, row: int) -> tuple[Cache, int]:
        """The cache that holds a row of the union, and the row's number there."""
        number = int(np.searchsorted(self._firsts, row, side="right")) - 1
        return self.caches[number], row - self._firsts[number]

    @cached_property
    def usable(self) -> Int64s:
        """Rows that the student can be trained on, ascending."""
        return np.concatenate([f + cache.usable for f, cache in zip(self._firsts, self.caches, strict=False)])

    @property
    def size(self) -> int:
        """Documents of an epoch: those of each cache, times its weight."""
        return sum(self._shares())

    def _shares(self) -> list[int]:
        return [round(w * len(cache.usable)) for w, cache in zip(self.weights, self.caches, strict=True)]

    def rows(self, epoch: int, seed: int) -> Int64s:
        """The rows of one epoch, [size]: each cache's as many whole times as its weight says, and a drawn part."""
        found = []
        for number, (cache, share) in enumerate(zip(self.caches, self._shares(), strict=True)):
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

    def rows_of_student(self, most: int) -> Iterator[tuple[Int32s, npt.NDArray[np.uint8], Bools]]:
        """Ids, kinds and targets of the first usable rows of each cache."""
        for cache in self.caches:
            yield from cache.rows_of_student(most // len(self.caches))

    def same_tokens(self) -> tuple[int, int]:
        """How many usable rows have the same token ids in both tables, and how many usable rows there are."""
        counts = [cache.same_tokens() for cache in self.caches]
        return sum(equal for equal, _ in counts), sum(rows for _, rows in counts)

    @property
    def sizes(self) -> TeacherSizes:
        """Those of the teacher; the deviation of its states is over the documents of all caches."""
        each = [cache.sizes for cache in self.caches]
        shares = np.array(self._shares(), np.float64)
        hidden_std = math.sqrt(sum(shares * [s.hidden_std**2 for s in each]) / shares.sum())
        return replace(each[0], hidden_std=hidden_std)

    def identity(self, wanted: Iterable[Signal]) -> Any:
        """What names the rows and signals of a run: that of each cache, and its weight."""
        signals = tuple(wanted)
        return [[cache.identity(signals), w] for cache, w in zip(self.caches, self.weights, strict=True)]

    def require(self, loss: str, needed: tuple[Signal, ...]) -> None:
        """UsageError that names what `loss` needs and one of the caches lacks, with the command that adds it."""
        for cache in self.caches:
            cache.require(loss, needed)


def _of_teacher(cache: Cache) -> dict[str, Any]:
    """What must be the same in caches that are read as one."""
    teacher, student = cache.teachers.manifest, cache.students.manifest.spec
    return {
        "teacher": {key: teacher.spec[key] for key in ("weights", "encoder")},
        "head": teacher.files.get("head.safetensors", "absent"),
        "classes": {replace(s, top=None).column: s.top for s in cache.signals if s.top},
        "student": {"encoder": student["encoder"]},
    }

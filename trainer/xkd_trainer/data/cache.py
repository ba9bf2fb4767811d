"""The cache as the trainer sees it: three tables joined by row number, fingerprints checked, heads read once."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import safe_open
from torch import Tensor

from xkd_schemas.cache.manifest import Plan, differences, read_record, refuse_differences
from xkd_schemas.cache.table import Table, check_cache, names_in
from xkd_schemas.config import TeacherSection
from xkd_schemas.documents import DOCUMENTS_READ, DOCUMENTS_VERSION
from xkd_schemas.durable_files import inside, sha256_of
from xkd_schemas.errors import BadData, InputMissing, Mismatch, UsageError
from xkd_schemas.signals import KINDS, TEACHERS_VERSION, Signal, signal_named
from xkd_schemas.tokens import STUDENTS_VERSION, Bools, Int32s
from xkd_trainer.models.compute_dtype import dtype_named
from xkd_trainer.models.head import Head


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherSizes:
    """What is known of the teacher without its weights."""

    name: str
    num_layers: int
    hidden_size: int
    vocab_size: int
    hidden_std: float
    """Standard deviation of the states that predict targets: N(x) of DWA-KD."""
    embedding_std: float


class Cache:
    """Documents, one teacher and one student tokenization, row by row.

    Raises:
        InputMissing: The folder or a table is not there.
        Mismatch: The tables were not made from each other, or by a newer program.
        UsageError: Several tables could be meant and none was named.
    """

    def __init__(self, root: Path, *, student: str) -> None:
        self.root = root
        self.documents = Table(root, "documents")
        self.students = Table(root, f"students/{student}")
        self.teacher_name = str(self.students.manifest.spec["teacher"])
        further = (Table(root, f"signals/{name}") for name in names_in(root, "signals"))
        self.beside = [table for table in further if table.manifest.spec["teacher"] == self.teacher_name]
        self.teachers = Table(root, f"teachers/{self.teacher_name}", self.beside)
        self._check_origin(student)

    def _check_origin(self, student: str) -> None:
        documents, teachers, spec = self.documents.manifest, self.teachers.manifest, self.students.manifest.spec
        found = {
            "documents": spec["documents"],
            "teacher_root": spec["teacher_root"],
            "teacher documents": teachers.spec["documents"],
        }
        made_from = {
            "documents": documents.root,
            "teacher_root": teachers.root,
            "teacher documents": documents.root,
        }
        for table in self.beside:
            other = table.manifest.spec
            found |= {f"{table.name} {key}": other[key] for key in ("documents", "weights", "encoder")}
            made_from |= {f"{table.name} {key}": teachers.spec[key] for key in ("weights", "encoder")}
            made_from[f"{table.name} documents"] = documents.root
        again = f"xkd-cache align {self.root} --student ... --name {student}-2"
        refuse_differences(self.students.folder, made_from, found, advice=again)
        versions = {"documents": DOCUMENTS_VERSION, "teachers": TEACHERS_VERSION, "students": STUDENTS_VERSION}
        stored = {name: getattr(self, name).manifest.spec["schema"] for name in versions}
        if stored["documents"] in DOCUMENTS_READ:
            versions["documents"] = stored["documents"]
        refuse_differences(self.root, versions, stored, advice="use the xkd-toolkit version that wrote the cache")

    @cached_property
    def usable(self) -> npt.NDArray[np.int64]:
        """Rows that the student can be trained on, ascending."""
        first, bad = 0, []
        for commit in self.students.manifest.commits:
            bad += [first + row for row in commit.unusable]
            first += commit.rows
        return np.setdiff1d(np.arange(first, dtype=np.int64), np.array(bad, dtype=np.int64), assume_unique=True)

    @property
    def size(self) -> int:
        """Documents of an epoch."""
        return len(self.usable)

    def rows(self, epoch: int, seed: int) -> npt.NDArray[np.int64]:
        """The rows of one epoch, [size]; here the same in each."""
        return self.usable

    def at(self, row: int) -> tuple["Cache", int]:
        """The cache that holds a row, and the row's number there; see `CacheUnion`."""
        return self, row

    @cached_property
    def signals(self) -> tuple[Signal, ...]:
        """What is stored of the teacher."""
        tables = (self.teachers, *self.beside)
        found = [signal_named(column) for table in tables for column in table.manifest.spec["signals"]]
        return tuple(sorted(found, key=lambda signal: signal.top or 0))  # readers take the last: the most classes

    def rows_of_student(self, most: int) -> Iterator[tuple[Int32s, npt.NDArray[np.uint8], Bools]]:
        """Ids, kinds and targets of the first usable rows."""
        for row in map(self.students.__getitem__, self.usable[:most]):
            yield row["token_ids"], row["token_kinds"], row["targets"]

    def same_tokens(self) -> tuple[int, int]:
        """How many usable rows have the same token ids in both tables, and how many usable rows there are."""
        equal = [np.array_equal(self.students[r]["token_ids"], self.teachers[r]["token_ids"]) for r in self.usable]
        return sum(equal), len(equal)

    @property
    def sizes(self) -> TeacherSizes:
        """Sizes and constants of the teacher."""
        c = self.teachers.manifest.constants
        for table in self.beside:
            c = c | {key: value for key, value in table.manifest.constants.items() if key == "hidden_std"}
        return TeacherSizes(
            name=self.teacher_name,
            num_layers=int(c["num_layers"]),
            hidden_size=int(c["hidden_size"]),
            vocab_size=int(c["vocab_size"]),
            hidden_std=float(c["hidden_std"]),
            embedding_std=float(c["embedding_std"]),
        )

    def identity(self, wanted: Iterable[Signal]) -> str | list[str]:
        """What names the rows and signals of a run: the student's root, and those of further tables it reads."""
        columns = {replace(signal, top=None).column for signal in wanted}
        read = [t for t in self.beside if any(_plain(c) in columns for c in t.manifest.spec["signals"])]
        root = self.students.manifest.root
        return [root, *(table.manifest.root for table in read)] if read else root

    def require(self, loss: str, needed: tuple[Signal, ...]) -> None:
        """UsageError that names what `loss` needs and the cache lacks, with the command that adds it."""
        missing = sorted({s.column for s in needed} - {replace(s, top=None).column for s in self.signals})
        if missing:
            raise UsageError(
                f"loss {loss} needs {', '.join(missing)}, which {self.teachers.folder} does not hold "
                f"(it holds {', '.join(s.column for s in self.signals)})",
                fix=f"xkd-cache add {self.root} --model PATH_OF_{self.teacher_name} --to {self.teacher_name} "
                f"--signals {','.join(column + _usual_number(column) for column in missing)}",
            )

    def check_tokenizer(self, identity: dict[str, str]) -> None:
        """Mismatch where the student's tokenizer is not the one the cache was aligned for."""
        stored: dict[str, Any] = self.students.manifest.spec["encoder"]["tokenizer"]
        theirs = {key: stored.get(key, "absent") for key in identity}
        refuse_differences(
            self.students.folder, identity, theirs, advice=f"xkd-cache align {self.root} --student YOUR_STUDENT"
        )

    def head(self) -> Head:
        """The teacher's head, in the dtype that the teacher ran in."""
        c = self.teachers.manifest.constants
        tensors = self._tensors("head.safetensors")
        return Head(
            weight_VD=tensors["weight"],
            bias_V=tensors.get("bias"),
            scale=float(c["logit_scale"]),
            softcap=None if c["softcap"] is None else float(c["softcap"]),
        )

    def embeddings(self) -> Tensor:
        """The teacher's input embeddings, [V, D], in the dtype that the teacher ran in."""
        tied = bool(self.teachers.manifest.constants["tied"])
        return self._tensors("head.safetensors" if tied else "embeddings.safetensors")["weight"]

    def _mending(self) -> str:
        return f"xkd-cache repair {self.root} --model PATH_OF_{self.teacher_name}"

    def _tensors(self, name: str) -> dict[str, Tensor]:
        path = inside(self.teachers.folder, name)
        wanted = self.teachers.manifest.files.get(name)
        dtype = dtype_named(self.teachers.manifest.spec["dtype"])  # files hold 16 bits where those are enough
        try:
            if sha256_of(path) != wanted:
                raise BadData(f"{path} does not match its digest", fix=self._mending())
            with safe_open(path, framework="pt") as file:
                return {key: file.get_tensor(key).to(dtype) for key in file.keys()}  # noqa: SIM118 - not a mapping
        except OSError as error:
            raise BadData(f"{path}: {error.strerror}", fix=self._mending()) from error

    def same_document(self, row: int) -> None:
        """BadData where the three tables do not hold the same document at `row`."""
        ids = {table.name: table[row]["doc_id"] for table in (self.documents, self.teachers, self.students)}
        if len(set(ids.values())) != 1:
            raise BadData(f"{self.root}: row {row} is another document in each table: {json.dumps(ids)}")


def _plain(column: str) -> str:
    return replace(signal_named(column), top=None).column


def _usual_number(column: str) -> str:
    """How many classes are kept of a prediction where nobody says it."""
    usual, kind = TeacherSection(), KINDS[column.partition("@")[0]]
    return f"#{usual.samples if kind.drawn else usual.topk}" if kind.top else ""


def find_student(root: Path, identity: dict[str, str], name: str) -> str:
    """The student table to use: the one named, or the only one made with this tokenizer.

    InputMissing where there is none at all, Mismatch where none was made with this tokenizer, UsageError for several.
    """
    check_cache(root)
    names = names_in(root, "students")
    if name:
        if name not in names:
            raise InputMissing(f"{root} has no students table {name!r}; it has {', '.join(names) or 'none'}")
        return name
    if not names:
        raise InputMissing(f"{root} has no finished students table", fix=f"xkd-cache align {root} --student ...")
    differing: dict[str, list[str]] = {}
    for candidate in names:
        plan = read_record(inside(root, "students", candidate, "plan.json"), Plan)  # as the manifest, and shorter
        stored = plan.spec["encoder"]["tokenizer"]
        theirs = {key: stored.get(key, "absent") for key in identity}
        differing[candidate] = [field for field, _, _ in differences(identity, theirs)]
    fitting = [candidate for candidate, fields in differing.items() if not fields]
    if not fitting:
        listed = "; ".join(f"students/{name} has another {', '.join(fields)}" for name, fields in differing.items())
        raise Mismatch(
            f"{root} was not aligned for this student's tokenizer: {listed}",
            kept="the cache as it is",
            fix=f"xkd-cache align {root} --student YOUR_STUDENT",
        )
    if len(fitting) > 1:
        raise UsageError(f"{', '.join(fitting)} all fit this student", fix="choose one with --student-table NAME")
    return fitting[0]


def layers_of(signals: tuple[Signal, ...]) -> list[tuple[int, str]]:
    """(layer, unit) of the span signals that are stored, lowest layer first."""
    found = {(s.layer, s.unit) for s in signals if KINDS[s.name].unit}
    return sorted((layer, unit) for layer, unit in found if layer is not None and unit is not None)

"""The cache as the trainer sees it: three tables joined by row number, fingerprints checked, heads read once."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any, Final, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from xkd_schemas.cache.manifest import Plan, differences, read_record, refuse_differences
from xkd_schemas.cache.table import Table, check_cache, names_in
from xkd_schemas.codecs import CODECS
from xkd_schemas.config import TeacherSection
from xkd_schemas.documents import DOCUMENTS_READ, DOCUMENTS_VERSION, schema_of
from xkd_schemas.durable_files import inside, sha256_of
from xkd_schemas.errors import BadData, InputMissing, Mismatch, UsageError
from xkd_schemas.signals import TEACHERS_VERSION, Signal, signal_named, signals_schema, teacher_schema
from xkd_schemas.tokens import STUDENTS, STUDENTS_VERSION, Int64s, Tokens, tokens_at
from xkd_trainer.models.architecture import Head
from xkd_trainer.models.compute_dtype import dtype_named

Size = Annotated[int, Field(gt=0, lt=2**31)]
Model = TypeVar("Model", bound=BaseModel)


class Constants(BaseModel):
    """What a trainer must know of the teacher."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    num_layers: Size
    hidden_size: Size
    vocab_size: Size  # rows of the head
    logit_scale: float
    softcap: float | None
    tied: bool  # the embeddings are the head
    hidden_std: float = Field(ge=0)  # of the states that predict targets: N(x) of DWA-KD
    embedding_std: float = Field(ge=0)


SERVED: Final = {
    "num_layers": 1, "hidden_size": 1, "logit_scale": 1.0, "softcap": None, "tied": False, "hidden_std": 1.0,
    "embedding_std": 1.0,
}  # fmt: skip
"""Constants of a teacher whose weights were never here. No loss that it serves reads them."""


class _Encoder(BaseModel):
    tokenizer: dict[str, Any]
    template: str
    max_tokens: int
    chat: dict[str, Any] = {}


class _Spec(BaseModel):
    version: int = Field(alias="schema")


class _TokensSpec(_Spec):
    documents: str
    encoder: _Encoder


class _TeacherSpec(_TokensSpec):
    weights: dict[str, str]
    signals: list[str]
    dtype: str
    codec: str


class _StudentSpec(_TokensSpec):
    teacher: str
    teacher_root: str


def _parse(kind: type[Model], values: Any, path: Path) -> Model:
    """What a manifest or plan says; BadData where it is not what this program writes."""
    try:
        return kind.model_validate(values, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        raise BadData(
            f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}",
            fix="copy the cache again from where it came, or make this table again",
        ) from error


class Cache:
    """Documents, one teacher and one student tokenization, row by row.

    Raises:
        InputMissing: The folder or a table is not there.
        Mismatch: The tables were not made from each other, or by a newer program.
        UsageError: Several tables could be meant and none was named.
    """

    others: tuple[tuple["Cache", frozenset[Signal]], ...] = ()
    """Further teachers of the same documents, and the signals that are read of each; see `CacheJoin`."""

    def __init__(self, root: Path, *, student: str) -> None:
        self.root = root
        self.documents = Table(root, "documents")
        self.students = Table(root, f"students/{student}")
        spec = _parse(_StudentSpec, self.students.manifest.spec, self.students.folder)
        self.teacher_name = spec.teacher
        further = (Table(root, f"signals/{name}") for name in names_in(root, "signals"))
        self.beside = [table for table in further if table.manifest.spec.get("teacher") == self.teacher_name]
        self.teachers = Table(root, f"teachers/{self.teacher_name}", self.beside)
        for table in (self.documents, self.teachers, *self.beside):
            _parse(_Spec if table is self.documents else _TeacherSpec, table.manifest.spec, table.folder)
        self._check_origin(student, spec)
        self._expect_columns()

    def _check_origin(self, student: str, spec: _StudentSpec) -> None:
        documents, teachers = self.documents.manifest, self.teachers.manifest
        made_from = {"documents": documents.root, "teacher_root": teachers.root, "teacher documents": documents.root}
        found = {"documents": spec.documents, "teacher_root": spec.teacher_root}
        found["teacher documents"] = teachers.spec["documents"]
        for table in self.beside:
            expected = {"documents": documents.root} | {key: teachers.spec[key] for key in ("weights", "encoder")}
            made_from |= {f"{table.name} {key}": value for key, value in expected.items()}
            found |= {f"{table.name} {key}": table.manifest.spec[key] for key in expected}
        again = f"xkd-cache align {self.root} --student ... --name {student}-2"
        refuse_differences(self.students.folder, made_from, found, advice=again)
        versions = {"documents": DOCUMENTS_VERSION, "teachers": TEACHERS_VERSION, "students": STUDENTS_VERSION}
        stored = {name: getattr(self, name).manifest.spec["schema"] for name in versions}
        if stored["documents"] in DOCUMENTS_READ:
            versions["documents"] = stored["documents"]
        refuse_differences(self.root, versions, stored, advice="use the xkd-toolkit version that wrote the cache")

    def _expect_columns(self) -> None:
        """Shards with other columns, types or widths than the manifests say are refused when they are opened."""
        for table in (self.documents, self.students, self.teachers, *self.beside):
            spec, kind = table.manifest.spec, table.name.partition("/")[0]
            expected = STUDENTS if kind == "students" else schema_of(spec)
            if kind in ("teachers", "signals"):
                if spec["codec"] not in CODECS:
                    raise Mismatch(f"{table.folder}: codec {spec['codec']} is not known", fix="upgrade xkd-toolkit")
                expected = teacher_schema(_signals_of(table), self.sizes.hidden_size, spec["codec"])
            table.expect(signals_schema(expected) if kind == "signals" else expected)

    @property
    def by_teacher(self) -> dict[str, tuple["Cache", float]]:
        """The cache of each teacher and the weight of its losses, by the name that they get; see `CacheJoin`."""
        return {"": (self, 1.0)}

    def _read_as(self, first: "Cache") -> None:
        """The tables are those of the first of several caches."""
        self.root, self.teacher_name, self.beside = first.root, first.teacher_name, first.beside
        self.documents, self.teachers, self.students = first.documents, first.teachers, first.students

    @cached_property
    def usable(self) -> Int64s:
        """Rows that the student can be trained on, ascending."""
        commits = self.students.manifest.commits
        firsts = [0, *accumulate(commit.rows for commit in commits)]
        bad = [first + row for first, commit in zip(firsts, commits, strict=False) for row in commit.unusable]
        return np.setdiff1d(np.arange(firsts[-1]), np.array(bad, np.int64), assume_unique=True)

    def rows(self, epoch: int, seed: int) -> Int64s:
        """The rows of one epoch; here the same in each."""
        return self.usable

    def at(self, row: int) -> tuple["Cache", int]:
        """The cache that holds a row, and the row's number there; see `CacheUnion`."""
        return self, row

    def lengths(self, rows: Iterable[int]) -> Int64s:
        """Tokens of the student in some rows; reads the record batches of the student's table that hold them."""
        places = map(self.at, map(int, rows))
        return np.array([len(cache.students[row]["token_ids"]) for cache, row in places], np.int64)

    @cached_property
    def signals(self) -> tuple[Signal, ...]:
        """What is stored of the teacher."""
        found = [signal for table in (self.teachers, *self.beside) for signal in _signals_of(table)]
        return tuple(sorted(found, key=lambda signal: signal.top or 0))  # readers take the last: the most classes

    def rows_of_student(self, most: int) -> Iterator[Tokens]:
        """The student's tokens of some usable rows, as far from each other as can be."""
        for place in np.unique(np.linspace(0, len(self.usable) - 1, most).astype(np.int64)):
            cache, row = self.at(self.usable[place])
            yield tokens_at(cache.students[row])

    def same_tokens(self) -> tuple[int, int]:
        """How many usable rows have the same token ids in both tables, and how many usable rows there are."""
        places = map(self.at, self.usable)
        equal = [np.array_equal(c.students[r]["token_ids"], c.teachers[r]["token_ids"]) for c, r in places]
        return sum(equal), len(equal)

    @property
    def sizes(self) -> Constants:
        """The teacher's constants; BadData where they cannot be those of a model."""
        found = ({} if self.has_head else SERVED) | self.teachers.manifest.constants
        for table in self.beside:
            found |= {key: value for key, value in table.manifest.constants.items() if key == "hidden_std"}
        return _parse(Constants, found, self.teachers.folder)

    def identity(self, wanted: Iterable[Signal]) -> Any:
        """What names the rows and signals of a run: the student's root, and those of further tables it reads."""
        columns = set(map(plain_column, wanted))
        read = [table for table in self.beside if columns & set(map(plain_column, _signals_of(table)))]
        root = self.students.manifest.root
        return [root, *(table.manifest.root for table in read)] if read else root

    def require(self, loss: str, needed: tuple[Signal, ...]) -> None:
        """UsageError that names what `loss` needs and the cache lacks, with the command that adds it."""
        stored, usual = set(map(plain_column, self.signals)), TeacherSection()
        missing = sorted((s for s in set(needed) if s.column not in stored), key=plain_column)
        if missing:
            numbers = (f"#{usual.samples if s.kind.drawn else usual.topk}" if s.kind.top else "" for s in missing)
            columns = [s.column for s in missing]
            add = f"xkd-cache add {self.root} --model PATH_OF_{self.teacher_name} --to {self.teacher_name} --signals "
            add += ",".join(map(str.__add__, columns, numbers))
            raise UsageError(
                f"loss {loss} needs {', '.join(columns)}, which {self.teachers.folder} does not hold "
                f"(it holds {', '.join(s.column for s in self.signals)})",
                fix=add if self.has_head else "of a served teacher, --loss alm reads the log-probabilities",
            )

    def head(self) -> Head:
        """The teacher's head, in the dtype that the teacher ran in."""
        tensors, sizes = self._tensors("head.safetensors"), self.sizes
        return Head(
            weight_VD=tensors["weight"], bias_V=tensors.get("bias"), scale=sizes.logit_scale, softcap=sizes.softcap
        )

    def embeddings(self) -> Tensor:
        """The teacher's input embeddings, [V, D], in the dtype that the teacher ran in."""
        return self._tensors("head.safetensors" if self.sizes.tied else "embeddings.safetensors")["weight"]

    def _tensors(self, name: str) -> dict[str, Tensor]:
        """`weight` [V, D], of a head maybe `bias` [V]; BadData where the file is damaged or holds anything else."""
        if not self.has_head:
            raise UsageError(
                f"{self.teachers.folder} is of a served teacher, whose head and embeddings are not in the cache",
                fix="use --loss alm, or import with --model FOLDER",
            )
        path, manifest, sizes = inside(self.teachers.folder, name), self.teachers.manifest, self.sizes
        dtype = dtype_named(manifest.spec["dtype"])  # files hold 16 bits where those are enough
        try:
            if sha256_of(path) != manifest.files.get(name):
                raise BadData(f"{path} does not match its digest", fix=self._again)
            with safe_open(path, framework="pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
        except (OSError, SafetensorError) as error:
            raise BadData(f"{path}: {error}", fix=self._again) from error
        weight, bias, classes = tensors.get("weight"), tensors.get("bias"), sizes.vocab_size
        fits = weight is not None and weight.ndim == 2 and weight.shape[1] == sizes.hidden_size
        if fits and name == "head.safetensors":
            fits = len(tensors["weight"]) == classes and (bias is None or bias.shape == (classes,))
        if not (fits and all(tensor.is_floating_point() for tensor in tensors.values())):
            holds = ", ".join(f"{key} {list(tensor.shape)} {tensor.dtype}" for key, tensor in tensors.items())
            raise BadData(
                f"{path} does not fit a teacher of {classes} classes and width {sizes.hidden_size}: it holds {holds}",
                fix=self._again,
            )
        return {key: tensor.to(dtype) for key, tensor in tensors.items()}

    @property
    def has_head(self) -> bool:
        """False for a served teacher that was imported without its model."""
        return "head.safetensors" in self.teachers.manifest.files

    @property
    def _again(self) -> str:
        return f"xkd-cache repair {self.root} --model PATH_OF_{self.teacher_name}"


def _signals_of(table: Table) -> list[Signal]:
    return [signal_named(column) for column in table.manifest.spec["signals"]]


def plain_column(signal: Signal) -> str:
    """The name of a signal's column, however many classes it keeps."""
    return replace(signal, top=None).column


def find_student(root: Path, identity: dict[str, str], name: str) -> str:
    """The student table that was made with this tokenizer: the one named, or the only one.

    InputMissing where there is none at all, Mismatch where none was made with this tokenizer, UsageError for several.
    """
    check_cache(root)
    names = names_in(root, "students")
    if name and name not in names:
        raise InputMissing(f"{root} has no students table {name!r}; it has {', '.join(names) or 'none'}")
    if not names:
        raise InputMissing(f"{root} has no finished students table", fix=f"xkd-cache align {root} --student ...")
    differing: dict[str, list[str]] = {}
    for candidate in [name] if name else names:
        path = inside(root, "students", candidate, "plan.json")  # as the manifest, and shorter
        stored = _parse(_StudentSpec, read_record(path, Plan).spec, path).encoder.tokenizer
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
        advice = f"choose one with --student-table NAME, or as {root}:NAME"
        raise UsageError(f"{', '.join(fitting)} all fit this student", fix=advice)
    return fitting[0]


def layers_of(signals: Iterable[Signal]) -> list[tuple[int, str]]:
    """(layer, unit) of the span signals that are stored, lowest layer first."""
    return sorted({(s.layer, s.unit) for s in signals if s.layer is not None and s.unit is not None})

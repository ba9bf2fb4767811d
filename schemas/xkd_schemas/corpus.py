"""Sources of rows: files, folders and data sets, opened once, counted, fingerprinted and described.

A source never guesses in silence: the form of its rows is looked up in the first rows, recorded,
and shown by `Source.describe`. `rows` may be called again and from another process, and refuses
to go on where a file has changed since it was counted.
"""

import hashlib
import importlib
import json
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, Final

from xkd_schemas.address import is_url, local_copy, shown
from xkd_schemas.errors import BadData, InputMissing, Mismatch, UsageError
from xkd_schemas.forms import AUTO, FORMS, check_fields, choose_form
from xkd_schemas.parts import FOLDER_SUFFIXES, SUFFIXES, Content, Part, count_file, exactly, file_rows
from xkd_schemas.rows import RawRow, RejectedRow, parsed_row, read_documents

__all__ = ["RawRow", "RejectedRow", "Source", "digest_of", "open_source", "read_documents"]

SAMPLE_ROWS: Final = 64
"""Rows that the form is looked up in."""
SAMPLE_SCAN: Final = 4096
"""Rows read at most to find them, should the first ones be broken."""
HUB_NAME: Final = re.compile(r"(?P<name>[\w.-]+(/[\w.-]+)?)(:(?P<split>[\w.\[\]:%+-]+))?")
"""NAME, OWNER/NAME, and either with a split."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """A corpus as named on the command line: what it is and how to read it, but no open file."""

    name: str
    form: str
    """A key of FORMS."""
    columns: dict[str, str]
    """Field of the form to column of the rows."""
    num_rows: int
    digest: str
    """sha256 of the file; of a folder, over the names and sha256 of its files; of a data set, its fingerprint."""
    parts: tuple[Part, ...]
    remarks: tuple[str, ...] = ()
    """What a reader should know beyond form and columns; the end of `describe`."""

    def rows(self, first: int = 0) -> Iterator[RawRow]:
        """Rows in order, from row `first` on (0 is the first); exactly `num_rows - first` of them.

        Raises:
            Mismatch: a file is not what it was when the source was opened.
            InputMissing, BadData, Refused: as `open_source`.
        """
        before = 0
        for part in self.parts:
            skip = max(0, first - before)
            if skip < part.num_rows:
                rows = _part_rows(part, skip, tuple(self.columns.values()), self.digest)
                for number, content in enumerate(rows, start=before + skip + 1):
                    yield RawRow(line=number, content=content)
            before += part.num_rows

    def describe(self) -> str:
        """One line: name, rows, form, columns, and everything that was not plain sailing."""
        shown = [field if field == column else f"{field}={column}" for field, column in self.columns.items()]
        line = f"{self.name}: {self.num_rows} rows, {FORMS[self.form].title} ({', '.join(shown)})"
        return "; ".join((line, *self.remarks))


def open_source(name: str, *, form: str = AUTO, columns: Mapping[str, str]) -> Source:
    """Count and fingerprint a source in one pass and find the form of its rows.

    Args:
        name: A file (.jsonl, .jsonl.gz, .jsonl.zst, .parquet, .arrow), a folder of such files
            (read in the order of their names; what `datasets` saves is one), the address of such a file
            (s3://, https://, whatever fsspec knows; copied here first), or NAME or NAME:SPLIT of a data
            set on the hub (split train if not said).
        form: A key of FORMS, or "auto": the first form whose required fields the first rows have.
        columns: Field to column, for rows that name their fields otherwise; may be empty.

    Raises:
        InputMissing: not there, not a regular file, not readable, or the hub is out of reach.
        UsageError: unknown form, field or file ending, or rows that fit no form.
        BadData: a table or compressed file is broken.
        Refused: a compressed file grows without measure.
    """
    check_fields(form, columns)
    parts, digest, remarks = _located(name)
    sample = _sample(parts, digest)
    chosen, resolved, fit = choose_form(name, form, columns, sample)
    boms = sum(part.num_boms for part in parts)
    if boms:
        remarks = (*remarks, f"{boms} byte order mark{'s' * (boms > 1)} dropped")
    return Source(
        name=shown(name) if is_url(name) else name, form=chosen, columns=resolved,
        num_rows=sum(part.num_rows for part in parts), digest=digest, parts=parts, remarks=(*fit, *remarks),
    )  # fmt: skip


def digest_of(name: str) -> str:
    """What `Source.digest` of this source would be, whatever the form of its rows.

    Raises:
        InputMissing, UsageError, BadData, Refused: as `open_source`.
    """
    return _located(name)[1]


def _located(name: str) -> tuple[tuple[Part, ...], str, tuple[str, ...]]:
    """(parts, digest, remarks)"""
    if is_url(name):
        return _at_address(name)
    path = Path(name).expanduser()
    try:
        mode = path.stat().st_mode
    except OSError as error:
        found = HUB_NAME.fullmatch(name)
        if found is None or name.endswith(SUFFIXES) or path.is_symlink():
            raise InputMissing(f"{name}: {error.strerror or error}", next="check the path") from None
        return _on_hub(name, found["name"], found["split"] or "train")
    if stat.S_ISDIR(mode):
        return _in_folder(path)
    if not stat.S_ISREG(mode):
        raise InputMissing(f"{name} is not a regular file", next="save the rows to a .jsonl file and name that")
    if not path.name.endswith(SUFFIXES):
        raise UsageError(f"{name}: the ending says no format", next=f"use one of {' '.join(SUFFIXES)}")
    digest = hashlib.sha256()
    return (count_file(path, digest),), digest.hexdigest(), ()


def _at_address(url: str) -> tuple[tuple[Part, ...], str, tuple[str, ...]]:
    if not shown(url).endswith(SUFFIXES):
        raise UsageError(f"{shown(url)}: the ending says no format", next=f"use one of {' '.join(SUFFIXES)}")
    digest = hashlib.sha256()
    part = count_file(local_copy(url), digest)
    return (part,), digest.hexdigest(), (f"{part.state[0]} bytes copied here while this command runs",)


def _in_folder(folder: Path) -> tuple[tuple[Part, ...], str, tuple[str, ...]]:
    if (folder / "dataset_dict.json").is_file():
        splits = sorted(p.parent.name for p in folder.glob("*/state.json"))
        raise UsageError(f"{folder} holds several splits: {', '.join(splits)}", next=f"name one, as {folder}/train")
    files, num_irregular, num_others = _walk(folder)
    saved = (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()
    if saved:
        _check_complete(folder, files)
    whole = hashlib.sha256()
    parts = []
    for file in files:
        own = hashlib.sha256()
        parts.append(count_file(file, own))
        whole.update(f"{file.relative_to(folder)}\0{own.hexdigest()}\n".encode())
    if not parts and not saved:
        raise InputMissing(f"{folder} holds no file that ends in {' '.join(FOLDER_SUFFIXES)}", next="check the path")
    remarks = [f"{len(parts)} file{'s' * (len(parts) > 1)}"]
    if num_irregular:
        remarks.append(f"{num_irregular} links, pipes or devices left out")
    if num_others:
        remarks.append(f"{num_others} other files left out")
    return tuple(parts), whole.hexdigest(), tuple(remarks)


def _check_complete(folder: Path, files: Sequence[Path]) -> None:
    """Raise InputMissing where a folder saved by `datasets` lacks a file that its state.json lists."""
    try:
        listed = [str(entry["filename"]) for entry in json.loads((folder / "state.json").read_bytes())["_data_files"]]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise BadData(f"{folder}/state.json cannot be read: {error}", next="save the data set again") from error
    missing = sorted(set(listed) - {file.name for file in files})
    if missing:
        raise InputMissing(f"{folder} lacks {', '.join(missing[:3])}", next="copy or save the data set again")


def _walk(folder: Path) -> tuple[list[Path], int, int]:
    """(regular corpus files below the folder by name, number of links and the like, number of other files)"""
    files, num_irregular, num_others = [], 0, 0
    for path in sorted(folder.rglob("*")):
        mode = path.lstat().st_mode
        if stat.S_ISDIR(mode):
            continue
        if not stat.S_ISREG(mode):
            num_irregular += 1
        elif path.name.endswith(FOLDER_SUFFIXES) and not path.name.startswith("."):
            files.append(path)
        else:
            num_others += 1
    return files, num_irregular, num_others


def _on_hub(name: str, dataset: str, split: str) -> tuple[tuple[Part, ...], str, tuple[str, ...]]:
    rows = _from_hub(name, dataset, split)
    part = Part(path=f"{dataset}:{split}", kind="hub", num_rows=len(rows))
    return (part,), str(rows._fingerprint), (f"split {split} from the hub",)


def _from_hub(name: str, dataset: str, split: str) -> Any:
    try:
        datasets: Any = importlib.import_module("datasets")  # by name: the trainer works without it
    except ImportError:
        raise InputMissing(
            f"{name}: the hub needs datasets, which is not installed", next="pip install datasets"
        ) from None
    try:
        return datasets.load_dataset(dataset, split=split)
    except OSError as error:
        line = " ".join(str(error).split())[:200]
        raise InputMissing(
            f"{name}: there is no such file or folder here, and the hub gave no data set {dataset}: {line}",
            next="check the path, or download the data set first and name its folder",
        ) from error
    except ValueError as error:
        raise UsageError(f"{name}: {' '.join(str(error).split())[:200]}", next="name the split: NAME:SPLIT") from error
    except datasets.exceptions.DatasetsError as error:
        raise BadData(f"{name}: {' '.join(str(error).split())[:200]}", next="look at the data set's page") from error


def _sample(parts: Sequence[Part], digest: str) -> list[dict[str, object]]:
    """The first rows that are objects, all columns."""
    contents = chain.from_iterable(_part_rows(part, 0, None, digest) for part in parts if part.num_rows)
    objects = filter(None, map(parsed_row, islice(contents, SAMPLE_SCAN)))
    return list(islice(objects, SAMPLE_ROWS))


def _part_rows(part: Part, first: int, columns: Sequence[str] | None, digest: str) -> Iterator[Content]:
    if part.kind == "hub":
        return exactly(part, _hub_rows(part, first, digest), first)
    return exactly(part, file_rows(part, first=first, columns=columns), first)


def _hub_rows(part: Part, first: int, digest: str) -> Iterator[Content]:
    name, split = part.path.split(":", 1)
    rows = _from_hub(part.path, name, split)
    if rows._fingerprint != digest:
        raise Mismatch(
            f"{part.path}: the data set was {digest} and is {rows._fingerprint} now",
            next="run again from the start, in a new cache",
        )
    for at in range(first, len(rows)):
        yield dict(rows[at])

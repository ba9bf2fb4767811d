"""Sources of rows: files, folders and data sets, opened once, counted, fingerprinted and described.

A source never guesses in silence: the form of its rows is looked up in the first rows, recorded,
and shown by `Source.describe`. `rows` may be called again and from another process, and refuses
to go on where a file has changed since it was counted. A corpus at an address that fsspec knows (s3://, https://) is
copied once.
"""

import atexit
import contextlib
import functools
import hashlib
import importlib
import json
import re
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path, PurePosixPath
from typing import Final

from xkd_schemas.corpus.files import FOLDER_SUFFIXES, SUFFIXES, Content, CorpusFile, count_file, file_rows
from xkd_schemas.corpus.formats import AUTO, FORMS, PROMPTS, check_fields, choose_form
from xkd_schemas.corpus.rows import ROW_KEYS, RawRow, RejectedRow, parsed_row, read_documents, references_of
from xkd_schemas.documents import Document
from xkd_schemas.durable_files import disk_errors
from xkd_schemas.errors import BadData, InputMissing, Mismatch, UsageError, XkdError

__all__ = ["RawRow", "RejectedRow", "Source", "digest_of", "open_source", "read_documents"]

SAMPLE_ROWS: Final = 64  # rows that the form is looked up in
SAMPLE_SCAN: Final = 4096  # rows read at most to find them, should the first ones be broken
HUB_NAME: Final = re.compile(
    r"(?P<name>[\w.-]+(/[\w.-]+)?)(@(?P<revision>[\w./-]+))?(:(?P<subset>[\w.+-]+)(?=:))?(:(?P<split>[\w.+-]+))?"
)
"""NAME@REVISION:SUBSET:SPLIT of a data set on the hub; NAME may have an owner, the rest may be left out."""
HUB_FORM: Final = "NAME@REVISION:SUBSET:SPLIT"
_URL: Final = re.compile(r"[a-z][a-z0-9+.-]*(::[a-z][a-z0-9+.-]*)*://.+", re.DOTALL)
COPY_BYTES: Final = 4 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """A corpus as named on the command line: what it is and how to read it, but no open file."""

    name: str
    form: str  # a key of FORMS
    columns: dict[str, str]  # field of the form to column of the rows
    num_rows: int
    digest: str  # sha256 of the file, over the names and sha256 of a folder's files, or a data set's fingerprint
    parts: tuple[CorpusFile, ...]
    remarks: tuple[str, ...] = ()  # what a reader should know beyond form and columns; the end of `describe`

    def rows(self, first: int = 0) -> Iterator[RawRow]:
        """Rows in order, from row `first` on (0 is the first); exactly `num_rows - first` of them.

        Raises:
            Mismatch: a file is not what it was when the source was opened, or rows of the hub are fewer.
            InputMissing, BadData, Refused: as `open_source`.
        """
        columns = (*self.columns.values(), *(ROW_KEYS if self.form == "messages" else ()))
        before = 0
        for part in self.parts:
            skip = max(0, first - before)
            if skip < part.num_rows:
                rows = _part_rows(part, skip, columns)
                for number, content in enumerate(rows, start=before + skip + 1):
                    yield RawRow(line=number, content=content)
            before += part.num_rows

    def describe(self) -> str:
        """One line: name, rows, form, columns, and everything that was not plain sailing."""
        read = [field if field == column else f"{field}={column}" for field, column in self.columns.items()]
        line = f"{self.name}: {self.num_rows} rows, {FORMS[self.form].title} ({', '.join(read)})"
        return "; ".join((line, *self.remarks))


def open_source(name: str, *, form: str = AUTO, columns: Mapping[str, str], prompts: bool = False) -> Source:
    """Count and fingerprint a source and find the form of its rows.

    Args:
        name: A file (.jsonl, .jsonl.gz, .jsonl.zst, .parquet, .arrow), a folder of such files
            (read in the order of their names; what `datasets` saves is one), the address of such a file
            (s3://, https://, whatever fsspec knows; copied here first), or NAME@REVISION:SUBSET:SPLIT of a
            data set on the hub, of which all but the name may be left out (split train); its rows are streamed.
        form: A key of FORMS, or "auto": the first form whose required fields the first rows have.
        columns: Field to column, for rows that name their fields otherwise; may be empty.
        prompts: Responses are not read, and need not be there.

    Raises:
        InputMissing: not there, not a regular file, not readable, or the hub is out of reach.
        UsageError: unknown form, field or file ending, or rows that fit no form.
        BadData: a table or compressed file is broken.
        Refused: a compressed file grows without measure.
    """
    if not name:  # of a path it would be the current folder
        raise UsageError("a corpus or data has an empty name", fix="name a file, folder, address or data set")
    check_fields(form, columns)
    parts, digest, remarks = _locate(name)
    contents = chain.from_iterable(_part_rows(part, 0, None) for part in parts if part.num_rows)
    sample = list(islice(filter(None, map(parsed_row, islice(contents, SAMPLE_SCAN))), SAMPLE_ROWS))
    chosen, resolved, fit = choose_form(name, form, columns, sample, PROMPTS if prompts else FORMS)
    boms = sum(part.num_boms for part in parts)
    if boms:
        remarks = (*remarks, f"{boms} byte order mark{'s' * (boms > 1)} dropped")
    return Source(
        name=_hide_secrets(name), form=chosen, columns=resolved,
        num_rows=sum(part.num_rows for part in parts), digest=digest, parts=parts, remarks=(*fit, *remarks),
    )  # fmt: skip


def digest_of(name: str) -> str:
    """What `Source.digest` of this source would be, whatever the form of its rows; errors as `open_source`."""
    return _locate(name)[1]


def _locate(name: str) -> tuple[tuple[CorpusFile, ...], str, tuple[str, ...]]:
    path = Path(name).expanduser()
    try:
        mode = stat.S_IFREG if is_url(name) else path.stat().st_mode
    except OSError as error:
        found = HUB_NAME.fullmatch(name)
        if found is None or name.endswith(SUFFIXES) or path.is_symlink():
            raise InputMissing(
                f"{name}: {error.strerror or error}", fix=f"check the path; a data set of the hub is {HUB_FORM}"
            ) from None
        return _on_hub(name, found)
    if stat.S_ISDIR(mode):
        return _in_folder(path)
    if not stat.S_ISREG(mode):
        raise InputMissing(f"{name} is not a regular file", fix="save the rows to a .jsonl file and name that")
    if not _hide_secrets(name).endswith(SUFFIXES):
        raise UsageError(f"{_hide_secrets(name)}: unknown file extension", fix=f"use one of {' '.join(SUFFIXES)}")
    part, digest = count_file(_copy_here(name) if is_url(name) else path)
    return (part,), digest, (f"{part.state[0]} bytes copied here while this command runs",) * is_url(name)


def _in_folder(folder: Path) -> tuple[tuple[CorpusFile, ...], str, tuple[str, ...]]:
    if (folder / "dataset_dict.json").is_file():
        splits = sorted(p.parent.name for p in folder.glob("*/state.json"))
        raise UsageError(f"{folder} holds several splits: {', '.join(splits)}", fix=f"name one, as {folder}/train")
    paths = [path for path in sorted(folder.rglob("*")) if not stat.S_ISDIR(path.lstat().st_mode)]
    regular = [path for path in paths if stat.S_ISREG(path.lstat().st_mode)]
    files = [path for path in regular if path.name.endswith(FOLDER_SUFFIXES) and not path.name.startswith(".")]
    saved = (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()
    if saved:
        _check_complete(folder, files)
    whole = hashlib.sha256()
    parts = []
    for file in files:
        part, digest = count_file(file)
        parts.append(part)
        whole.update(f"{file.relative_to(folder)}\0{digest}\n".encode())
    if not parts and not saved:
        raise InputMissing(f"{folder} holds no file that ends in {' '.join(FOLDER_SUFFIXES)}", fix="check the path")
    left_out = {"links, pipes or devices": len(paths) - len(regular), "other files": len(regular) - len(files)}
    remarks = [f"{len(parts)} file{'s' * (len(parts) > 1)}"]
    remarks += [f"{number} {what} left out" for what, number in left_out.items() if number]
    return tuple(parts), whole.hexdigest(), tuple(remarks)


def _check_complete(folder: Path, files: Sequence[Path]) -> None:
    """Raise InputMissing where a folder saved by `datasets` lacks a file that its state.json lists."""
    try:
        listed = [str(entry["filename"]) for entry in json.loads((folder / "state.json").read_bytes())["_data_files"]]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise BadData(f"{folder}/state.json cannot be read: {error}", fix="save the data set again") from error
    missing = sorted(set(listed) - {file.name for file in files})
    if missing:
        raise InputMissing(f"{folder} lacks {', '.join(missing[:3])}", fix="copy or save the data set again")


def _on_hub(name: str, found: re.Match[str]) -> tuple[tuple[CorpusFile, ...], str, tuple[str, ...]]:
    """A data set at the commit that its revision stands for now, so that its rows stay what they were counted as."""
    from huggingface_hub import HfApi

    with _hub_errors(name):
        commit = HfApi().dataset_info(found["name"], revision=found["revision"]).sha
    subset, split = found["subset"] or "", found["split"] or "train"
    path = f"{found['name']}@{commit}{f':{subset}' if subset else ''}:{split}"
    part = CorpusFile(path=path, kind="hub", num_rows=sum(1 for _ in _hub_rows(path)))
    remark = f"{f'subset {subset}, ' if subset else ''}split {split} from the hub, streamed, at commit {commit}"
    return (part,), hashlib.sha256(path.encode()).hexdigest(), (remark,)


def _hub_rows(path: str, first: int = 0) -> Iterator[Content]:
    """Rows of NAME@REVISION:SUBSET:SPLIT as they come in; none but the one at hand is held."""
    found = HUB_NAME.fullmatch(path)
    assert found is not None
    try:
        datasets = importlib.import_module("datasets")  # by name: the trainer works without it
    except ImportError:
        what = f"{path}: the hub needs datasets, which is not installed"
        raise InputMissing(what, fix="pip install datasets") from None
    with _hub_errors(path):
        rows = datasets.load_dataset(
            found["name"], found["subset"], split=found["split"], revision=found["revision"], streaming=True
        )
        for row in rows.skip(first):
            yield dict(row)


@contextlib.contextmanager
def _hub_errors(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # those of an HTTP library too
        broken = getattr(sys.modules.get("datasets.exceptions"), "DatasetsError", ())
        line = " ".join(str(error).split())[:200]
        if isinstance(error, ValueError):
            raise UsageError(f"{name}: {line}", fix=f"name subset and split: {HUB_FORM}") from error
        if isinstance(error, broken) and not isinstance(error, OSError):
            raise BadData(f"{name}: {line}", fix="look at the data set's page") from error
        raise InputMissing(
            f"{name}: there is no such file or folder here, and the hub gave no such data set: {line}",
            fix=f"check the path and {HUB_FORM}, or download the data set first and name its folder",
        ) from error


def _part_rows(part: CorpusFile, first: int, columns: Sequence[str] | None) -> Iterator[Content]:
    """The rows that were counted, from `first` on, or Mismatch where there are fewer."""
    rows = _hub_rows(part.path, first) if part.kind == "hub" else file_rows(part, first, columns)
    wanted = part.num_rows - first
    number = 0
    for number, content in enumerate(islice(rows, wanted), start=1):  # noqa: B007 # the count is used after the loop
        yield content
    if number != wanted:
        raise Mismatch(
            f"{part.path} had {part.num_rows} rows when it was counted and has {first + number} now",
            fix="run again when nothing writes to it",
        )


def is_url(name: str) -> bool:
    """True for what fsspec shall open.

    >>> is_url("s3://bucket/a.jsonl"), is_url("data/a.jsonl"), is_url("owner/name:train")
    (True, False, False)
    """
    return _URL.fullmatch(name) is not None


def _hide_secrets(name: str) -> str:
    """An address without name, password and query; any other name as it is.

    >>> _hide_secrets("https://me:secret@host/a.jsonl?token=1")
    'https://host/a.jsonl'
    """
    return re.sub(r"://[^/@]*@", "://", name.split("?", 1)[0]) if is_url(name) else name


@functools.cache
def _copy_here(url: str) -> Path:
    """A remote file under its own name in a folder of this process, copied once and removed when it ends."""
    import fsspec

    with _remote_errors(url):
        files, path = fsspec.core.url_to_fs(url)
        if not files.isfile(path):
            raise InputMissing(f"{_hide_secrets(url)} is not a file there", fix="name one file, with its ending")
    folder = Path(tempfile.mkdtemp(prefix="xkd-corpus-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    target = folder / PurePosixPath(_hide_secrets(url)).name
    with disk_errors(target):
        stream = target.open("wb")
    with stream, _remote_errors(url), files.open(path, "rb") as source:
        while chunk := source.read(COPY_BYTES):
            with disk_errors(target):
                stream.write(chunk)
                stream.flush()
    return target


@contextlib.contextmanager
def _remote_errors(url: str) -> Iterator[None]:
    """Whatever a store's own library raises, as one line of ours without secrets."""
    try:
        yield
    except XkdError:
        raise
    except Exception as error:  # stores raise what their own libraries raise
        said = " ".join(str(getattr(error, "strerror", None) or error).split()) or type(error).__name__
        line = f"{_hide_secrets(url)}: {said[:160].replace(url, _hide_secrets(url))}"
        if isinstance(error, ImportError | ValueError):
            fix = "check the beginning of the address, and pip install what it names, e.g. pip install s3fs"
            raise UsageError(line, fix=fix) from error
        raise InputMissing(line, fix="check address and access") from error


def held_out_documents(
    name: Path | str, form: str = AUTO, columns: Mapping[str, str] | None = None
) -> tuple[list[Document], list[RejectedRow], dict[int, list[str]]]:
    """Documents of a source, and the rows that could not be used; arguments and errors as `open_source`.

    Also, by their line, all the references of rows that have a list of them; the document has the first.
    """
    source = open_source(str(name), form=form, columns=columns or {})
    rows = list(source.rows())
    if not rows:
        raise BadData(f"{name} has no rows", fix="check the path")
    documents, rejected = read_documents(Path(source.name).name, source.form, source.columns, rows)
    references = {r.line: references_of(source.form, source.columns, parsed_row(r.content) or {}) for r in rows}
    return documents, rejected, {line: texts for line, texts in references.items() if texts}

"""Rows that another program computed: lines or Parquet rows, found by document or by token ids.

Shape legend for this file
    T tokens of a row
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from xkd_schemas.durable_files import sha256_of
from xkd_schemas.errors import BadData, InputMissing, UsageError
from xkd_schemas.tokens import Int32s

Given = Mapping[str, Any]
BATCH_ROWS: Final = 256  # rows of a Parquet file turned into Python objects at once


class RowRefused(ValueError):
    """Why one row cannot be imported; `reason` is the status that its document gets."""

    def __init__(self, reason: str, what: str) -> None:
        super().__init__(what)
        self.reason = reason


@dataclass(frozen=True, kw_only=True, slots=True)
class Served:
    """What was computed of one text. Value t of a column is made of the state at token t, as in a capture."""

    ids: Int32s  # [T]
    columns: dict[str, npt.NDArray[Any]]  # signal's column -> [T, ...]


class Rows:
    """The rows of some files; nothing of them is held but where each is.

    Raises:
        InputMissing: A file is not there.
        UsageError: Its ending says another kind of file, or two rows are of one document.
        BadData: It is broken, or a row has neither a document nor token ids.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.paths = [Path(name) for name in names]
        self._places: dict[str, tuple[Path, int]] = {}
        self.columns: tuple[str, ...] = ()  # of the first row, which every other must have
        self.used: set[str] = set()  # keys of rows that some document asked for
        for path in self.paths:
            for place, row in read_rows(path):
                self._note(path, place, row)

    def __len__(self) -> int:
        return len(self._places)

    def _note(self, path: Path, place: int, row: Given) -> None:
        key = key_of(row, path)
        if key in self._places:
            raise UsageError(f"{path}: two rows are of {key}", fix="keep one of them")
        self._places[key] = path, place
        if not self.columns:
            try:
                self.columns = tuple(sorted(parse(row).columns))
            except RowRefused as error:
                raise BadData(f"{path}: the first row cannot be used: {error}", fix=HOW) from error

    @property
    def digests(self) -> list[str]:
        """sha256 of each file."""
        return [sha256_of(path) for path in self.paths]

    def of_documents(self, doc_ids: Sequence[str], ids: Sequence[Int32s]) -> list[Given | None]:
        """The row of each document, by its doc_id, or else by its token ids; None where there is none."""
        keys = [doc if doc in self._places else digest_ids(t) for doc, t in zip(doc_ids, ids, strict=True)]
        self.used.update(key for key in keys if key in self._places)
        wanted: dict[Path, set[int]] = {}
        for path, place in (self._places[key] for key in keys if key in self._places):
            wanted.setdefault(path, set()).add(place)
        found = {(path, place): row for path, places in wanted.items() for place, row in read_rows(path, places)}
        return [found[self._places[key]] if key in self._places else None for key in keys]


HOW: Final = "docs/served-teachers.md lists the forms of rows"


def read_rows(path: Path, wanted: Iterable[int] | None = None) -> Iterator[tuple[int, Given]]:
    """(place, row) of every row of a file, or of those at the `wanted` places alone."""
    if path.suffix not in READERS:
        raise UsageError(f"{path}: unknown file extension", fix=f"use one of {' '.join(READERS)}")
    try:
        yield from READERS[path.suffix](path, wanted)
    except (OSError, pa.ArrowException) as error:
        if not isinstance(error, pa.ArrowException):
            raise InputMissing(f"{path}: {error.strerror or error}", fix="check the path") from error
        raise BadData(
            f"{path} is broken: {' '.join(str(error).split())[:160]}", fix="write or copy it again"
        ) from error


def _lines(path: Path, wanted: Iterable[int] | None) -> Iterator[tuple[int, Given]]:
    """Rows of a JSONL file; the place is the offset of the line."""
    with path.open("rb") as stream:
        if wanted is None:
            at = 0
            for line in stream:
                if line.strip():
                    yield at, _object(path, at, line)
                at += len(line)
        for at in sorted(wanted or ()):
            stream.seek(at)
            yield at, _object(path, at, stream.readline())


def _object(path: Path, at: int, line: bytes) -> Given:
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise BadData(
            f"{path}, byte {at}: not JSON: {error}", fix="delete that line, or write the file again"
        ) from error
    if not isinstance(row, dict):
        raise BadData(f"{path}, byte {at}: a row is an object, found {type(row).__name__}", fix=HOW)
    return row


def _table_rows(path: Path, wanted: Iterable[int] | None) -> Iterator[tuple[int, Given]]:
    """Rows of a Parquet file; the place is the number of the row. Row groups without a wanted row are not read."""
    places = None if wanted is None else np.array(sorted(wanted), np.int64)
    with pq.ParquetFile(path) as file:
        first = 0
        for group in range(file.num_row_groups):
            end = first + file.metadata.row_group(group).num_rows
            if places is None or ((places >= first) & (places < end)).any():
                for batch in file.iter_batches(BATCH_ROWS, row_groups=[group]):
                    numbers = np.arange(first, first + batch.num_rows)
                    picked = numbers if places is None else numbers[np.isin(numbers, places)]
                    yield from zip(picked.tolist(), batch.take(pa.array(picked - first)).to_pylist(), strict=True)
                    first += batch.num_rows
            first = end


READERS: Final = {".jsonl": _lines, ".parquet": _table_rows}


def key_of(row: Given, path: Path) -> str:
    """What a row is found by: its document, or its token ids."""
    if isinstance(row.get("doc_id"), str):
        return str(row["doc_id"])
    try:
        return digest_ids(ids_of(row))
    except RowRefused as error:
        raise BadData(f"{path}: a row has no doc_id, and {error}", fix=HOW) from error


def digest_ids(ids: Int32s) -> str:
    """A name of some token ids."""
    return f"the tokens {hashlib.sha256(np.ascontiguousarray(ids, np.int32).tobytes()).hexdigest()}"


# -- what a row says


def parse(row: Given) -> Served:
    """What one row says; RowRefused where it fits no form."""
    ids = ids_of(row)
    return Served(ids=ids, columns=_log_probabilities(row, ids))


def ids_of(row: Given) -> Int32s:
    """Token ids of a row."""
    found = next((row[name] for name in ("token_ids", "prompt_token_ids") if row.get(name) is not None), None)
    ids = np.asarray([] if found is None else found)
    if not len(ids) or ids.ndim != 1 or ids.dtype.kind not in "iu" or ids.min() < 0 or ids.max() >= 2**31:
        raise RowRefused("bad_values", "no list of numbers in token_ids or prompt_token_ids")
    return ids.astype(np.int32)


def _log_probabilities(row: Given, ids: Int32s) -> dict[str, npt.NDArray[Any]]:
    """`logprobs`, a number for each token, or `prompt_logprobs` as vLLM writes them; of the first token: null."""
    found = row.get("logprobs") if row.get("logprobs") is not None else row.get("prompt_logprobs")
    if not isinstance(found, list):
        raise RowRefused("bad_values", "no list in logprobs or prompt_logprobs")
    if len(found) != len(ids):
        raise RowRefused("bad_values", f"{len(found)} log-probabilities of {len(ids)} tokens")
    values_T = np.array([_number(one, at, int(ids[at])) for at, one in enumerate(found)], np.float32)
    return {"target_logprob": np.append(values_T[1:], np.float32(np.nan))}


def _number(one: Any, at: int, token: int) -> float:
    if isinstance(one, dict):
        if str(token) not in one:
            raise RowRefused(
                "other_tokens", f"token {at} is {token}, and only {', '.join(one) or 'none'} is rated there"
            )
        one = one[str(token)]
        one = one.get("logprob") if isinstance(one, dict) else one
    if one is not None and (isinstance(one, bool) or not isinstance(one, float | int)):
        raise RowRefused("bad_values", f"token {at}: {str(one)[:40]!r} is no log-probability")
    return float("nan") if one is None else float(one)

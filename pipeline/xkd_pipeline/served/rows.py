"""Rows that another program computed: lines, Parquet rows or files of tensors, found by document or by token ids.

Shape legend for this file
    T tokens of a row
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np
import numpy.typing as npt
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import SafetensorError, safe_open

from xkd_pipeline.served.distillkit import read_compression, unpack_row
from xkd_schemas.errors import BadData, InputMissing, UsageError
from xkd_schemas.tokens import Int32s, NotUsable

Given = Mapping[str, Any]
Used = TypeVar("Used")
BATCH_ROWS: Final = 256  # rows of a Parquet file turned into Python objects at once
HOW: Final = "docs/served-teachers.md lists the forms of rows"


@dataclass(frozen=True, kw_only=True, slots=True)
class Served:
    """What was computed of one text. Value t of a column is made of the state at token t, as in a capture."""

    ids: Int32s  # [T]
    columns: dict[str, npt.NDArray[Any]]
    """Signal's column -> [T, ...]; states are float32, of the last block not normed."""
    padded: bool = False  # one more token may stand at the end, a padding token

    def without(self, end: int | None) -> "Served":
        """The same without the last token, if that is the padding token `end` and may be there."""
        if not (self.padded and self.ids[-1] == end):
            return self
        return Served(ids=self.ids[:-1], columns={name: values[:-1] for name, values in self.columns.items()})


class Rows:
    """The rows of some files, or of all files of folders; nothing of them is held but where each is.

    `layers` are those of the states in files of tensors, in their order.

    Raises:
        InputMissing: A file is not there.
        UsageError: Its ending says another kind of file, or two rows are of one document.
        BadData: It is broken, or a row has neither a document nor token ids.
    """

    def __init__(self, names: Sequence[str], layers: Sequence[int] = ()) -> None:
        self.paths = [path for name in names for path in _files(Path(name))]
        self.layers = tuple(layers)
        self._places: dict[str, tuple[Path, int]] = {}
        self.columns: tuple[str, ...] = ()  # of the first row that can be used, which every other must have
        self.used: set[str] = set()  # keys of rows that some document asked for
        self._unusable = ""  # why the first row cannot be used
        for path in self.paths:
            for place, row in read_rows(path):
                self._note(path, place, row)
        if self._unusable and not self.columns:
            raise BadData(self._unusable, fix=HOW)

    def __len__(self) -> int:
        return len(self._places)

    def _note(self, path: Path, place: int, row: Given) -> None:
        key = key_of(row, path)
        if key in self._places:
            raise UsageError(f"{path}: two rows are of {key}", fix="keep one of them")
        self._places[key] = path, place
        try:
            self.columns = self.columns or tuple(sorted(parse(row, self.layers).columns))
        except NotUsable as error:
            self._unusable = self._unusable or f"{path}: the first row cannot be used: {error}"

    def of_documents(
        self, doc_ids: Sequence[str], ids: Sequence[Int32s], end: int | None, use: Callable[[Given], Used]
    ) -> list[Used | NotUsable]:
        """What `use` makes of the row of each document, or why there is nothing.

        A row is found by its doc_id, or else by its token ids, behind which a padding token `end` may stand.
        """
        keys = [doc if doc in self._places else digest_ids(t) for doc, t in zip(doc_ids, ids, strict=True)]
        if end is not None:
            longer = [digest_ids(np.append(t, np.int32(end))) for t in ids]
            keys = [key if key in self._places else more for key, more in zip(keys, longer, strict=True)]
        self.used.update(key for key in keys if key in self._places)
        wanted: dict[Path, set[int]] = {}
        for path, place in (self._places[key] for key in keys if key in self._places):
            wanted.setdefault(path, set()).add(place)
        found: dict[tuple[Path, int], Used | NotUsable] = {}
        for path, places in wanted.items():
            for place, row in read_rows(path, places):
                try:
                    found[path, place] = use(row)
                except NotUsable as error:
                    found[path, place] = error
        nothing = NotUsable("not_imported", "no row is of this document")
        return [found[self._places[key]] if key in self._places else nothing for key in keys]


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    found = sorted(one for one in path.rglob("*") if one.suffix in READERS)
    if not found:
        raise InputMissing(f"{path} holds no file that ends in {' '.join(READERS)}", fix="check the path")
    return found


def read_rows(path: Path, wanted: Iterable[int] | None = None) -> Iterator[tuple[int, Given]]:
    """(place, row) of every row of a file, or of those at the `wanted` places alone."""
    if path.suffix not in READERS:
        raise UsageError(f"{path}: unknown file extension", fix=f"use one of {' '.join(READERS)}")
    try:
        yield from READERS[path.suffix](path, wanted)
    except (OSError, pa.ArrowException, SafetensorError) as error:
        if not isinstance(error, pa.ArrowException | SafetensorError):
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
                    rows = batch.take(pa.array(picked - first)).to_pylist()
                    for place, row in zip(picked.tolist(), rows, strict=True):
                        yield place, row | {"folder": path.parent}
                    first += batch.num_rows
            first = end


def _tensors(path: Path, _wanted: Iterable[int] | None) -> Iterator[tuple[int, Given]]:
    """The one row of a file of tensors; its states are read when they are needed."""
    with safe_open(path, framework="pt") as file:
        missing = {"token_ids", "hidden_states"} - set(file.keys())
        if missing:
            raise BadData(f"{path} has no {' and no '.join(sorted(missing))}", fix=HOW)
        yield 0, {"token_ids": file.get_tensor("token_ids").flatten().numpy(), "hidden_states": path}


READERS: Final = {".jsonl": _lines, ".parquet": _table_rows, ".safetensors": _tensors}


def key_of(row: Given, path: Path) -> str:
    """What a row is found by: its document, or its token ids."""
    if isinstance(row.get("doc_id"), str):
        return str(row["doc_id"])
    try:
        return digest_ids(ids_of(row))
    except NotUsable as error:
        raise BadData(f"{path}: a row has no doc_id, and {error}", fix=HOW) from error


def digest_ids(ids: Int32s) -> str:
    """A name of some token ids."""
    return f"the tokens {hashlib.sha256(np.ascontiguousarray(ids, np.int32).tobytes()).hexdigest()}"


# -- what a row says


def parse(row: Given, layers: Sequence[int] = ()) -> Served:
    """What one row says; NotUsable where it fits no form."""
    ids = ids_of(row)
    if "hidden_states" in row:
        return Served(ids=ids, columns=_states(row["hidden_states"], ids, layers))
    if row.get("compressed_logprobs") is not None:
        return Served(ids=ids, columns=_largest(row, ids), padded=True)
    return Served(ids=ids, columns=_log_probabilities(row, ids))


def ids_of(row: Given) -> Int32s:
    """Token ids of a row."""
    named = (row.get(name) for name in ("token_ids", "prompt_token_ids", "input_ids"))
    ids = np.asarray(next((found for found in named if found is not None), []))
    if not len(ids) or ids.ndim != 1 or ids.dtype.kind not in "iu" or ids.min() < 0 or ids.max() >= 2**31:
        raise NotUsable("bad_values", "no list of numbers in token_ids, prompt_token_ids or input_ids")
    return ids.astype(np.int32)


def _log_probabilities(row: Given, ids: Int32s) -> dict[str, npt.NDArray[Any]]:
    """`logprobs`, a number for each token, or `prompt_logprobs` as vLLM writes them; of the first token: null."""
    found = row.get("logprobs") if row.get("logprobs") is not None else row.get("prompt_logprobs")
    if not isinstance(found, list):
        raise NotUsable("bad_values", "no list in logprobs or prompt_logprobs")
    if len(found) != len(ids):
        raise NotUsable("bad_values", f"{len(found)} log-probabilities of {len(ids)} tokens")
    values_T = np.array([_number(one, at, int(ids[at])) for at, one in enumerate(found)], np.float32)
    return {"target_logprob": np.append(values_T[1:], np.float32(np.nan))}


def _number(one: Any, at: int, token: int) -> float:
    if isinstance(one, dict):
        if str(token) not in one:
            raise NotUsable(
                "other_tokens", f"token {at} is {token}, and only {', '.join(one) or 'none'} is rated there"
            )
        one = one[str(token)]
        one = one.get("logprob") if isinstance(one, dict) else one
    if one is not None and (isinstance(one, bool) or not isinstance(one, float | int)):
        raise NotUsable("bad_values", f"token {at}: {str(one)[:40]!r} is no log-probability")
    return float("nan") if one is None else float(one)


def _states(path: Path, ids: Int32s, layers: Sequence[int]) -> dict[str, npt.NDArray[Any]]:
    """`hidden_states` [T, layers, D], or [T, D] of one layer, as vLLM and speculators write them."""
    with safe_open(path, framework="pt") as file:
        states = file.get_tensor("hidden_states")
    states_TLD = (states[:, None] if states.ndim == 2 else states).float().numpy()
    if states_TLD.ndim != 3 or states_TLD.shape[:2] != (len(ids), len(layers)):
        found = " x ".join(map(str, states.shape))
        raise NotUsable(
            "bad_values", f"states of {found} for {len(ids)} tokens and --layers {','.join(map(str, layers))}"
        )
    return {f"hidden@{layer}": states_TLD[:, at] for at, layer in enumerate(layers)}


def _largest(row: Given, ids: Int32s) -> dict[str, npt.NDArray[Any]]:
    """The largest log-probabilities of each token but the last, as DistillKit packs them; their logsumexp is 0."""
    how = read_compression(row["folder"])
    try:
        classes_Pk, values_Pk = unpack_row(row, how)
    except (ValueError, TypeError, OverflowError) as error:
        raise NotUsable("bad_values", str(error)) from error
    if len(classes_Pk) != len(ids) - 1:
        raise NotUsable("bad_values", f"{len(classes_Pk)} positions of {len(ids)} tokens")
    columns = {f"topk_ids#{how.k}": classes_Pk, f"topk_logits#{how.k}": values_Pk}
    columns["logsumexp"] = np.zeros(len(classes_Pk), np.float32)
    return {name: np.concatenate([values, values[-1:]]) for name, values in columns.items()}  # of the last: not read

"""Rows of the cache as padded batches.

Shape legend: see batch.py. T counts all tokens of one teacher row.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from xkd_schemas.cache.table import Row
from xkd_schemas.codecs import unpack_classes
from xkd_schemas.documents import POLICY
from xkd_schemas.errors import BadData
from xkd_schemas.signals import KINDS, Signal, draw_spans
from xkd_schemas.text.alignment import token_ranges
from xkd_schemas.tokens import END, kept_mask, kept_rows, last_text, predictors, tokens_at
from xkd_trainer.data.batch import Batch, Level, TokenStates, signal_fields
from xkd_trainer.data.cache import Cache, layers_of
from xkd_trainer.models.measures import unpack_triangle
from xkd_trainer.models.padding import pad

Array = npt.NDArray[Any]
RowArrays = dict[str, Array]
"""Arrays of one row, named like the fields of Batch; names with a blank are no tensors of it."""


class DocumentRow(NamedTuple):
    """One document of a cache, with the signals that were asked for."""

    row: int
    arrays: RowArrays
    wanted: frozenset[Signal]
    others: tuple["DocumentRow", ...] = ()
    """The same document with the signals of further teachers."""


def batch_of(cache: Cache, rows: Sequence[int], wanted: frozenset[Signal]) -> Batch:
    """The batch of some rows of the cache, with the signals that were asked for.

    Raises:
        BadData: A shard is corrupt, or the tables disagree about a row.
    """
    return stack_rows([read_row(cache, int(row), wanted) for row in rows])


def stack_rows(documents: Sequence[DocumentRow]) -> Batch:
    """The batch of documents that were read before, with the signals that were read."""
    samples, wanted = [document.arrays for document in documents], documents[0].wanted
    data: dict[str, Any] = {name: pad([s[name] for s in samples]) for name in samples[0] if " " not in name}
    levels = tuple(_level(layer, unit, samples, wanted) for layer, unit in layers_of(wanted))
    states: dict[int, dict[str, Tensor]] = {}
    for signal in wanted:
        if signal.name in _TOKEN_FIELDS and signal.layer is not None:
            values = pad([s[f"tokens {signal.column}"] for s in samples])
            states.setdefault(signal.layer, {})[_TOKEN_FIELDS[signal.name]] = values
    token_states = tuple(TokenStates(layer=layer, **found) for layer, found in sorted(states.items()))
    others = tuple(map(stack_rows, zip(*(document.others for document in documents), strict=True)))
    return Batch(
        rows=tuple(document.row for document in documents), policies=tuple(str(s["row policy"]) for s in samples),
        levels=levels, token_states=token_states, others=others, **data,
    )  # fmt: skip


def read_row(cache: Cache, row: int, wanted: frozenset[Signal]) -> DocumentRow:
    """One row, with the signals that were asked for, of every teacher; raises as `batch_of`."""
    arrays = _read_arrays(*cache.at(row), wanted)
    others = tuple(read_row(other, row, signals) for other, signals in cache.others)
    for other, (of, _) in zip(others, cache.others, strict=True):
        if not all(np.array_equal(arrays[name], other.arrays[name]) for name in ("student_ids_BS", "predict_BN")):
            raise BadData(f"row {row} has other student tokens in {cache.root} than in {of.root}")
    return DocumentRow(row, arrays, wanted, others)


def _read_arrays(cache: Cache, row: int, wanted: frozenset[Signal]) -> RowArrays:
    tables = cache.documents, cache.teachers, cache.students
    document, teacher, student = (table[row] for table in tables)
    if not document["doc_id"] == teacher["doc_id"] == student["doc_id"]:
        ids = {table.name: table[row]["doc_id"] for table in tables}
        raise BadData(f"{cache.root}: row {row} is another document in each table: {json.dumps(ids)}")
    columns = {s.name: s.column for s in cache.signals if s.kind.top}
    return {
        "row policy": np.array(document.get(POLICY, "")),
        **_student_arrays(student),
        **_teacher_arrays(teacher, wanted, columns),
        **_alignment_arrays(student, teacher, row),
        **_level_arrays(document, student, teacher, wanted),
    }


def _true(count: int) -> Array:
    return np.ones(count, np.bool_)


def _student_arrays(student: Row) -> dict[str, Array]:
    ids = student["token_ids"].astype(np.int64)
    predict = predictors(student["targets"])
    return {
        "student_ids_BS": ids,
        "student_valid_BS": _true(len(ids)),
        "student_text_B1": np.array([last_text(student["token_kinds"])]),
        "predict_BN": predict,
        "target_BN": ids[predict + 1],
        "predict_valid_BN": _true(len(predict)),
    }


def _teacher_arrays(teacher: Row, wanted: frozenset[Signal], columns: Mapping[str, str]) -> dict[str, Array]:
    """The teacher's predictions, and the signals of them and of all tokens; `columns` of those with classes."""
    ids, targets = teacher["token_ids"].astype(np.int64), teacher["targets"]
    kept_T, predict = kept_mask(targets), predictors(targets)
    arrays = {
        "teacher_valid_BR": _true(int(np.count_nonzero(kept_T))),
        "teacher_predict_BM": _before(kept_T)[predict],
        "teacher_input_BM": ids[predict],
        "teacher_target_BM": ids[predict + 1],
        "teacher_predict_valid_BM": _true(len(predict)),
    }
    for signal in wanted:
        if signal.name in _FIELDS:
            arrays |= _signal_array(teacher, signal.name, columns.get(signal.name, signal.column))
        elif signal.name in _TOKEN_FIELDS:
            arrays |= {
                "teacher_ids_BT": ids,
                "teacher_valid_BT": _true(len(ids)),
                "teacher_kept_BR": kept_rows(targets),
            }
            arrays[f"tokens {signal.column}"] = teacher[signal.column]
    return arrays


_FIELDS: Final = signal_fields(Batch)  # signals without a layer; `sampled` is two fields
_TOKEN_FIELDS: Final = signal_fields(TokenStates)  # signals of all tokens of a layer


def _signal_array(teacher: Row, name: str, column: str) -> dict[str, Array]:
    """One such signal of one row; numbers of classes as int64, what is kept of all tokens at the kept rows."""
    values = teacher[column]
    if KINDS[name].per == "T":
        values = values[kept_rows(teacher["targets"])]
    if name == "sampled":
        ids, weights = unpack_classes(values)
        return {_FIELDS[name]: ids, "teacher_sampled_weights_BMK": weights}
    return {_FIELDS[name]: values.astype(np.int64) if values.dtype == np.int32 else values}


def _alignment_arrays(student: Row, teacher: Row, row: int) -> dict[str, Array]:
    """Aligned spans inside the targets, and exact pairs of predictions."""
    s_KR, t_KR = student["student_spans"].astype(np.int64), student["teacher_spans"].astype(np.int64)
    s_target, t_target = student["targets"], teacher["targets"]
    if len(t_KR) and (t_KR[:, 1].max() > len(t_target) or s_KR[:, 1].max() > len(s_target)):
        raise BadData(f"row {row}: an aligned span lies outside the tokens of its document")
    inside = s_target[s_KR[:, 0]] & t_target[t_KR[:, 0]]
    s_KR, t_KR = s_KR[inside], t_KR[inside]
    (s_first, s_end), (t_first, t_end) = s_KR.T, t_KR.T
    t_row = _before(kept_mask(t_target))[t_first]
    exact = (s_end - s_first == 1) & (t_end - t_first == 1) & (s_first > 0) & (t_first > 0)
    pairs = (_before(target[1:])[first[exact] - 1] for target, first in ((s_target, s_first), (t_target, t_first)))
    pairs_E2 = np.stack([*pairs], axis=1)
    return {
        "span_student_BK2": s_KR,
        "span_teacher_BK2": np.stack([t_row, t_row + t_end - t_first], axis=1),
        "span_valid_BK": _true(len(s_KR)),
        "span_text_BK": student["token_kinds"][s_first] != END,
        "pairs_BE2": pairs_E2,
        "pair_valid_BE": _true(len(pairs_E2)),
    }


def _before(mask_T: Array) -> Array:
    """How many True stand before each position, [T] int64: the place of a True among them."""
    count_T: Array = np.cumsum(mask_T)
    count_T -= mask_T
    return count_T


def _level_arrays(document: Row, student: Row, teacher: Row, wanted: frozenset[Signal]) -> dict[str, Array]:
    arrays = {f"level {signal.column}": teacher[signal.column] for signal in wanted if signal.kind.unit}
    for unit in {signal.unit for signal in wanted if signal.unit}:
        read = min(len(teacher[s.column]) for s in wanted if s.unit == unit and s.name == "span_mass")
        spans = document[f"{unit}s"][:read]  # those that the teacher has read
        ranges = student[f"{unit}_tokens"][:read].astype(np.int64)
        targets = document["segments"][np.asarray(document["targets"], np.bool_)]
        arrays |= {
            f"level {unit} student": ranges,
            f"level {unit} teacher": _kept_ranges(teacher, spans),
            f"level {unit} seen": ranges[:, 1] > ranges[:, 0],
            f"level {unit} in_phrase": inside_any(spans, document["phrases"]) if unit == "word" else _true(len(spans)),
            f"level {unit} in_target": inside_any(spans, targets),
        }
    return arrays


def _kept_ranges(teacher: Row, spans: Array) -> Array:
    """Words or phrases as ranges of the kept teacher rows, [U, 2]; (0, 0) for those not whole in a target."""
    targets = teacher["targets"]
    ranges = token_ranges([tokens_at(teacher)], [spans])[0].astype(np.int64)
    whole = (ranges[:, 1] > ranges[:, 0]) & np.append(targets, False)[ranges[:, 0]]
    first = np.searchsorted(kept_rows(targets), ranges[:, 0])
    return np.where(whole[:, None], np.stack([first, first + ranges[:, 1] - ranges[:, 0]], axis=1), 0)


def inside_any(spans: Array, outer: Array) -> Array:
    """Which of `spans` [U, 2] lie inside one of `outer` [P, 2], [U] bool.

    >>> inside_any(np.array([[0, 2], [3, 5]]), np.array([[0, 4]]))
    array([ True, False])
    """
    if len(outer) == 0 or len(spans) == 0:
        return np.zeros(len(spans), np.bool_)
    starts, ends = outer[:, 0], np.maximum.accumulate(outer[np.argsort(outer[:, 0], kind="stable")][:, 1])
    place = np.searchsorted(np.sort(starts), spans[:, 0], side="right") - 1
    return np.asarray((place >= 0) & (ends[np.maximum(place, 0)] >= spans[:, 1]))


def _pairs_of(stored: Array, count: int, drawn: Array) -> Array:
    """The packed cosines of the drawn spans; earlier versions stored those of all spans of any document."""
    if len(drawn) == count or len(stored) != count * (count - 1) // 2:
        return stored
    first, second = np.triu_indices(len(drawn), 1)
    i, j = drawn[first], drawn[second]
    picked: Array = stored[i * (2 * count - i - 1) // 2 + j - i - 1]
    return picked


def _level(layer: int, unit: str, samples: Sequence[dict[str, Array]], wanted: frozenset[Signal]) -> Level:
    def stack(name: str) -> Tensor:
        return pad([s[f"level {name}"] for s in samples])

    mass, geometry, vectors = (Signal(f"span_{name}", layer, unit) for name in ("mass", "geometry", "vectors"))
    cosines_BPP = paired_BP = None
    if geometry in wanted:
        counts = [len(s[f"level {unit} seen"]) for s in samples]
        paired = [np.arange(count) if (drawn := draw_spans(count)) is None else drawn for count in counts]
        sizes = [len(spans) for spans in paired]
        cosines_BPP = torch.zeros(len(samples), max(1, *sizes), max(1, *sizes))
        for cosines_PP, sample, count, spans in zip(cosines_BPP, samples, counts, paired, strict=True):
            packed = _pairs_of(sample[f"level {geometry.column}"], count, spans).astype(np.float32)
            cosines_PP[: len(spans), : len(spans)] = unpack_triangle(torch.from_numpy(packed), len(spans))
        if sizes != counts:
            paired_BP = pad([spans + 1 for spans in paired]) - 1
    mass_BU = stack(mass.column)
    return Level(
        layer=layer,
        unit=unit,
        student_BU2=stack(f"{unit} student"),
        teacher_BU2=stack(f"{unit} teacher"),
        valid_BU=stack(f"{unit} seen") & (mass_BU > 0),  # a span the teacher has no token in has no mass
        in_phrase_BU=stack(f"{unit} in_phrase"),
        in_target_BU=stack(f"{unit} in_target"),
        mass_BU=mass_BU,
        cosines_BUU=cosines_BPP,
        paired_BP=paired_BP,
        vectors_BUD=stack(vectors.column) if vectors in wanted else None,
    )

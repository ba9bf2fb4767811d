"""Rows of the cache as padded batches.

Shape legend: see batch.py. T counts all tokens of one teacher row.
"""

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from xkd_schemas.cache.table import Row
from xkd_schemas.codecs import unpack_classes
from xkd_schemas.errors import BadData
from xkd_schemas.signals import KINDS, Signal
from xkd_schemas.text.alignment import token_ranges
from xkd_schemas.tokens import END, OK, Tokens, kept_mask, kept_rows, last_text, predictors
from xkd_trainer.data.batch import Batch, Level, TokenStates
from xkd_trainer.data.cache import Cache, layers_of
from xkd_trainer.models.measures import unpack_triangle
from xkd_trainer.models.padding import pad

Array = npt.NDArray[Any]


def batch_of(cache: Cache, rows: Sequence[int], wanted: frozenset[Signal]) -> Batch:
    """The batch of some rows of the cache, with the signals that were asked for.

    Raises:
        BadData: A shard is corrupt, or the tables disagree about a row.
    """
    samples = [_sample(cache, int(row), wanted) for row in rows]
    data: dict[str, Any] = {name: pad([s[name] for s in samples]) for name in samples[0] if " " not in name}
    levels = tuple(_level(layer, unit, samples, wanted) for layer, unit in layers_of(tuple(wanted)))
    return Batch(rows=tuple(int(r) for r in rows), levels=levels, token_states=_token_states(samples, wanted), **data)


def _sample(cache: Cache, row: int, wanted: frozenset[Signal]) -> dict[str, Array]:
    """Arrays of one row, named like the fields of Batch; names with a blank are of a Level or TokenStates."""
    cache, row = cache.at(row)
    cache.same_document(row)
    document, teacher, student = cache.documents[row], cache.teachers[row], cache.students[row]
    sample = _student_arrays(student)
    stored = {s.name: s.column for s in cache.signals if s.kind.top}
    sample |= _teacher_arrays(teacher)
    for signal in wanted:
        if signal.name in _FIELDS:
            sample |= _signal_array(teacher, signal.name, stored.get(signal.name, signal.column))
    if states := [s for s in wanted if s.name in _TOKEN_FIELDS]:
        sample |= _token_arrays(teacher, states)
    sample |= _alignment_arrays(student, teacher, row)
    if any(s.kind.unit for s in wanted):
        sample |= _level_arrays(document, student, teacher, wanted)
    return sample


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


def _teacher_arrays(teacher: Row) -> dict[str, Array]:
    """What one row of the teacher's table gives whatever the losses."""
    ids, targets = teacher["token_ids"].astype(np.int64), teacher["targets"]
    kept_T, predict = kept_mask(targets), predictors(targets)
    return {
        "teacher_valid_BR": _true(int(np.count_nonzero(kept_T))),
        "teacher_predict_BM": _before(kept_T)[predict],
        "teacher_input_BM": ids[predict],
        "teacher_target_BM": ids[predict + 1],
        "teacher_predict_valid_BM": _true(len(predict)),
    }


_FIELDS: Final = {
    "hidden_last": "teacher_hidden_BRD",
    "attention_last": "teacher_attention_BR",
    "entropy": "teacher_entropy_BM",
    "argmax": "teacher_argmax_BM",
    "logsumexp": "teacher_logsumexp_BM",
    "topk_logits": "teacher_topk_logits_BMK",
    "topk_ids": "teacher_topk_ids_BMK",
    "sampled": "teacher_sampled_ids_BMK",
}
"""Signals without a layer, and the field of Batch that each is; `sampled` is two."""


def _signal_array(teacher: Row, name: str, column: str) -> dict[str, Array]:
    """One such signal of one row; numbers of classes as int64, what is kept of all tokens at the kept rows."""
    values = teacher[column]
    if KINDS[name].per == "T":
        values = values[kept_rows(teacher["targets"])]
    if name == "sampled":
        ids, weights = unpack_classes(values)
        return {_FIELDS[name]: ids, "teacher_sampled_weights_BMK": weights}
    return {_FIELDS[name]: values.astype(np.int64) if values.dtype == np.int32 else values}


_TOKEN_FIELDS: Final = {
    "hidden": "hidden_BTD",
    "attention": "attention_BT",
    "attention_text": "attention_text_BT",
    "centrality": "centrality_BT",
}
"""Signals of all tokens of a layer, and the field of TokenStates that each is."""


def _token_arrays(teacher: Row, wanted: Sequence[Signal]) -> dict[str, Array]:
    """All tokens of one row, and the signals of them."""
    ids = teacher["token_ids"].astype(np.int64)
    kept = kept_rows(teacher["targets"])
    arrays = {"teacher_ids_BT": ids, "teacher_valid_BT": _true(len(ids)), "teacher_kept_BR": kept}
    return arrays | {f"tokens {signal.column}": teacher[signal.column] for signal in wanted}


def _token_states(samples: Sequence[dict[str, Array]], wanted: frozenset[Signal]) -> tuple[TokenStates, ...]:
    def stacked(name: str, layer: int) -> Tensor | None:
        signal = Signal(name, layer)
        return pad([s[f"tokens {signal.column}"] for s in samples]) if signal in wanted else None

    layers = sorted({s.layer for s in wanted if s.name in _TOKEN_FIELDS and s.layer is not None})
    fields = {layer: {field: stacked(name, layer) for name, field in _TOKEN_FIELDS.items()} for layer in layers}
    return tuple(TokenStates(layer=layer, **found) for layer, found in fields.items())


def _alignment_arrays(student: Row, teacher: Row, row: int) -> dict[str, Array]:
    """Aligned spans inside the targets, and exact pairs of predictions."""
    s_KR, t_KR = student["student_spans"].astype(np.int64), student["teacher_spans"].astype(np.int64)
    s_target, t_target = student["targets"], teacher["targets"]
    if len(t_KR) and (t_KR[:, 1].max() > len(t_target) or s_KR[:, 1].max() > len(s_target)):
        raise BadData(f"row {row}: an aligned span lies outside the tokens of its document")
    inside = s_target[s_KR[:, 0]] & t_target[t_KR[:, 0]]
    if not inside.all():
        s_KR, t_KR = s_KR[inside], t_KR[inside]
    s_first, t_first = s_KR[:, 0], t_KR[:, 0]
    s_size, t_size = s_KR[:, 1] - s_first, t_KR[:, 1] - t_first
    teacher_K2 = np.empty_like(t_KR)
    teacher_K2[:, 0] = _before(kept_mask(t_target))[t_first]
    np.add(teacher_K2[:, 0], t_size, out=teacher_K2[:, 1])
    exact = (s_size == 1) & (t_size == 1) & (s_first > 0) & (t_first > 0)
    pairs_E2 = np.empty((int(np.count_nonzero(exact)), 2), np.int64)
    pairs_E2[:, 0] = _before(s_target[1:])[s_first[exact] - 1]
    pairs_E2[:, 1] = _before(t_target[1:])[t_first[exact] - 1]
    return {
        "span_student_BK2": s_KR,
        "span_teacher_BK2": teacher_K2,
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
    arrays: dict[str, Array] = {}
    phrases = document["phrases"]
    for unit, column in (("word", "words"), ("phrase", "phrases")):
        kept = [len(teacher[s.column]) for s in wanted if s.unit == unit and s.name == "span_mass"]
        spans = document[column][: min(kept, default=None)]  # those that the teacher has read
        ranges = student[f"{unit}_tokens"][: len(spans)].astype(np.int64)
        arrays[f"level {unit} student"] = ranges
        arrays[f"level {unit} teacher"] = _kept_ranges(teacher, spans)
        arrays[f"level {unit} seen"] = ranges[:, 1] > ranges[:, 0]
        arrays[f"level {unit} in_phrase"] = inside_any(spans, phrases) if unit == "word" else _true(len(spans))
        targets = document["segments"][np.asarray(document["targets"], np.bool_)]
        arrays[f"level {unit} in_target"] = inside_any(spans, targets)
    for signal in wanted:
        if signal.kind.unit:
            arrays[f"level {signal.column}"] = teacher[signal.column]
    return arrays


def _kept_ranges(teacher: Row, spans: Array) -> Array:
    """Words or phrases as ranges of the kept teacher rows, [U, 2]; (0, 0) for those not whole in a target."""
    targets = teacher["targets"]
    tokens = Tokens(
        status=OK, num_chars=teacher["num_chars"], ids=teacher["token_ids"], spans=teacher["token_spans"],
        kinds=teacher["token_kinds"], targets=targets,
    )  # fmt: skip
    ranges = token_ranges([tokens], [spans])[0].astype(np.int64)
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


def _level(layer: int, unit: str, samples: Sequence[dict[str, Array]], wanted: frozenset[Signal]) -> Level:
    def column(name: str) -> str:
        return f"level {Signal(name, layer, unit).column}"

    def stacked(name: str) -> Tensor:
        return pad([s[f"level {unit} {name}"] for s in samples])

    cosines = vectors = None
    if Signal("span_geometry", layer, unit) in wanted:
        most = max(1, *(len(s[f"level {unit} seen"]) for s in samples))
        cosines = torch.zeros(len(samples), most, most)
        for number, sample in enumerate(samples):
            count = len(sample[f"level {unit} seen"])
            packed = torch.from_numpy(sample[column("span_geometry")].astype(np.float32))
            cosines[number, :count, :count] = unpack_triangle(packed, count)
    if Signal("span_vectors", layer, unit) in wanted:
        vectors = pad([s[column("span_vectors")] for s in samples])
    mass_BU = pad([s[column("span_mass")] for s in samples])
    return Level(
        layer=layer,
        unit=unit,
        student_BU2=stacked("student"),
        teacher_BU2=stacked("teacher"),
        valid_BU=stacked("seen") & (mass_BU > 0),  # a span the teacher has no token in has no mass
        in_phrase_BU=stacked("in_phrase"),
        in_target_BU=stacked("in_target"),
        mass_BU=mass_BU,
        cosines_BUU=cosines,
        vectors_BUD=vectors,
    )

"""From one batch of teacher states to the columns of each document.

Shape legend for this file
    B documents    L tokens of the longest    T tokens of one document    R kept rows    N predictions
    K words or phrases    D width    V vocabulary    k largest or drawn classes of a prediction
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from xkd_schemas.codecs import TOTAL, pack_classes
from xkd_schemas.durable_files import xxh3_of
from xkd_schemas.signals import Signal, draw_spans
from xkd_schemas.tokens import Int32s, Tokens, kept_rows, predictors
from xkd_trainer.models.architecture import Head
from xkd_trainer.models.forward import States
from xkd_trainer.models.measures import (
    OF_LOGITS,
    OF_STATES,
    at_least_float32,
    cosine_matrix,
    pack_triangle,
    pool_spans,
    target_log_probability,
)
from xkd_trainer.models.padding import pad

LOGIT_BYTES = 64 * 2**20  # logits are made for so many bytes of positions at a time
DRAW_ELEMENTS = 1 << 19  # probabilities of which classes are drawn at a time
ROWS: Final = {"attention": "attention_layers", "attention_text": "text_layers"}
"""Signals that are one row of a block's attention map, and where `States` has it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """One document as the teacher tokenized it, with its words and phrases as token ranges."""

    tokens: Tokens
    ranges: dict[str, Int32s]  # "word" and "phrase" -> [K, 2]


def pad_readings(readings: Sequence[Reading], multiple: int) -> tuple[Tensor, Tensor]:
    """Token ids and validity, [B, L] with L a multiple of `multiple`, padded on the right with 0."""
    lengths_B = torch.tensor([len(r.tokens.ids) for r in readings])
    length = -(-int(lengths_B.max()) // multiple) * multiple
    ids_BL = pad([r.tokens.ids.astype(np.int64) for r in readings])
    ids_BL = torch.nn.functional.pad(ids_BL, (0, length - ids_BL.shape[1]))
    return ids_BL, torch.arange(length) < lengths_B[:, None]


def bf16_bits(values: Tensor) -> Any:
    """The bits of bfloat16 numbers as a uint16 array."""
    return values.to(torch.bfloat16).contiguous().cpu().view(torch.int16).numpy().view(np.uint16)


def signals_of(
    readings: Sequence[Reading],
    states: States,
    valid_BL: Tensor,
    head: Head,
    wanted: Sequence[Signal],
    classes: int | None = None,
) -> list[dict[str, Any]]:
    """One dict (column name -> array) for each document of the batch.

    Drawn classes and rounded cosines also have COLUMN.lost and COLUMN.kept: squared error, and what it is a part of.
    Draws are from the first `classes` rows of the head; None is all.
    """
    rows: list[dict[str, Any]] = [{} for _ in readings]
    _read_predictions(readings, states, head, wanted, rows, classes)
    of_layers = {("centrality" if s.kind.unit else s.name, s.layer) for s in wanted if s.layer is not None}
    measured = {key: OF_STATES[key[0]](states.layers[key[1]], valid_BL) for key in of_layers if key[0] in OF_STATES}
    for signal in wanted:
        if signal.kind.per in {"T", "R"}:
            values = _token_values(signal, states, measured)
            for number, reading in enumerate(readings):
                rows[number][signal.column] = _cut_row(signal, values[number], reading.tokens)
    for layer, unit in {(s.layer, s.unit) for s in wanted if s.layer is not None and s.unit is not None}:
        ranges_BK2 = pad([r.ranges[unit].astype(np.int64) for r in readings]).to(states.layers[layer].device)
        vectors_BKD, mass_BK = pool_spans(states.layers[layer], measured["centrality", layer], ranges_BK2)
        for signal in (s for s in wanted if (s.layer, s.unit) == (layer, unit)):
            for number, reading in enumerate(readings):
                spans = len(reading.ranges[unit])
                rows[number] |= _span_signal(signal, vectors_BKD[number, :spans], mass_BK[number, :spans])
    return rows


def _token_values(signal: Signal, states: States, measured: Mapping[tuple[str, int], Tensor]) -> Any:
    """[B, L] or [B, L, D], of which a signal of tokens is a part."""
    if signal.layer is None:
        return states.last_BLD if signal.kind.wide else states.attention_BL
    if signal.name in OF_STATES:
        return measured[signal.name, signal.layer]
    return (states.layers if signal.kind.wide else getattr(states, ROWS[signal.name]))[signal.layer]


def _cut_row(signal: Signal, values: Tensor, tokens: Tokens) -> Any:
    """The kept rows of one document, or all of its tokens, without padding."""
    if signal.kind.per == "R":
        values = values[torch.from_numpy(kept_rows(tokens.targets)).to(values.device)]
    else:
        values = values[: len(tokens.ids)]
    return bf16_bits(values) if signal.kind.wide else values.cpu().numpy()


def _read_predictions(
    readings: Sequence[Reading],
    states: States,
    head: Head,
    wanted: Sequence[Signal],
    rows: list[dict[str, Any]],
    classes: int | None,
) -> None:
    signals = [s for s in wanted if s.kind.per == "N"]
    if not signals:
        return
    read = [(r.tokens.ids, predictors(r.tokens.targets)) for r in readings]
    hidden_ND = torch.cat([states.last_BLD[i, torch.from_numpy(p)] for i, (_, p) in enumerate(read)])
    random_N2 = np.concatenate([uniforms(ids, len(p)) for ids, p in read])
    step = max(1, LOGIT_BYTES // (4 * head.weight_VD.shape[0]))
    target_N = torch.from_numpy(np.concatenate([ids[p + 1] for ids, p in read]))
    sides = hidden_ND, target_N.to(hidden_ND.device, torch.int64), torch.from_numpy(random_N2)
    chunks = zip(*(torch.split(side, step) for side in sides), strict=True)
    parts = [_read_logits(head(chunk_ND), target_C, part, signals, classes) for chunk_ND, target_C, part in chunks]
    stats = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    ends = np.cumsum([len(p) for _, p in read])
    for name, values in stats.items():
        for row, own in zip(rows, np.split(values, ends[:-1]), strict=True):
            row[name] = own


def _read_logits(
    logits_NV: Tensor, target_N: Tensor, random_N2: Tensor, wanted: Sequence[Signal], classes: int | None
) -> dict[str, Any]:
    """Every column that is made of logits; those of the k largest are [N, k], the largest first."""
    names = {s.name for s in wanted}
    found: dict[str, Any] = {}
    for measures, measure in OF_LOGITS.items():
        if names & {*measures}:
            values = zip(measures, measure(logits_NV), strict=True)
            found |= {name: values_N.cpu().numpy() for name, values_N in values if name in names}
    if "target_logprob" in names:
        found["target_logprob"] = target_log_probability(logits_NV, target_N).cpu().numpy()
    for top in {s.top for s in wanted if s.top is not None and not s.kind.drawn}:
        logits_Nk, ids_Nk = logits_NV.float().topk(top, dim=-1)
        found |= {f"topk_logits#{top}": logits_Nk.cpu().numpy(), f"topk_ids#{top}": ids_Nk.cpu().numpy()}
    for signal in wanted:
        if signal.top is not None and signal.kind.drawn:
            draw = draw_classes(logits_NV[:, :classes], random_N2, signal.top)
            found[signal.column] = draw.entries_Nk
            found |= {f"{signal.column}.lost": draw.lost_N, f"{signal.column}.kept": draw.kept_N}
    return found


def _span_signal(signal: Signal, vectors_KD: Tensor, mass_K: Tensor) -> dict[str, Any]:
    if signal.name == "span_mass":
        return {signal.column: mass_K.cpu().numpy()}
    if signal.name == "span_vectors":
        return {signal.column: bf16_bits(vectors_KD)}
    drawn = draw_spans(len(vectors_KD))
    if drawn is not None:
        vectors_KD = vectors_KD[torch.from_numpy(drawn).to(vectors_KD.device)]
    exact = pack_triangle(cosine_matrix(vectors_KD[None].float())[0]).cpu().numpy()
    stored = exact.astype(np.float16)
    lost, kept = (np.square(values, dtype=np.float64).sum() for values in (exact - stored, exact))
    return {signal.column: stored, f"{signal.column}.lost": lost, f"{signal.column}.kept": kept}


# A few classes of each prediction, drawn so that they stand for the whole distribution, right on average.
#
# Random-sampling distillation (arXiv 2503.16870) draws classes with replacement and keeps how often each came. Here a
# prediction keeps k different classes, drawn by threshold: those so likely that they would be drawn anyway keep their
# probability, the others share the rest evenly and are drawn in proportion to theirs. No unbiased draw of k classes
# has a smaller expected squared error (arXiv 0803.0473). docs/decisions says what that gains.


@dataclass(frozen=True, kw_only=True, slots=True)
class Draw:
    """What was drawn, and how far it is from what it stands for."""

    entries_Nk: npt.NDArray[np.int32]  # as `xkd_schemas.codecs` has them
    lost_N: npt.NDArray[np.float64]  # sum over classes of (share / TOTAL - probability) squared
    kept_N: npt.NDArray[np.float64]  # sum over classes of the squared probability


def uniforms(token_ids: Int32s, count: int) -> npt.NDArray[np.float64]:
    """Numbers from 0 to below 1, [count, 2]: a function of the document's tokens and nothing else.

    >>> uniforms(np.array([5, 6], np.int32), 3).tolist() == uniforms(np.array([5, 6], np.int32), 9)[:3].tolist()
    True
    """
    key = int(xxh3_of(np.ascontiguousarray(token_ids, "<i4").tobytes()), 16)
    raw = np.random.Philox(key=key).random_raw(2 * count)
    return np.asarray((raw >> np.uint64(11)) * 2.0**-53).reshape(count, 2)


@torch.no_grad()
def draw_classes(logits_NV: Tensor, uniforms_N2: Tensor, k: int) -> Draw:
    """k classes of each prediction, with the shares that stand for softmax of the logits.

    The likeliest class would be drawn in any case and keeps 0.7; one of the other two stands for the rest.

    >>> logits = torch.tensor([[0.7, 0.2, 0.1]]).log()
    >>> classes, shares = np.divmod(draw_classes(logits, torch.tensor([[0.5, 0.5]]), 2).entries_Nk, TOTAL + 1)
    >>> classes.tolist(), (shares / TOTAL).round(3).tolist()
    ([[0, 1]], [[0.7, 0.3]])

    A logit of -inf is a class that cannot be. Of two uniforms one draws the classes, the other rounds their shares.
    """
    step = max(1, DRAW_ELEMENTS // logits_NV.shape[-1])
    chunks = zip(torch.split(logits_NV, step), torch.split(uniforms_N2, step), strict=True)
    entries, lost, kept = zip(*(_draw_chunk(*chunk, k) for chunk in chunks), strict=True)
    return Draw(entries_Nk=np.concatenate(entries), lost_N=np.concatenate(lost), kept_N=np.concatenate(kept))


def _draw_chunk(logits_NV: Tensor, uniforms_N2: Tensor, k: int) -> tuple[npt.NDArray[np.int32], Tensor, Tensor]:
    p_NV = at_least_float32(logits_NV).softmax(-1)
    u_N2 = uniforms_N2.to(p_NV.device, torch.float64)
    classes_Nk, weights_Nk = _threshold_sample(p_NV, u_N2[:, :1], k)
    order_Nk = classes_Nk.argsort(-1)
    classes_Nk, weights_Nk = classes_Nk.gather(-1, order_Nk), weights_Nk.gather(-1, order_Nk)
    shares_Nk = _whole_shares(weights_Nk, u_N2[:, 1:])
    kept_N = torch.linalg.vecdot(p_NV, p_NV).double()
    stored_Nk = shares_Nk.double() / TOTAL
    lost_N = kept_N + (stored_Nk.square() - 2 * stored_Nk * p_NV.gather(-1, classes_Nk)).sum(-1)
    return pack_classes(classes_Nk.cpu().numpy(), shares_Nk.cpu().numpy()), lost_N.clamp_min(0.0).cpu(), kept_N.cpu()


def _threshold_sample(p_NV: Tensor, u_N1: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """k classes of each row and their float64 weights, which add up to 1 if the row does.

    The h likeliest are kept; the rest is drawn at k - h even steps along its running sum, from where u says. h is the
    least number for which no step is shorter than a class, so no class is drawn twice.
    """
    top_Nk, likeliest_Nk = p_NV.topk(k, dim=-1)
    rest_NV = p_NV.scatter(-1, likeliest_Nk, 0.0)
    above_Nk = top_Nk.double().flip(-1).cumsum(-1).flip(-1)  # not 1 less a running sum, which would cancel
    rest_Nk = rest_NV.sum(-1, keepdim=True).double() + above_Nk
    place_k = torch.arange(k, device=p_NV.device)
    fits_Nk = (k - place_k) * top_Nk.double() <= rest_Nk
    fits_Nk[:, -1] = True
    h_N1 = fits_Nk.int().argmax(-1, keepdim=True)
    kept_Nk = place_k < h_N1
    rest_NV.scatter_(-1, likeliest_Nk, torch.where(kept_Nk, 0.0, top_Nk))
    tail_NV = rest_NV.cumsum_(-1)
    rest_N1 = tail_NV[:, -1:].contiguous()
    step_N1 = rest_N1.double() / (k - h_N1)
    points_Nk = ((place_k - h_N1 + u_N1) * step_N1).clamp_min(0.0).to(tail_NV.dtype)
    last_N1 = torch.searchsorted(tail_NV, rest_N1)
    found_Nk = torch.minimum(torch.searchsorted(tail_NV, points_Nk, right=True), last_N1)
    classes_Nk = torch.where(kept_Nk | (rest_N1 <= 0), likeliest_Nk, found_Nk)
    return classes_Nk, torch.where(kept_Nk, top_Nk.double(), step_N1)


def _whole_shares(weights_Nk: Tensor, u_N1: Tensor) -> Tensor:
    """Weights that add up to 1 as whole numbers that add up to TOTAL, each right on average over u.

    >>> _whole_shares(torch.tensor([[0.5, 0.5]]), torch.tensor([[0.25]])).tolist()
    [[2047, 2048]]
    """
    sums_Nk = weights_Nk.cumsum(-1) / weights_Nk.sum(-1, keepdim=True) * TOTAL
    sums_Nk[:, -1] = TOTAL
    ends_Nk = (sums_Nk + u_N1).floor().clamp_max(TOTAL).long()
    return ends_Nk.diff(dim=-1, prepend=ends_Nk.new_zeros(len(ends_Nk), 1))

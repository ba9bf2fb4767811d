"""MTA, Multi-Granular Trajectory Alignment (arXiv 2605.01374): words in a low layer, phrases in higher ones.

DSA compares how the spans of a document lie to each other in student and teacher: it needs the
teacher's cosines and span weights, no projector, and no shared tokenizer. Hid compares projected
student vectors with the teacher's. L = L_base + lambda_dsa L_DSA + lambda_hid L_Hid (eq. 14).

Where the paper and the authors' code differ, the settings below say so. One more difference: the
code keeps a span that has no token on one side, as a zero vector; here the caller marks it not valid.

A level is (teacher layer, word or phrase); layers are Hugging Face indices, 1 is the output of the first block.

Shape legend: see batch.py; in the functions K spans, or tokens for Hid on tokens, L tokens, D the teacher's width.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from xkd_schemas.errors import UsageError
from xkd_schemas.signals import Signal
from xkd_trainer.data.batch import Batch, Level, unwrap
from xkd_trainer.losses.declaration import (
    Context,
    Declaration,
    Levels,
    Loss,
    Projectors,
    Settings,
    StudentPass,
    Weight,
    uniform_weights,
)
from xkd_trainer.losses.ops.divergence import cosine_distance, pair_disagreement, pair_weights
from xkd_trainer.losses.ops.term import LossTerm, term
from xkd_trainer.losses.pairing import check_layers, find_same_tokens, fit, refuse_other_tokens
from xkd_trainer.models.measures import at_least_float32, centrality, cosine_matrix, divide, pool_spans


class MtaSettings(Settings):
    """Options of MTA; every default is ours, and its docstring names what paper and code do."""

    lambda_dsa: Weight = 2.0
    """Weight of DSA. Paper: 2 for GPT-2 and Qwen1.5, 3 for OPT; 0 turns it off."""
    lambda_hid: Weight = 0.2
    """Weight of Hid. Paper: 0.2, and 0.3 for OPT. The code has one weight, w (DSA + Hid / 10); 0 turns it off."""
    student_pooling: Literal["own", "teacher", "uniform"] = "own"
    """Token weights that pool the student's spans (eq. 8 leaves it open).

    own: centrality of the student's own states, without gradient (the code). teacher: the teacher's, for documents
    that both models read as the same ids; others are left out and counted. uniform: plain mean.
    """
    dsa_vectors: Literal["own", "projected"] = "own"
    """The student's span vectors that DSA compares. own: as they are (eq. 11). projected: P_l of them, a linear layer
    with bias, as in the authors' code for two tokenizers, which has no Hid beside it; with Hid both read one P_l."""
    hid: Literal["spans", "token", "off"] = "spans"
    """Vectors that Hid compares. spans: span vectors, weighted by the teacher's span weights; works across tokenizers.

    token: states of the tokens that spans cover, weighted by the teacher's token weights (eq. 13 and the code), for
    documents that both models read as the same ids; others are left out and counted. off: no Hid, as in the authors'
    cross-tokenizer code.
    """
    hid_layers: Literal["mean", "sum"] = "mean"
    """Over the picked layers. sum: eq. 13. mean: the code; lambda_hid then means the same for any number of layers."""
    word_spans: Literal["all", "in_phrases"] = "all"
    """Words of the word-level layer. all: the paper's text. in_phrases: the code, only words inside a kept phrase."""
    spans_over: Literal["all", "response"] = "all"
    """all: prompt and response, as paper and code do. response: spans of target segments only."""
    span_weights: Literal["centrality", "entropy", "uniform"] = "centrality"
    """Teacher token weights: their sum weighs a span, and they weigh the tokens of hid=token; they do not pool.

    centrality: eq. 5-7, 9. entropy: 1 - H_t / log V (an option of the code), known where the teacher predicts a token
    of the response and 0 elsewhere, so that spans of the prompt take no part. uniform: each span, and each token, 1
    ("no weights" of the ablation).
    """
    pick: Literal["cached", "strided"] = "cached"
    """Layers. cached: every cached level, beside the student layer at the same depth. strided (the paper): student
    layers from the top down, the lowest on words, the others on phrases, each beside phi(l) = floor(l N_T / N_S)."""
    num_layers: int = Field(default=3, ge=1)
    """Student layers that strided picks; 3 was the paper's best on GPT-2."""
    stride: int = Field(default=0, ge=0)
    """Distance of the layers that strided picks. 0: the student's depth over num_layers + 1, so that the lowest of
    three lies in the middle."""
    student_layers: tuple[int, ...] = ()
    """Student blocks (1 is the first), lowest first: one for each cached level, or those that strided takes. Empty:
    as `pick` says."""


def strided_layers(student_layers: int, num: int, stride: int) -> tuple[int, ...]:
    """Student layers from the top down, `stride` apart, in ascending order; those below 1 are not left out.

    >>> strided_layers(12, 3, 0), strided_layers(24, 6, 2)
    ((6, 9, 12), (14, 16, 18, 20, 22, 24))
    """
    step = stride or max(1, student_layers // (num + 1))
    return tuple(student_layers - step * n for n in reversed(range(num)))


def phi(layer: int, student_layers: int, teacher_layers: int) -> int:
    """The teacher layer beside a student layer: floor(l N_T / N_S), at least 1.

    >>> [phi(layer, 12, 48) for layer in (6, 9, 12)]
    [24, 36, 48]
    """
    return max(1, layer * teacher_layers // student_layers)


def sureness(entropy: Tensor, classes: int) -> Tensor:
    """1 - H / log V, from 0 for a teacher that knows nothing to 1 for one that is sure; any shape, nats.

    >>> sureness(torch.tensor([0.0, math.log(2.0), math.log(4.0)]), classes=4)
    tensor([1.0000, 0.5000, 0.0000])
    """
    return (1.0 - entropy / math.log(classes)).clamp(0.0, 1.0)


def find_covered(spans_BK2: Tensor, valid_BK: Tensor, length: int) -> Tensor:
    """Tokens that lie in some valid span, bool [B, L]: M_l of eq. 13.

    >>> find_covered(torch.tensor([[[0, 2], [1, 3], [4, 5]]]), torch.tensor([[True, True, False]]), 5)
    tensor([[ True,  True,  True, False, False]])
    """
    return (_is_inside(spans_BK2, length) & valid_BK.unsqueeze(-1)).any(1)


def range_sums(weights_BL: Tensor, spans_BK2: Tensor) -> Tensor:
    """Sum of the weights inside each half-open range, [B, K]; 0 for an empty one.

    >>> range_sums(torch.tensor([[0.5, 0.25, 0.125]]), torch.tensor([[[0, 2], [1, 3], [0, 0]]]))
    tensor([[0.7500, 0.3750, 0.0000]])
    """
    return torch.where(_is_inside(spans_BK2, weights_BL.shape[1]), weights_BL.unsqueeze(1), 0.0).sum(-1)


def _is_inside(spans_BK2: Tensor, length: int) -> Tensor:
    """Which tokens lie in each span, bool [B, K, L]."""
    place_L = torch.arange(length, device=spans_BK2.device)
    return (place_L >= spans_BK2[..., :1]) & (place_L < spans_BK2[..., 1:])


def span_weights(mass_BK: Tensor, valid_BK: Tensor) -> Tensor:
    """Each document's span masses divided by their sum (eq. 9), [B, K], without gradient; 0 where not valid.

    What `dsa` and `hid` are given, for eq. 9 and for the code: both then weigh documents nearly alike,
    however much of a document its spans cover.

    >>> span_weights(torch.tensor([[0.1, 0.3, 0.6]]), torch.tensor([[True, True, False]]))
    tensor([[0.2500, 0.7500, 0.0000]])
    """
    mass_BK = torch.where(valid_BK, at_least_float32(mass_BK.detach()), 0.0)
    return divide(mass_BK, mass_BK.sum(-1, keepdim=True))


def dsa(student_cosines_BKK: Tensor, teacher_cosines_BKK: Tensor, omega_BK: Tensor, valid_BK: Tensor) -> LossTerm:
    """Disagreement of the span geometries of one layer, eq. 11 as a weighted mean over pairs.

    total = sum over documents and pairs i != j of omega_i omega_j (cos_ij^S - cos_ij^T)^2, count = the same sum of
    omega_i omega_j. Eq. 11 prints the sum alone, with weights that sum to 1 in a document; the code divides, and so do
    we: a mean does not grow with the batch. A document with one valid span has no pair and adds 0 to both. omega is
    taken as it is: `span_weights`, for raw masses weigh a document by the square of the mass its spans cover. It and
    the teacher's cosines are constants.

    Two spans at right angles in the student, parallel in the teacher, weights 0.6 and 0.2: both ordered pairs weigh
    0.12 and differ by 1.

    >>> dsa(torch.eye(2)[None], torch.ones(1, 2, 2), torch.tensor([[0.6, 0.2]]), torch.tensor([[True, True]]))
    LossTerm(total=tensor(0.2400), count=tensor(0.2400))
    """
    weights_BKK = pair_weights(omega_BK.detach(), valid_BK)
    squares_B = pair_disagreement(student_cosines_BKK, teacher_cosines_BKK.detach(), weights_BKK, valid_BK)
    return term(squares_B.sum(), weights_BKK.to(squares_B.dtype).sum())


def hid(projected_student_BKD: Tensor, teacher_BKD: Tensor, weights_BK: Tensor, valid_BK: Tensor) -> LossTerm:
    """Cosine distance of projected student vectors to the teacher's in one layer, eq. 13 as a weighted mean.

    total = sum w (1 - cos), count = sum w, over valid spans, or over valid tokens. Eq. 13 prints the sum alone; the
    code divides by the sum of weights. P_l is applied to the student's vectors before (eq. 12); the teacher's vectors
    and weights are constants. A zero vector costs 1 and has no gradient.

    >>> student, teacher = torch.tensor([[[3.0, 4.0], [1.0, 0.0]]]), torch.tensor([[[8.0, 6.0], [0.0, 2.0]]])
    >>> hid(student, teacher, torch.tensor([[0.5, 0.25]]), torch.tensor([[True, True]]))
    LossTerm(total=tensor(0.2700), count=tensor(0.7500))
    """
    valid_BK1 = valid_BK.unsqueeze(-1)
    student_BKD = torch.where(valid_BK1, at_least_float32(projected_student_BKD), 0.0)
    distance_BK = cosine_distance(student_BKD, torch.where(valid_BK1, teacher_BKD.detach(), 0.0))
    weights_BK = torch.where(valid_BK, weights_BK.detach().to(distance_BK.dtype), 0.0)
    return term((weights_BK * distance_BK).sum(), weights_BK.sum())


# -- wiring to the cache


Picked = tuple[tuple[tuple[int, str], int], ...]


def pick_levels(settings: MtaSettings, context: Context) -> Picked:
    """(level, student layer) pairs, lowest level first.

    UsageError where a layer does not exist, lists have different lengths, or a picked level is not in the cache.
    """
    check_layers("mta.student_layers", settings.student_layers, "student", context.student_layers)
    return _pick_strided(settings, context) if settings.pick == "strided" else _pick_cached(settings, context)


def _pick_cached(settings: MtaSettings, context: Context) -> Picked:
    """Every level of the cache."""
    if settings.student_layers and len(settings.student_layers) != len(context.levels):
        raise UsageError(
            f"mta.student_layers has {len(settings.student_layers)} layers, the cache has {len(context.levels)} "
            f"levels ({_name_all(context.levels)})"
        )
    chosen = settings.student_layers or tuple(context.student_layer(layer) for layer, _ in context.levels)
    return tuple(zip(context.levels, chosen, strict=True))


def _pick_strided(settings: MtaSettings, context: Context) -> Picked:
    """Student layers from the top down, each beside phi(l); the lowest on words."""
    chosen = settings.student_layers or strided_layers(context.student_layers, settings.num_layers, settings.stride)
    if min(chosen) < 1:
        raise UsageError(
            f"mta.pick=strided: {settings.num_layers} layers do not fit a student of {context.student_layers}",
            fix="--set losses.mta.num_layers=N, or losses.mta.stride=N",
        )
    beside = [phi(layer, context.student_layers, context.teacher_layers) for layer in chosen]
    levels = [(layer, "phrase" if number else "word") for number, layer in enumerate(beside)]
    if len(set(levels)) < len(levels):
        raise UsageError(
            f"mta.pick=strided: student layers {', '.join(map(str, chosen))} stand beside teacher layers "
            f"{', '.join(map(str, beside))}, one of them twice",
            fix="--set losses.mta.num_layers=N with fewer layers",
        )
    missing = [level for level in levels if level not in context.levels]
    if missing:
        flags = f"--word-layers {beside[0]}"
        flags += f" --phrase-layers {','.join(map(str, beside[1:]))}" if beside[1:] else ""
        raise UsageError(
            f"mta.pick=strided puts student layers {', '.join(map(str, chosen))} beside {_name_all(levels)} of the "
            f"teacher, and the cache lacks {_name_all(missing)}",
            fix=f"xkd-cache add CACHE --model M --for mta {flags}",
        )
    return tuple(zip(levels, chosen, strict=True))


def needs(settings: MtaSettings, levels: Levels) -> tuple[Signal, ...]:
    """Per level: masses, and geometry for DSA, span vectors or tokens' states for Hid, token weights where read."""
    if not levels:
        raise UsageError(
            "loss mta needs span_mass of words or phrases of some teacher layer, and none is cached",
            fix="xkd-cache add CACHE --model M --for mta",
        )
    names = ["span_mass"]
    names += ["span_geometry"] if settings.lambda_dsa > 0 else []
    names += ["span_vectors"] if _has_hid(settings, "spans") else []
    found = [Signal(name, layer, unit) for layer, unit in levels for name in names]
    weighs = settings.student_pooling == "teacher" or (
        _has_hid(settings, "token") and settings.span_weights == "centrality"
    )
    names = (["hidden"] if _has_hid(settings, "token") else []) + (["centrality"] if weighs else [])
    found += [Signal(name, layer) for layer in sorted({layer for layer, _ in levels}) for name in names]
    return (*found, *([Signal("entropy")] if settings.span_weights == "entropy" else []))


def _has_hid(settings: MtaSettings, on: str) -> bool:
    """Whether Hid is there and compares spans, or token."""
    return settings.hid == on and settings.lambda_hid > 0


class Mta(Loss):
    """Terms `dsa@L:unit` and `hid@L:unit` for every picked level L (a teacher layer).

    Beside them `spans@L:unit`, without weight: the number of spans they rest on, per document that has any. Where
    tokens are compared with tokens, also `same_tokens`, without weight: the share of documents with spans that both
    models read as the same ids.
    """

    def __init__(self, settings: MtaSettings, context: Context) -> None:
        super().__init__()
        self.settings = settings
        self.classes = context.teacher_vocab_size
        self.student_layer = {f"{layer}:{unit}": ours for (layer, unit), ours in pick_levels(settings, context)}
        self.layers = tuple(sorted(set(self.student_layer.values())))
        self.has_hid = settings.hid != "off" and settings.lambda_hid > 0
        self.has_dsa = settings.lambda_dsa > 0
        self.by_token = _has_hid(settings, "token") or settings.student_pooling == "teacher"
        if _has_hid(settings, "token"):
            refuse_other_tokens("mta.hid=token", "mta.hid=spans", context)
        if settings.student_pooling == "teacher":
            refuse_other_tokens("mta.student_pooling=teacher", "mta.student_pooling=own", context)
        self.projects_dsa = self.has_dsa and settings.dsa_vectors == "projected"
        self.projectors = nn.ModuleDict()
        if self.has_hid or self.projects_dsa:
            for key in self.student_layer:
                self.projectors[key] = nn.Linear(context.student_width, context.teacher_width)

    def weights(self, step: int) -> Mapping[str, float]:
        """DSA is averaged over levels (eq. 10); Hid is averaged or summed (`hid_layers`)."""
        count = len(self.student_layer)
        hid_factor = self.settings.lambda_hid / (count if self.settings.hid_layers == "mean" else 1)
        factors = {f"dsa@{key}": self.settings.lambda_dsa / count for key in self.student_layer if self.has_dsa}
        factors |= {f"hid@{key}": hid_factor for key in self.student_layer if self.has_hid}
        factors |= {f"spans@{key}": 0.0 for key in self.student_layer}
        return factors | ({"same_tokens": 0.0} if self.by_token else {})

    def counts(self, batch: Batch) -> Mapping[str, Tensor]:
        """Weight of pairs, weight of spans or tokens (1 for every document that has any), and such documents."""
        found: dict[str, Tensor] = {}
        for level in self._levels(batch):
            valid_BU, omega_BU = self._choose_spans(batch, level)
            if self.has_dsa:
                found[f"dsa@{_key(level)}"] = pair_weights(omega_BU, valid_BU).sum()
            if _has_hid(self.settings, "token"):
                found[f"hid@{_key(level)}"] = self._choose_tokens(batch, level)[1].sum()
            elif self.has_hid:
                found[f"hid@{_key(level)}"] = omega_BU.sum()
            found[f"spans@{_key(level)}"] = valid_BU.any(-1).sum()
        return found | ({"same_tokens": self._with_spans(batch).sum()} if self.by_token else {})

    def forward(self, batch: Batch, student: StudentPass, step: int) -> Mapping[str, LossTerm]:
        """Compare the student's spans and tokens with the teacher's at every level."""
        terms: dict[str, LossTerm] = {}
        weights: dict[int, Tensor] = {}
        for level in self._levels(batch):
            key = _key(level)
            layer = self.student_layer[key]
            hidden_BSd = student.states.layers[layer]
            if layer not in weights or self.settings.student_pooling == "teacher":
                weights[layer] = self._weigh_tokens(batch, level, hidden_BSd)
            vectors_BUd, _ = pool_spans(hidden_BSd, weights[layer], level.student_BU2)
            valid_BU, omega_BU = self._choose_spans(batch, level)
            if self.has_dsa:
                compared_BUW = self.projectors[key](vectors_BUd) if self.projects_dsa else vectors_BUd
                terms[f"dsa@{key}"] = dsa(cosine_matrix(compared_BUW), unwrap(level.cosines_BUU), omega_BU, valid_BU)
            if _has_hid(self.settings, "token"):
                terms[f"hid@{key}"] = self._hid_of_tokens(batch, level, hidden_BSd)
            elif self.has_hid:
                projected_BUD = self.projectors[key](vectors_BUd)
                terms[f"hid@{key}"] = hid(projected_BUD, unwrap(level.vectors_BUD).float(), omega_BU, valid_BU)
            terms[f"spans@{key}"] = term(valid_BU.sum().float(), valid_BU.any(-1).sum())
        if self.by_token:
            with_spans_B = self._with_spans(batch)
            terms["same_tokens"] = term((find_same_tokens(batch) & with_spans_B).sum().float(), with_spans_B.sum())
        return terms

    def _levels(self, batch: Batch) -> list[Level]:
        """Those that were picked; a batch may hold more, for other losses."""
        return [level for level in batch.levels if _key(level) in self.student_layer]

    def _with_spans(self, batch: Batch) -> Tensor:
        """Which documents have a span that the settings want, at any level, bool [B]."""
        return torch.stack([self._wanted_spans(level).any(-1) for level in self._levels(batch)]).any(0)

    def _wanted_spans(self, level: Level) -> Tensor:
        """Spans of a level that have tokens in both models and that the settings want, bool [B, U]."""
        valid_BU = level.valid_BU
        if self.settings.word_spans == "in_phrases":
            valid_BU = valid_BU & level.in_phrase_BU
        if self.settings.spans_over == "response":
            valid_BU = valid_BU & level.in_target_BU
        return valid_BU

    def _choose_spans(self, batch: Batch, level: Level) -> tuple[Tensor, Tensor]:
        """Which spans take part, and their weight in the document (eq. 9)."""
        valid_BU, mass_BU = self._wanted_spans(level), level.mass_BU
        if self.settings.student_pooling == "teacher":
            valid_BU = valid_BU & find_same_tokens(batch).unsqueeze(-1)
        if self.settings.span_weights == "uniform":
            mass_BU = uniform_weights(valid_BU)
        if self.settings.span_weights == "entropy":
            sure_BR = self._sureness_at(batch, batch.teacher_predict_BM, batch.teacher_valid_BR)
            mass_BU = range_sums(sure_BR, level.teacher_BU2)
            valid_BU = valid_BU & (mass_BU > 0)
        return valid_BU, span_weights(mass_BU, valid_BU)

    def _sureness_at(self, batch: Batch, place_BM: Tensor, like: Tensor) -> Tensor:
        """1 - H / log V at the places of the teacher's predictions, 0 elsewhere; float32 of the shape of `like`."""
        sure_BM = torch.where(
            batch.teacher_predict_valid_BM, sureness(unwrap(batch.teacher_entropy_BM), self.classes), 0.0
        )
        return torch.zeros_like(like, dtype=sure_BM.dtype).scatter_add(1, place_BM, sure_BM)

    def _choose_tokens(self, batch: Batch, level: Level) -> tuple[Tensor, Tensor]:
        """Tokens that take part in hid=token, bool [B, S], and their weight in the document."""
        length = batch.student_valid_BS.shape[1]
        valid_BS = find_covered(level.student_BU2, self._choose_spans(batch, level)[0], length)
        valid_BS = valid_BS & find_same_tokens(batch).unsqueeze(-1)
        if self.settings.span_weights == "uniform":
            weights_BS = uniform_weights(valid_BS)
        elif self.settings.span_weights == "entropy":
            place_BM = unwrap(batch.teacher_kept_BR).gather(1, batch.teacher_predict_BM)
            weights_BS = fit(self._sureness_at(batch, place_BM, unwrap(batch.teacher_valid_BT)), length)
        else:
            weights_BS = fit(unwrap(batch.states(level.layer).centrality_BT), length)
        return valid_BS, span_weights(weights_BS, valid_BS)

    def _hid_of_tokens(self, batch: Batch, level: Level, hidden_BSd: Tensor) -> LossTerm:
        """Eq. 13: the state of every covered token against the teacher's state of the same token."""
        valid_BS, weights_BS = self._choose_tokens(batch, level)
        teacher_BSD = fit(unwrap(batch.states(level.layer).hidden_BTD), hidden_BSd.shape[1]).float()
        return hid(self.projectors[_key(level)](hidden_BSd), teacher_BSD, weights_BS, valid_BS)

    def _weigh_tokens(self, batch: Batch, level: Level, hidden_BSd: Tensor) -> Tensor:
        """Weights that pool the student's tokens, [B, S]."""
        if self.settings.student_pooling == "uniform":
            return uniform_weights(batch.student_valid_BS)
        if self.settings.student_pooling == "teacher":
            weights_BS = fit(unwrap(batch.states(level.layer).centrality_BT), hidden_BSd.shape[1])
            return torch.where(batch.student_valid_BS & find_same_tokens(batch).unsqueeze(-1), weights_BS, 0.0)
        with torch.no_grad():
            return centrality(hidden_BSd, batch.student_valid_BS)


def _key(level: Level) -> str:
    return f"{level.layer}:{level.unit}"


def _name_all(levels: Sequence[tuple[int, str]]) -> str:
    return ", ".join(f"{layer}:{unit}" for layer, unit in levels)


MTA = Declaration(
    name="mta",
    source="MTA, arXiv 2605.01374, eq. 5-14",
    settings=MtaSettings,
    needs=needs,
    build=Mta,
    plug_in=True,
    projectors=Projectors(projector_lr=5e-4, projector_weight_decay=0.01),
)

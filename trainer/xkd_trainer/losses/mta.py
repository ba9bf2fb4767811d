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
from xkd_schemas.signals import GEOMETRY_SPANS, Signal, draw_spans
from xkd_trainer.data.batch import Batch, Level, gather_rows, unwrap
from xkd_trainer.losses.declaration import Context, Declaration, Loss, Projectors, Settings, StudentPass, Weight
from xkd_trainer.losses.ops.divergence import pair_weights
from xkd_trainer.losses.ops.term import LossTerm, term
from xkd_trainer.losses.pairing import check_layers, compare_vectors, fit, match_tokens, refuse_other_tokens, share_out
from xkd_trainer.models.measures import centrality, cosine_matrix, pool_spans


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
    max_spans: int = Field(default=GEOMETRY_SPANS, ge=0, le=GEOMETRY_SPANS)
    """Spans of a document that DSA compares with each other: drawn where it has more, the same in every epoch, and
    the others counted in `unpaired`. The cache keeps cosines of 2,048 spans at most; 0 for all that it keeps."""
    student_layers: tuple[int, ...] = ()
    """Student blocks (1 is the first), lowest first: one for each cached level, or those that strided takes. Empty:
    as `pick` says."""

    @property
    def compared(self) -> str:
        """What Hid compares: spans, token, or off where it has no weight."""
        return self.hid if self.lambda_hid > 0 else "off"

    @property
    def same_tokens(self) -> bool:
        """Whether tokens are compared with tokens."""
        return self.compared == "token" or self.student_pooling == "teacher"


def strided_layers(student_layers: int, num: int, stride: int) -> tuple[int, ...]:
    """Student layers from the top down, `stride` apart, in ascending order; those below 1 are not left out."""
    step = stride or max(1, student_layers // (num + 1))
    return tuple(student_layers - step * n for n in reversed(range(num)))


def phi(layer: int, student_layers: int, teacher_layers: int) -> int:
    """The teacher layer beside a student layer: floor(l N_T / N_S), at least 1."""
    return max(1, layer * teacher_layers // student_layers)


def find_covered(spans_BK2: Tensor, valid_BK: Tensor, length: int) -> Tensor:
    """Tokens that lie in some valid span, bool [B, L]: M_l of eq. 13."""
    place_L = torch.arange(length, device=spans_BK2.device)
    inside_BKL = (place_L >= spans_BK2[..., :1]) & (place_L < spans_BK2[..., 1:])
    return (inside_BKL & valid_BK.unsqueeze(-1)).any(1)


def dsa(student_cosines_BKK: Tensor, teacher_cosines_BKK: Tensor, omega_BK: Tensor, valid_BK: Tensor) -> LossTerm:
    """Disagreement of the span geometries of one layer, eq. 11 as a weighted mean over pairs.

    total = sum over documents and pairs i != j of omega_i omega_j (cos_ij^S - cos_ij^T)^2, count = the same sum of
    omega_i omega_j. Eq. 11 prints the sum alone, with weights that sum to 1 in a document; the code divides, and so do
    we: a mean does not grow with the batch. A document with one valid span has no pair and adds 0 to both. omega is
    masses by `share_out`: raw ones weigh a document by the square of the mass its spans cover. It and the teacher's
    cosines are constants. What is not valid adds nothing, whatever it holds.

    Two spans at right angles in the student, parallel in the teacher, weights 0.6 and 0.2: both ordered pairs weigh
    0.12 and differ by 1.

    >>> dsa(torch.eye(2)[None], torch.ones(1, 2, 2), torch.tensor([[0.6, 0.2]]), torch.tensor([[True, True]]))
    LossTerm(total=tensor(0.2400), count=tensor(0.2400))
    """
    weights_BKK, both_BKK = pair_weights(omega_BK, valid_BK), valid_BK.unsqueeze(-1) & valid_BK.unsqueeze(-2)
    gap_BKK = torch.where(both_BKK, student_cosines_BKK - teacher_cosines_BKK, 0.0)
    squares_B = (weights_BKK * gap_BKK * gap_BKK).sum((-2, -1))
    return term(squares_B.sum(), weights_BKK.to(squares_B.dtype).sum())


# -- wiring to the cache


def pick_levels(settings: MtaSettings, context: Context) -> dict[str, int]:
    """Level, LAYER:UNIT, lowest first -> student layer.

    UsageError where a layer does not exist, lists have different lengths, or a picked level is not in the cache.
    """
    check_layers("mta.student_layers", settings.student_layers, "student", context.student_layers)
    if settings.pick == "strided":
        return _pick_strided(settings, context)
    chosen = settings.student_layers or tuple(context.student_layer(layer) for layer, _ in context.levels)
    if len(chosen) != len(context.levels):
        raise UsageError(
            f"mta.student_layers has {len(chosen)} layers, the cache has {len(context.levels)} levels "
            f"({', '.join(_keys(context.levels))})"
        )
    return dict(zip(_keys(context.levels), chosen, strict=True))


def _pick_strided(settings: MtaSettings, context: Context) -> dict[str, int]:
    """Student layers from the top down, each beside phi(l); the lowest on words."""
    chosen = settings.student_layers or strided_layers(context.student_layers, settings.num_layers, settings.stride)
    if min(chosen) < 1:
        raise UsageError(
            f"mta.pick=strided: {settings.num_layers} layers do not fit a student of {context.student_layers}",
            fix="--set losses.mta.num_layers=N, or losses.mta.stride=N",
        )
    beside = [phi(layer, context.student_layers, context.teacher_layers) for layer in chosen]
    levels = [(layer, "phrase" if number else "word") for number, layer in enumerate(beside)]
    ours, theirs = (", ".join(map(str, layers)) for layers in (chosen, beside))
    if len(set(levels)) < len(levels):
        raise UsageError(
            f"mta.pick=strided: student layers {ours} stand beside teacher layers {theirs}, one of them twice",
            fix="--set losses.mta.num_layers=N with fewer layers",
        )
    missing = [level for level in levels if level not in context.levels]
    if missing:
        phrases = f" --phrase-layers {','.join(map(str, beside[1:]))}" if beside[1:] else ""
        raise UsageError(
            f"mta.pick=strided puts student layers {ours} beside {', '.join(_keys(levels))} of the teacher, and the "
            f"cache lacks {', '.join(_keys(missing))}",
            fix=f"xkd-cache add CACHE --model M --for mta --word-layers {beside[0]}{phrases}",
        )
    return dict(zip(_keys(levels), chosen, strict=True))


def _keys(levels: Sequence[tuple[int, str]]) -> list[str]:
    return [f"{layer}:{unit}" for layer, unit in levels]


def needs(settings: MtaSettings, levels: Sequence[tuple[int, str]]) -> tuple[Signal, ...]:
    """Per level: masses, and geometry for DSA, span vectors or tokens' states for Hid, token weights where read."""
    if not levels:
        raise UsageError(
            "loss mta needs span_mass of words or phrases of some teacher layer, and none is cached",
            fix="xkd-cache add CACHE --model M --for mta",
        )
    by_token, how = settings.compared == "token", settings.span_weights
    of_spans = {
        "span_mass": True, "span_geometry": settings.lambda_dsa > 0, "span_vectors": settings.compared == "spans",
    }  # fmt: skip
    weighed = settings.student_pooling == "teacher" or (by_token and how == "centrality")
    of_tokens = {"hidden": by_token, "centrality": weighed}
    layers = sorted({layer for layer, _ in levels})
    return (
        *(Signal(name, layer, unit) for layer, unit in levels for name, read in of_spans.items() if read),
        *(Signal(name, layer) for layer in layers for name, read in of_tokens.items() if read),
        *([Signal("entropy")] if how == "entropy" else []),
    )


class Mta(Loss):
    """Terms `dsa@L:unit` and `hid@L:unit` for every picked level L (a teacher layer).

    Beside them, without weight and per document that has any span: `spans@L:unit`, the spans they rest on, and where
    there is DSA `unpaired@L:unit`, those among them that it compares with no other (see `max_spans`). Where
    tokens are compared with tokens, also `same_tokens`, without weight: the share of documents with spans that both
    models read as the same ids.
    """

    def __init__(self, settings: MtaSettings, context: Context) -> None:
        super().__init__()
        self.settings = settings
        self.classes = context.teacher_vocab_size
        self.student_layer = pick_levels(settings, context)
        self.layers = tuple(sorted(set(self.student_layer.values())))
        if settings.compared == "token":
            refuse_other_tokens("mta.hid=token", "mta.hid=spans", context)
        if settings.student_pooling == "teacher":
            refuse_other_tokens("mta.student_pooling=teacher", "mta.student_pooling=own", context)
        self.projects_dsa = settings.lambda_dsa > 0 and settings.dsa_vectors == "projected"
        projected = self.student_layer if settings.compared != "off" or self.projects_dsa else ()
        self.projectors = nn.ModuleDict(
            {key: nn.Linear(context.student_width, context.teacher_width) for key in projected}
        )

    def weights(self, step: int) -> Mapping[str, float]:
        """DSA is averaged over levels (eq. 10); Hid is averaged or summed (`hid_layers`)."""
        s, keys = self.settings, self.student_layer
        hid = s.lambda_hid / (len(keys) if s.hid_layers == "mean" else 1)
        factors = {f"dsa@{key}": s.lambda_dsa / len(keys) for key in keys if s.lambda_dsa > 0}
        factors |= {f"hid@{key}": hid for key in keys if s.compared != "off"}
        factors |= {f"unpaired@{key}": 0.0 for key in keys if s.lambda_dsa > 0}
        return factors | {f"spans@{key}": 0.0 for key in keys} | ({"same_tokens": 0.0} if s.same_tokens else {})

    def counts(self, batch: Batch) -> Mapping[str, Tensor]:
        """Weight of pairs, weight of spans or tokens (1 for every document that has any), and such documents."""
        found = {"same_tokens": self._with_spans(batch).sum()}
        for key, level in self._levels(batch).items():
            omega_BU, valid_BU = self._choose_spans(batch, level)
            by_token = self.settings.compared == "token"
            found[f"dsa@{key}"] = pair_weights(*self._pair(level, omega_BU, valid_BU)[1:]).sum()
            found[f"hid@{key}"] = (self._choose_tokens(batch, level)[0] if by_token else omega_BU).sum()
            found[f"spans@{key}"] = found[f"unpaired@{key}"] = valid_BU.any(-1).sum()
        return {name: found[name] for name in self.weights(0)}

    def forward(self, batch: Batch, student: StudentPass, step: int) -> Mapping[str, LossTerm]:
        """Compare the student's spans and tokens with the teacher's at every level."""
        terms: dict[str, LossTerm] = {}
        weights: dict[int, Tensor] = {}
        for key, level in self._levels(batch).items():
            layer = self.student_layer[key]
            hidden_BSd = student.states.layers[layer]
            if layer not in weights or self.settings.student_pooling == "teacher":
                weights[layer] = self._weigh_tokens(batch, level, hidden_BSd)
            vectors_BUd, _ = pool_spans(hidden_BSd, weights[layer], level.student_BU2)
            omega_BU, valid_BU = self._choose_spans(batch, level)
            if self.settings.lambda_dsa > 0:
                index_BP, omega_BP, valid_BP = self._pair(level, omega_BU, valid_BU)
                own_BPW = vectors_BUd if index_BP is None else gather_rows(vectors_BUd, index_BP)
                own_BPW = self.projectors[key](own_BPW) if self.projects_dsa else own_BPW
                terms[f"dsa@{key}"] = dsa(cosine_matrix(own_BPW), unwrap(level.cosines_BUU), omega_BP, valid_BP)
                unpaired = (valid_BU.sum() - valid_BP.sum()).float()
                terms[f"unpaired@{key}"] = term(unpaired, valid_BU.any(-1).sum())
            if self.settings.compared == "token":  # eq. 13: the state of every covered token
                theirs_BSD = fit(unwrap(batch.states(level.layer).hidden_BTD), hidden_BSd.shape[1])
                chosen = self._choose_tokens(batch, level)
                terms[f"hid@{key}"] = compare_vectors(self.projectors[key](hidden_BSd), theirs_BSD, *chosen)
            elif self.settings.compared == "spans":
                projected_BUD, theirs_BUD = self.projectors[key](vectors_BUd), unwrap(level.vectors_BUD)
                terms[f"hid@{key}"] = compare_vectors(projected_BUD, theirs_BUD, omega_BU, valid_BU)
            terms[f"spans@{key}"] = term(valid_BU.sum().float(), valid_BU.any(-1).sum())
        if self.settings.same_tokens:
            with_spans_B = self._with_spans(batch)
            terms["same_tokens"] = term((match_tokens(batch) & with_spans_B).sum().float(), with_spans_B.sum())
        return terms

    def _levels(self, batch: Batch) -> dict[str, Level]:
        """Those that were picked; a batch may hold more, for other losses."""
        levels = {f"{level.layer}:{level.unit}": level for level in batch.levels}
        return {key: level for key, level in levels.items() if key in self.student_layer}

    def _with_spans(self, batch: Batch) -> Tensor:
        """Which documents have a span that the settings want, at any level, bool [B]."""
        levels = self._levels(batch).values()
        return torch.stack([self._find_wanted(level).any(-1) for level in levels]).any(0)

    def _find_wanted(self, level: Level) -> Tensor:
        """Spans of a level that have tokens in both models and that the settings want, bool [B, U]."""
        valid_BU = level.valid_BU
        if self.settings.word_spans == "in_phrases":
            valid_BU = valid_BU & level.in_phrase_BU
        if self.settings.spans_over == "response":
            valid_BU = valid_BU & level.in_target_BU
        return valid_BU

    def _choose_spans(self, batch: Batch, level: Level) -> tuple[Tensor, Tensor]:
        """Weight of each span in the document (eq. 9), and which spans take part."""
        valid_BU, mass_BU = self._find_wanted(level), level.mass_BU
        if self.settings.student_pooling == "teacher":
            valid_BU = valid_BU & match_tokens(batch).unsqueeze(-1)
        if self.settings.span_weights == "uniform":
            mass_BU = valid_BU.float()
        if self.settings.span_weights == "entropy":
            sure_BR = self._sureness_at(batch, batch.teacher_predict_BM, batch.teacher_valid_BR)
            _, mass_BU = pool_spans(sure_BR.unsqueeze(-1), sure_BR, level.teacher_BU2)
            valid_BU = valid_BU & (mass_BU > 0)
        return share_out(mass_BU, valid_BU), valid_BU

    def _pair(self, level: Level, omega_BU: Tensor, valid_BU: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        """The spans that the level's cosines are of (None for all), their weights, and which of them DSA compares."""
        index_BP, omega_BP, valid_BP = None, omega_BU, valid_BU
        if level.paired_BP is not None:
            index_BP = level.paired_BP.clamp_min(0)
            omega_BP, valid_BP = omega_BU.gather(1, index_BP), valid_BU.gather(1, index_BP) & (level.paired_BP >= 0)
        most = self.settings.max_spans or valid_BP.shape[1]
        if valid_BP.shape[1] > most:
            valid_BP = valid_BP.clone()
            for row_P in valid_BP:
                places = row_P.nonzero()[:, 0]
                if (drawn := draw_spans(len(places), most)) is not None:
                    row_P.fill_(False)[places[torch.from_numpy(drawn).to(places.device)]] = True
        return index_BP, omega_BP, valid_BP

    def _sureness_at(self, batch: Batch, place_BM: Tensor, like: Tensor) -> Tensor:
        """1 - H / log V at the places of the teacher's predictions, 0 elsewhere; float32 of the shape of `like`."""
        sure_BM = (1.0 - unwrap(batch.teacher_entropy_BM) / math.log(self.classes)).clamp(0.0, 1.0)
        sure_BM = torch.where(batch.teacher_predict_valid_BM, sure_BM, 0.0)
        return torch.zeros_like(like, dtype=sure_BM.dtype).scatter_add(1, place_BM, sure_BM)

    def _choose_tokens(self, batch: Batch, level: Level) -> tuple[Tensor, Tensor]:
        """Weight in the document of each token of hid=token, and which tokens take part, bool [B, S]."""
        length = batch.student_valid_BS.shape[1]
        valid_BS = find_covered(level.student_BU2, self._choose_spans(batch, level)[1], length)
        valid_BS = valid_BS & match_tokens(batch).unsqueeze(-1)
        if self.settings.span_weights == "uniform":
            weights_BS = valid_BS.float()
        elif self.settings.span_weights == "entropy":
            place_BM = unwrap(batch.teacher_kept_BR).gather(1, batch.teacher_predict_BM)
            weights_BS = fit(self._sureness_at(batch, place_BM, unwrap(batch.teacher_valid_BT)), length)
        else:
            weights_BS = fit(unwrap(batch.states(level.layer).centrality_BT), length)
        return share_out(weights_BS, valid_BS), valid_BS

    def _weigh_tokens(self, batch: Batch, level: Level, hidden_BSd: Tensor) -> Tensor:
        if self.settings.student_pooling == "uniform":
            return batch.student_valid_BS.float()
        if self.settings.student_pooling == "teacher":
            weights_BS = fit(unwrap(batch.states(level.layer).centrality_BT), hidden_BSd.shape[1])
            return torch.where(batch.student_valid_BS & match_tokens(batch).unsqueeze(-1), weights_BS, 0.0)
        with torch.no_grad():
            return centrality(hidden_BSd, batch.student_valid_BS)


MTA = Declaration(
    name="mta", source="MTA, arXiv 2605.01374, eq. 5-14", settings=MtaSettings, needs=needs, build=Mta, plug_in=True,
    projectors=Projectors(projector_lr=5e-4, projector_weight_decay=0.01),
)  # fmt: skip

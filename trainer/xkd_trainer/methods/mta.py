"""MTA wired to the cache: which levels, which projectors, which spans and tokens count.

Shape legend: see batch.py.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from xkd_schemas.errors import UsageError
from xkd_schemas.teacher import Signal
from xkd_trainer.batch import Batch, Level
from xkd_trainer.losses.geometry import pair_weights
from xkd_trainer.losses.mta import MtaSettings, covered, dsa, hid, range_sums, span_weights, sureness
from xkd_trainer.losses.term import LossTerm, term
from xkd_trainer.methods.declaration import Context, Declaration, Levels, Projectors, StudentPass, uniform_weights
from xkd_trainer.methods.mta_layers import picked_levels
from xkd_trainer.methods.one_tokenizer import fitted, refuse_other_tokens, same_tokens
from xkd_trainer.signals import centrality, cosine_matrix, pool_spans


def needs(settings: MtaSettings, levels: Levels) -> tuple[Signal, ...]:
    """Per level: masses, and geometry for DSA, span vectors or tokens' states for Hid, weights of tokens where read.

    Raises:
        UsageError: No level is there to be read.
    """
    if not levels:
        raise UsageError(
            "loss mta needs span_mass of words or phrases of some teacher layer, and none is cached",
            next="xkd-cache add CACHE --model M --for mta",
        )
    names = ["span_mass"]
    names += ["span_geometry"] if settings.lambda_dsa > 0 else []
    names += ["span_vectors"] if _hid(settings, "spans") else []
    found = [Signal(name, layer, unit) for layer, unit in levels for name in names]
    weighs = settings.student_pooling == "teacher" or (
        _hid(settings, "token") and settings.span_weights == "centrality"
    )
    names = (["hidden"] if _hid(settings, "token") else []) + (["centrality"] if weighs else [])
    found += [Signal(name, layer) for layer in sorted({layer for layer, _ in levels}) for name in names]
    return (*found, *([Signal("entropy")] if settings.span_weights == "entropy" else []))


def _hid(settings: MtaSettings, on: str) -> bool:
    """Whether Hid is there and compares spans, or token."""
    return settings.hid == on and settings.lambda_hid > 0


class Mta(nn.Module):
    """Terms `dsa@L:unit` and `hid@L:unit` for every picked level L (a teacher layer).

    Beside them `spans@L:unit`, without weight: the number of spans they rest on, per document that has any. Where
    tokens are compared with tokens, also `same_tokens`, without weight: the share of documents with spans that both
    models read as the same ids.
    """

    attention = False

    def __init__(self, settings: MtaSettings, context: Context) -> None:
        super().__init__()
        self.settings = settings
        self.classes = context.teacher_vocab_size
        self.student_layer = {_key(*level): layer for level, layer in picked_levels(settings, context)}
        self.layers = tuple(sorted(set(self.student_layer.values())))
        self.has_hid = settings.hid != "off" and settings.lambda_hid > 0
        self.has_dsa = settings.lambda_dsa > 0
        self.by_token = _hid(settings, "token") or settings.student_pooling == "teacher"
        if _hid(settings, "token"):
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
            valid_BU, omega_BU = self._spans(batch, level)
            if self.has_dsa:
                found[f"dsa@{_key_of(level)}"] = pair_weights(omega_BU, valid_BU).sum()
            if _hid(self.settings, "token"):
                found[f"hid@{_key_of(level)}"] = self._tokens(batch, level)[1].sum()
            elif self.has_hid:
                found[f"hid@{_key_of(level)}"] = omega_BU.sum()
            found[f"spans@{_key_of(level)}"] = valid_BU.any(-1).sum()
        return found | ({"same_tokens": self._with_spans(batch).sum()} if self.by_token else {})

    def forward(self, batch: Batch, student: StudentPass, step: int) -> Mapping[str, LossTerm]:
        """Compare the student's spans and tokens with the teacher's at every level."""
        terms: dict[str, LossTerm] = {}
        weights: dict[int, Tensor] = {}
        for level in self._levels(batch):
            key = _key_of(level)
            layer = self.student_layer[key]
            hidden_BSd = student.states.layers[layer]
            if layer not in weights or self.settings.student_pooling == "teacher":
                weights[layer] = self._pooling(batch, level, hidden_BSd)
            vectors_BUd, _ = pool_spans(hidden_BSd, weights[layer], level.student_BU2)
            valid_BU, omega_BU = self._spans(batch, level)
            if self.has_dsa:
                assert level.cosines_BUU is not None
                compared_BUW = self.projectors[key](vectors_BUd) if self.projects_dsa else vectors_BUd
                terms[f"dsa@{key}"] = dsa(cosine_matrix(compared_BUW), level.cosines_BUU, omega_BU, valid_BU)
            if _hid(self.settings, "token"):
                terms[f"hid@{key}"] = self._hid_of_tokens(batch, level, hidden_BSd)
            elif self.has_hid:
                assert level.vectors_BUD is not None
                projected_BUD = self.projectors[key](vectors_BUd)
                terms[f"hid@{key}"] = hid(projected_BUD, level.vectors_BUD.float(), omega_BU, valid_BU)
            terms[f"spans@{key}"] = term(valid_BU.sum().float(), valid_BU.any(-1).sum())
        if self.by_token:
            with_spans_B = self._with_spans(batch)
            terms["same_tokens"] = term((same_tokens(batch) & with_spans_B).sum().float(), with_spans_B.sum())
        return terms

    def _levels(self, batch: Batch) -> list[Level]:
        """Those that were picked; a batch may hold more, for other losses."""
        return [level for level in batch.levels if _key_of(level) in self.student_layer]

    def _with_spans(self, batch: Batch) -> Tensor:
        """Which documents have a span that the settings want, at any level, bool [B]."""
        return torch.stack([self._wanted(level).any(-1) for level in self._levels(batch)]).any(0)

    def _wanted(self, level: Level) -> Tensor:
        """Spans of a level that have tokens in both models and that the settings want, bool [B, U]."""
        valid_BU = level.valid_BU
        if self.settings.word_spans == "in_phrases":
            valid_BU = valid_BU & level.in_phrase_BU
        if self.settings.spans_over == "response":
            valid_BU = valid_BU & level.in_target_BU
        return valid_BU

    def _spans(self, batch: Batch, level: Level) -> tuple[Tensor, Tensor]:
        """Which spans take part, and their weight in the document (eq. 9)."""
        valid_BU, mass_BU = self._wanted(level), level.mass_BU
        if self.settings.student_pooling == "teacher":
            valid_BU = valid_BU & same_tokens(batch).unsqueeze(-1)
        if self.settings.span_weights == "uniform":
            mass_BU = uniform_weights(valid_BU)
        if self.settings.span_weights == "entropy":
            sure_BR = self._sure(batch, batch.teacher_predict_BM, batch.teacher_valid_BR)
            mass_BU = range_sums(sure_BR, level.teacher_BU2)
            valid_BU = valid_BU & (mass_BU > 0)
        return valid_BU, span_weights(mass_BU, valid_BU)

    def _sure(self, batch: Batch, place_BM: Tensor, like: Tensor) -> Tensor:
        """1 - H / log V at the places of the teacher's predictions, 0 elsewhere; float32 of the shape of `like`."""
        assert batch.teacher_entropy_BM is not None
        sure_BM = torch.where(batch.teacher_predict_valid_BM, sureness(batch.teacher_entropy_BM, self.classes), 0.0)
        return torch.zeros_like(like, dtype=sure_BM.dtype).scatter_add(1, place_BM, sure_BM)

    def _tokens(self, batch: Batch, level: Level) -> tuple[Tensor, Tensor]:
        """Tokens that take part in hid=token, bool [B, S], and their weight in the document."""
        length = batch.student_valid_BS.shape[1]
        valid_BS = covered(level.student_BU2, self._spans(batch, level)[0], length)
        valid_BS = valid_BS & same_tokens(batch).unsqueeze(-1)
        if self.settings.span_weights == "uniform":
            weights_BS = uniform_weights(valid_BS)
        elif self.settings.span_weights == "entropy":
            assert batch.teacher_kept_BR is not None
            assert batch.teacher_valid_BT is not None
            place_BM = batch.teacher_kept_BR.gather(1, batch.teacher_predict_BM)
            weights_BS = fitted(self._sure(batch, place_BM, batch.teacher_valid_BT), length)
        else:
            weights_BS = fitted(_given(batch.states(level.layer).centrality_BT), length)
        return valid_BS, span_weights(weights_BS, valid_BS)

    def _hid_of_tokens(self, batch: Batch, level: Level, hidden_BSd: Tensor) -> LossTerm:
        """Eq. 13: the state of every covered token against the teacher's state of the same token."""
        valid_BS, weights_BS = self._tokens(batch, level)
        teacher_BSD = fitted(_given(batch.states(level.layer).hidden_BTD), hidden_BSd.shape[1]).float()
        return hid(self.projectors[_key_of(level)](hidden_BSd), teacher_BSD, weights_BS, valid_BS)

    def _pooling(self, batch: Batch, level: Level, hidden_BSd: Tensor) -> Tensor:
        """Weights that pool the student's tokens, [B, S]."""
        if self.settings.student_pooling == "uniform":
            return uniform_weights(batch.student_valid_BS)
        if self.settings.student_pooling == "teacher":
            weights_BS = fitted(_given(batch.states(level.layer).centrality_BT), hidden_BSd.shape[1])
            return torch.where(batch.student_valid_BS & same_tokens(batch).unsqueeze(-1), weights_BS, 0.0)
        with torch.no_grad():
            return centrality(hidden_BSd, batch.student_valid_BS)


def _given(values: Tensor | None) -> Tensor:
    """What `needs` asked for."""
    assert values is not None
    return values


def _key(layer: int, unit: str) -> str:
    return f"{layer}:{unit}"


def _key_of(level: Level) -> str:
    return _key(level.layer, level.unit)


MTA = Declaration(
    name="mta",
    source="MTA, arXiv 2605.01374, eq. 5-14",
    settings=MtaSettings,
    needs=needs,
    build=Mta,
    plug_in=True,
    projectors=Projectors(projector_lr=5e-4, projector_weight_decay=0.01),
)

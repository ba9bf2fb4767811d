"""MTA wired to the cache: which levels, which projectors, which spans count.

Shape legend: see batch.py.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from xkd_schemas.errors import UsageError
from xkd_schemas.teacher import Signal
from xkd_trainer.batch import Batch, Level
from xkd_trainer.losses.geometry import pair_weights
from xkd_trainer.losses.mta import MtaSettings, dsa, hid, span_weights
from xkd_trainer.losses.term import LossTerm
from xkd_trainer.methods.declaration import Context, Declaration, StudentPass, uniform_weights
from xkd_trainer.signals import centrality, cosine_matrix, pool_spans


def needs(settings: MtaSettings, levels: tuple[tuple[int, str], ...]) -> tuple[Signal, ...]:
    """Per level: masses, and geometry for DSA, and span vectors for Hid.

    Raises:
        UsageError: No level is there to be read.
    """
    if not levels:
        raise UsageError(
            "loss mta needs span_mass of words or phrases of some teacher layer, and none is cached",
            next="xkd-cache teacher CACHE --model M --for mta,sra,dwa --name NEW, then align",
        )
    names = ["span_mass"]
    names += ["span_geometry"] if settings.lambda_dsa > 0 else []
    names += ["span_vectors"] if settings.hid == "spans" and settings.lambda_hid > 0 else []
    return tuple(Signal(name, layer, unit) for layer, unit in levels for name in names)


class Mta(nn.Module):
    """Terms `dsa@L:unit` and `hid@L:unit` for every cached level L (a teacher layer)."""

    attention = False

    def __init__(self, settings: MtaSettings, context: Context) -> None:
        super().__init__()
        self.settings = settings
        if settings.student_layers and len(settings.student_layers) != len(context.levels):
            raise UsageError(
                f"mta.student_layers has {len(settings.student_layers)} layers, the cache has {len(context.levels)} "
                f"levels ({', '.join(f'{layer}:{unit}' for layer, unit in context.levels)})"
            )
        missing = [layer for layer in settings.student_layers if not 1 <= layer <= context.student_layers]
        if missing:
            raise UsageError(
                f"mta.student_layers: layer {missing[0]} does not exist, the student has layers 1 to "
                f"{context.student_layers}"
            )
        chosen = settings.student_layers or tuple(context.student_layer(layer) for layer, _ in context.levels)
        self.student_layer = {_key(*level): layer for level, layer in zip(context.levels, chosen, strict=True)}
        self.layers = tuple(sorted(set(chosen)))
        self.has_hid = settings.hid == "spans" and settings.lambda_hid > 0
        self.has_dsa = settings.lambda_dsa > 0
        self.projectors = nn.ModuleDict()
        if self.has_hid:
            for level in context.levels:
                self.projectors[_key(*level)] = nn.Linear(context.student_width, context.teacher_width)

    def weights(self, step: int) -> Mapping[str, float]:
        """DSA is averaged over levels (eq. 10); Hid is averaged or summed (`hid_layers`)."""
        count = len(self.student_layer)
        hid_factor = self.settings.lambda_hid / (count if self.settings.hid_layers == "mean" else 1)
        factors = {f"dsa@{key}": self.settings.lambda_dsa / count for key in self.student_layer if self.has_dsa}
        return factors | {f"hid@{key}": hid_factor for key in self.student_layer if self.has_hid}

    def counts(self, batch: Batch) -> Mapping[str, Tensor]:
        """Weight of the pairs, and weight of the spans: 1 for every document that has any."""
        found: dict[str, Tensor] = {}
        for level in batch.levels:
            valid_BU, omega_BU = self._spans(level)
            if self.has_dsa:
                found[f"dsa@{_key_of(level)}"] = pair_weights(omega_BU, valid_BU).sum()
            if self.has_hid:
                found[f"hid@{_key_of(level)}"] = omega_BU.sum()
        return found

    def _spans(self, level: Level) -> tuple[Tensor, Tensor]:
        """Which spans take part, and their weight in the document (eq. 9)."""
        valid_BU = level.valid_BU
        if self.settings.word_spans == "in_phrases":
            valid_BU = valid_BU & level.in_phrase_BU
        if self.settings.spans_over == "response":
            valid_BU = valid_BU & level.in_target_BU
        mass_BU = uniform_weights(valid_BU) if self.settings.span_weights == "uniform" else level.mass_BU
        return valid_BU, span_weights(mass_BU, valid_BU)

    def forward(self, batch: Batch, student: StudentPass, step: int) -> Mapping[str, LossTerm]:
        """Compare the student's spans with the teacher's at every level."""
        terms: dict[str, LossTerm] = {}
        weights: dict[int, Tensor] = {}
        for level in batch.levels:
            key = _key_of(level)
            layer = self.student_layer[key]
            hidden_BSd = student.states.layers[layer]
            if layer not in weights:
                weights[layer] = self._token_weights(hidden_BSd, batch.student_valid_BS)
            vectors_BUd, _ = pool_spans(hidden_BSd, weights[layer], level.student_BU2)
            valid_BU, omega_BU = self._spans(level)
            if self.has_dsa:
                assert level.cosines_BUU is not None
                terms[f"dsa@{key}"] = dsa(cosine_matrix(vectors_BUd), level.cosines_BUU, omega_BU, valid_BU)
            if self.has_hid:
                assert level.vectors_BUD is not None
                projected_BUD = self.projectors[key](vectors_BUd)
                terms[f"hid@{key}"] = hid(projected_BUD, level.vectors_BUD.float(), omega_BU, valid_BU)
        return terms

    def _token_weights(self, hidden_BSd: Tensor, valid_BS: Tensor) -> Tensor:
        if self.settings.student_pooling == "uniform":
            return uniform_weights(valid_BS)
        with torch.no_grad():
            return centrality(hidden_BSd, valid_BS)


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
)

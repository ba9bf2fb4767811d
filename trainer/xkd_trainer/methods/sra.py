"""SRA wired to the cache: centres of mass of the aligned spans in both models, last layer.

Shape legend: see batch.py; d is the student's width, V the shared vocabulary.
"""

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor, nn

from xkd_schemas.errors import UsageError
from xkd_schemas.teacher import Signal
from xkd_trainer.batch import Batch
from xkd_trainer.losses.head import Comparison, LazyLogits, head_divergence
from xkd_trainer.losses.sra import (
    SraSettings,
    geometric,
    shared_vocabulary,
    span_omega,
    weighted_cosine,
)
from xkd_trainer.losses.term import LossTerm, term
from xkd_trainer.methods.declaration import Context, Declaration, StudentPass, constant_head, uniform_weights
from xkd_trainer.signals import pool_spans


def needs(settings: SraSettings, levels: tuple[tuple[int, str], ...]) -> tuple[Signal, ...]:
    """Last states, the attention row that weighs them, and for words or phrases some level that has them.

    Raises:
        UsageError: Words or phrases are wanted and none are cached.
    """
    weights = (Signal("attention_last"),) if settings.weights == "attention" else ()
    return (Signal("hidden_last"), *weights, *_span_level(settings, levels))


def _span_level(settings: SraSettings, levels: tuple[tuple[int, str], ...]) -> tuple[Signal, ...]:
    """The signal that brings the wanted words or phrases into the batch."""
    if settings.spans == "aligned":
        return ()
    found = [layer for layer, unit in levels if unit == settings.spans]
    if not found:
        raise UsageError(
            f"sra.spans={settings.spans} needs span_mass of some teacher layer on {settings.spans}s, none is cached",
            next="xkd-cache add CACHE --model M --for mta,sra",
        )
    return (Signal("span_mass", found[0], settings.spans),)


class _Spans(NamedTuple):
    """Ranges of student tokens and of kept teacher rows, [B, K, 2], and which count."""

    student_BK2: Tensor
    teacher_BK2: Tensor
    valid_BK: Tensor


class Sra(nn.Module):
    """Terms `cos`, `geo` and `kd`; each is a mean over documents with an aligned span."""

    layers: tuple[int, ...] = ()

    def __init__(self, settings: SraSettings, context: Context) -> None:
        super().__init__()
        self.settings = settings
        self.attention = settings.weights == "attention"
        self.projector = nn.Linear(context.student_width, context.teacher_width, bias=False)
        nn.init.xavier_uniform_(self.projector.weight)
        student_ids_V, teacher_ids_V = shared_vocabulary(
            context.student_vocab, context.teacher_vocab, settings.shared_vocab
        )
        head = constant_head(context.teacher_head(), "sra")
        self.student_ids_V: Tensor
        self.teacher_weight_VD: Tensor
        self.teacher_bias_V: Tensor | None
        self.register_buffer("student_ids_V", student_ids_V, persistent=False)
        self.register_buffer("teacher_weight_VD", head.weight_VD[teacher_ids_V], persistent=False)
        bias_V = None if head.bias_V is None else head.bias_V[teacher_ids_V]
        self.register_buffer("teacher_bias_V", bias_V, persistent=False)

    def weights(self, step: int) -> Mapping[str, float]:
        """L_HS + L_KD of the paper; cross-entropy is a loss of its own."""
        return {"cos": self.settings.cos, "geo": self.settings.geo, "kd": 1.0}

    def counts(self, batch: Batch) -> Mapping[str, Tensor]:
        """Documents with an aligned span."""
        return dict.fromkeys(("cos", "geo", "kd"), self._spans(batch).valid_BK.any(-1).sum())

    def _spans(self, batch: Batch) -> _Spans:
        """The pieces of the response that are compared."""
        if self.settings.spans == "aligned":
            return _Spans(batch.span_student_BK2, batch.span_teacher_BK2, batch.span_valid_BK)
        level = next(level for level in batch.levels if level.unit == self.settings.spans)
        whole_BK = level.teacher_BU2[..., 1] > level.teacher_BU2[..., 0]
        return _Spans(level.student_BU2, level.teacher_BU2, level.valid_BU & level.in_target_BU & whole_BK)

    def forward(self, batch: Batch, student: StudentPass, step: int) -> Mapping[str, LossTerm]:
        """The three terms of section 2.3."""
        s = self.settings
        spans = self._spans(batch)
        valid_BK = spans.valid_BK
        assert batch.teacher_hidden_BRD is not None
        teacher_BRD = batch.teacher_hidden_BRD.float()
        student_BKd, _ = pool_spans(student.states.last_BLD, self._student_weights(student), spans.student_BK2)
        teacher_BKD, mass_BK = pool_spans(teacher_BRD, self._teacher_weights(batch), spans.teacher_BK2)
        if not s.weighted_pooling:
            student_BKd, _ = pool_spans(
                student.states.last_BLD, uniform_weights(batch.student_valid_BS), spans.student_BK2
            )
            teacher_BKD, _ = pool_spans(teacher_BRD, uniform_weights(batch.teacher_valid_BR), spans.teacher_BK2)
        omega_BK = span_omega(mass_BK, valid_BK, s.p, s.weighted_loss)
        return {
            "cos": weighted_cosine(self.projector(student_BKd), teacher_BKD, omega_BK, valid_BK),
            "geo": geometric(student_BKd, teacher_BKD, omega_BK, valid_BK),
            "kd": self._kd(student, student_BKd, teacher_BKD, valid_BK),
        }

    def _student_weights(self, student: StudentPass) -> Tensor:
        valid_BS = student.batch.student_valid_BS
        if self.settings.weights == "attention":
            assert student.states.attention_BL is not None
            return student.states.attention_BL
        return uniform_weights(valid_BS)

    def _teacher_weights(self, batch: Batch) -> Tensor:
        if self.settings.weights == "attention":
            assert batch.teacher_attention_BR is not None
            return batch.teacher_attention_BR
        return uniform_weights(batch.teacher_valid_BR)

    def _kd(self, student: StudentPass, student_BKd: Tensor, teacher_BKD: Tensor, valid_BK: Tensor) -> LossTerm:
        """KL between what both heads make of the span vectors, on the shared classes (2.3c)."""
        head = student.logits
        rows_Vd = head.weight[self.student_ids_V]
        bias_V = None if head.bias is None else head.bias[self.student_ids_V]
        weights_BK = valid_BK.float()
        if self.settings.kd == "mean":
            weights_BK = weights_BK / valid_BK.sum(-1, keepdim=True).clamp_min(1)
        total = head_divergence(
            LazyLogits(hidden=student_BKd, weight=rows_Vd, bias=bias_V).at(valid_BK),
            LazyLogits(hidden=teacher_BKD, weight=self.teacher_weight_VD, bias=self.teacher_bias_V).at(valid_BK),
            weights_BK[valid_BK],
            Comparison(kind="forward_kl", temperature=self.settings.tau),
        )
        return term(total, valid_BK.any(-1).sum())


SRA = Declaration(
    name="sra",
    source="SRA, arXiv 2605.01205, sections 2.1-2.3 of its method",
    settings=SraSettings,
    needs=needs,
    build=Sra,
    default_weight=0.5,
)

"""What a loss says about itself: settings, the teacher signals it needs, and how it is built.

Capture, the size of the cache, the trainer and the error messages all read this one declaration.

Shape legend: see batch.py; d is the student's width, V its vocabulary.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn

from xkd_schemas.errors import UsageError, settings_error
from xkd_schemas.signals import Signal
from xkd_trainer.data.batch import Batch, gather_rows
from xkd_trainer.losses.ops.lazy_logits import LazyLogits
from xkd_trainer.losses.ops.shared_pass import HeadPlan
from xkd_trainer.models.architecture import Head
from xkd_trainer.models.forward import States

Kind = TypeVar("Kind", bound=BaseModel)
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Settings(BaseModel):
    """Options of a loss; here none. A key that is not known is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Levels(tuple[tuple[int, str], ...]):
    """(teacher layer, word or phrase) pairs, lowest layer first, and what else is known of the teacher's layers.

    At capture the pairs are those that are going to be read; in training, those that are in the cache.
    """

    num_layers: int
    """Of the teacher."""
    states: tuple[int, ...]
    """Layers, ascending, whose tokens' states are in the cache; at capture those of the pairs. Never the last one,
    whose states are `hidden_last`."""
    stored: frozenset[str]
    """Names of the signals in the cache; none at capture. A loss that can read one of two looks which is there."""

    def __new__(
        cls, pairs: Iterable[tuple[int, str]], *, num_layers: int, states: Iterable[int], stored: Iterable[str] = ()
    ) -> "Levels":
        """Levels of a teacher; its last layer is taken out of `states`."""
        levels = super().__new__(cls, pairs)
        levels.num_layers = num_layers
        levels.states = tuple(sorted(set(states) - {num_layers}))
        levels.stored = frozenset(stored)
        return levels


@dataclass(frozen=True, kw_only=True)
class Context:
    """What a loss may know when it is built. Teacher weights are constants: no gradient, not saved."""

    student_layers: int
    student_width: int
    student_vocab: Mapping[str, int]
    """Token string -> id."""
    teacher_layers: int
    teacher_width: int
    teacher_vocab: Mapping[str, int]
    teacher_vocab_size: int
    hidden_std: float
    embedding_std: float
    levels: Levels
    """What is in the cache."""
    teacher_head: Callable[[], Head]
    """Reads the teacher's head; call it only if the loss uses it."""
    teacher_embeddings: Callable[[], Tensor]
    student_head: Callable[[], Head]
    """The student's own, sharing its weights; they are those before training."""
    tokenizer_differences: tuple[str, ...]
    """Of vocabulary and probe (`xkd_schemas.text.tokenizers.identity`), those that differ between the two models."""
    same_tokens: Callable[[], tuple[int, int]]
    """Documents whose tokens, template included, are the same ids in both tables, and documents that were looked at.
    Reads both tables; call it only if the loss uses it."""

    def student_layer(self, teacher_layer: int) -> int:
        """The student layer at the same relative depth, at least 1.

        This is phi(l) = floor(l N_T / N_S) of MTA read backwards, because the teacher's layers were
        chosen before the student was known.
        """
        return max(1, round(teacher_layer * self.student_layers / self.teacher_layers))


class StudentPass:
    """The student's forward pass over one batch, as losses see it."""

    def __init__(
        self, batch: Batch, states: States, head: Head, embeddings_Vd: Tensor, embedded_BSd: Tensor | None = None
    ) -> None:
        self.batch, self.states, self.head = batch, states, head
        self.embeddings_Vd, self._embedded_BSd = embeddings_Vd, embedded_BSd

    def beside(self, batch: Batch) -> "StudentPass":
        """The same pass beside what another teacher knows of these documents; its plan is of the same logits."""
        return StudentPass(batch, self.states, self.head, self.embeddings_Vd, self._embedded_BSd)

    @cached_property
    def predict_hidden_BNd(self) -> Tensor:
        """Final-normed states that predict the targets; garbage where not valid."""
        return gather_rows(self.states.last_BLD, self.batch.predict_BN)

    @cached_property
    def target_embeddings_BNd(self) -> Tensor:
        """Input embeddings of the targets, float32, with gradient; garbage where not valid.

        They are rows of the table, without the factor that Gemma and others put on what they look up. Where the model
        has looked up plain rows these are taken: the table then gets one gradient, not two of its own size.
        """
        if self._embedded_BSd is None:
            return self.embeddings_Vd[self.batch.target_BN].float()
        last = self._embedded_BSd.shape[1] - 1
        return gather_rows(self._embedded_BSd, (self.batch.predict_BN + 1).clamp_max(last)).float()

    @property
    def logits(self) -> LazyLogits:
        """Logits of the predictions, [B, N] positions, not made yet; the head learns from them.

        UsageError where the student's head does more than a matrix product.
        """
        head = constant_head(self.head, "this student", convert=False)
        return LazyLogits(hidden=self.predict_hidden_BNd, weight=head.weight_VD, bias=head.bias_V)

    @cached_property
    def plan(self) -> HeadPlan:
        """What the step's losses want of those logits; what a loss asks of it costs least when others ask as well."""
        return HeadPlan(own=self.logits, target_BN=self.batch.target_BN, valid_BN=self.batch.predict_valid_BN)


class Loss(nn.Module):
    """A built loss; its parameters are its projectors.

    `forward(batch, student, step)` gives a `LossTerm` for each term, or what `student.plan` promises, which the caller
    runs together with what other losses want of it.
    """

    layers: tuple[int, ...] = ()
    """Student layers whose states it reads."""
    attention: bool | Literal["text"] = False
    """Whether it reads the student's last attention row, in the last block and in those of `layers`; "text": that of
    the last text token, in front of the end token."""
    terms: tuple[str, ...] | Mapping[str, float] = ()
    """Names of the terms, or the factor of each where it is not 1, for the two methods below."""

    def weights(self, step: int) -> Mapping[str, float]:
        """Factor of each term at an optimizer step; that of `terms` unless a loss says otherwise."""
        return self.terms if isinstance(self.terms, Mapping) else dict.fromkeys(self.terms, 1.0)

    def counts(self, batch: Batch) -> Mapping[str, Tensor]:
        """The `count` of each term, from the batch alone, so that a step can be divided before it is run.

        The student's predictions unless a loss says otherwise.
        """
        return dict.fromkeys(self.terms, batch.num_predictions)


class Projectors(BaseModel):
    """How a loss's projectors are trained; keys beside the loss's settings, `losses.sra.projector_lr=1e-3`."""

    model_config = ConfigDict(frozen=True)

    projector_lr: float = Field(default=1e-3, gt=0)
    """Peak learning rate; it follows the student's schedule."""
    projector_weight_decay: float = Field(default=0.0, ge=0)
    """Of all their parameters."""


def last_states(settings: object, levels: object) -> tuple[Signal, ...]:
    """What a loss of last states needs; heads and embeddings are always in the cache."""
    return (Signal("hidden_last"),)


@dataclass(frozen=True, kw_only=True, slots=True)
class Declaration:
    """One loss of the registry."""

    name: str
    source: str
    """Paper and sections."""
    settings: type[BaseModel] = Settings
    needs: Callable[[Any, Levels], tuple[Signal, ...]] = last_states
    """From settings and the (layer, unit) pairs to the signals that must be cached."""
    build: Callable[[Any, Context], nn.Module]
    """A `Loss`, or another module with its members."""
    default_weight: float = 1.0
    """What the paper's total gives the terms together."""
    ce_weight: float = 1.0
    """What it gives cross-entropy beside them."""
    plug_in: bool = False
    """Whether it is put on another loss, whose cross-entropy and weight it then has."""
    plug_weight: float | None = None
    """What a plug-in weighs beside this loss; None for `default_weight`."""
    projectors: Projectors = field(default_factory=Projectors)
    """How the paper trains its projectors, if it has any."""
    one_tokenizer: bool = False
    """Whether it compares token with token, so that student and teacher must have the same tokenizer."""

    def parse(self, values: Mapping[str, Any]) -> BaseModel:
        """Settings from the run file; UsageError names what does not fit."""
        return self._validate(self.settings, {k: v for k, v in values.items() if k not in Projectors.model_fields})

    def parse_projectors(self, values: Mapping[str, Any], everywhere: float | None) -> Projectors:
        """How its projectors are trained: as the loss's own keys say, else at the run's rate, else as in the paper."""
        given = {key: value for key, value in values.items() if key in Projectors.model_fields}
        run = {} if everywhere is None else {"projector_lr": everywhere}
        return self._validate(Projectors, self.projectors.model_dump() | run | given)

    def _validate(self, kind: type[Kind], values: Mapping[str, Any]) -> Kind:
        try:
            return kind.model_validate(dict(values))
        except ValidationError as error:
            raise settings_error(self.name, error, kind.model_fields | Projectors.model_fields) from None


def refuse_two_tokenizers(who: str, differing: Sequence[str], fix: str = "use dskd_cma or dskd_v2 in --loss") -> None:
    """UsageError where the student's tokenizer is not the teacher's."""
    if differing:
        differ = f"{' and '.join(differing)} of the student's and the teacher's differ"
        raise UsageError(f"{who} needs one tokenizer on both sides, and {differ}", fix=fix)


def constant_head(head: Head, who: str, *, convert: bool = True) -> Head:
    """A head that is a plain matrix product: a scale is folded into it, a soft cap refused.

    With `convert`, the result is a constant in float32 on a CPU, whose bfloat16 products are slow.
    """
    if head.softcap is not None:
        raise UsageError(
            f"{who} cannot use a head with soft-capped logits (cap {head.softcap})",
            fix="take a model without a cap, such as Gemma 1 or 3",
        )
    weight_VD, bias_V = head.weight_VD, head.bias_V
    if head.scale != 1.0:
        weight_VD, bias_V = weight_VD * head.scale, None if bias_V is None else bias_V * head.scale
    if convert:
        weight_VD = weight_VD.detach().float() if weight_VD.device.type == "cpu" else weight_VD.detach()
        bias_V = None if bias_V is None else bias_V.detach().to(weight_VD.dtype)
    return Head(weight_VD=weight_VD, bias_V=bias_V)


def describe_loss(declaration: Declaration) -> dict[str, Any]:
    """Source, needs (of a teacher of two layers), what a choice or `layers` needs besides, and defaults of a loss."""
    settings, fields = declaration.settings(), declaration.settings.model_fields
    levels = Levels([(1, "word"), (2, "phrase")], num_layers=2, states=[1])

    def needs(**values: Any) -> set[str]:
        signals = declaration.needs(declaration.parse(values), levels)
        return {s.name + "@LAYER" * (s.layer is not None) + ":UNIT" * (s.unit is not None) for s in signals}

    def choices(name: str, annotation: Any) -> Sequence[Any]:
        return [[1]] if name == "layers" else get_args(annotation) if get_origin(annotation) is Literal else []

    pairs = [(name, value) for name, field in fields.items() for value in choices(name, field.annotation)]
    more = {f"{name}={value}": sorted(needs(**{name: value}) - needs()) for name, value in pairs}
    return {
        "source": declaration.source,
        "one_tokenizer": declaration.one_tokenizer,
        "needs": sorted(needs()),
        "more": {setting: signals for setting, signals in more.items() if signals},
        "weight": declaration.default_weight,
        "ce_weight": declaration.ce_weight,
        "projectors": declaration.projectors.model_dump(),
        "settings": {name: getattr(settings, name) for name in fields},
    }

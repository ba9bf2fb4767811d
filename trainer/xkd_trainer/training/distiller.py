"""Student and losses as one module, so that wrappers for several devices see every parameter in one forward; and the
optimizers that its parameters can have, by the name that the run file gives them.

Shape legend: see batch.py.
"""

import importlib.util
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Final, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from xkd_schemas.errors import UsageError
from xkd_trainer.data.batch import Batch
from xkd_trainer.losses.declaration import Loss, Projectors, StudentPass
from xkd_trainer.losses.ops.shared_pass import Planned
from xkd_trainer.losses.registry import describe_weights, term_weights
from xkd_trainer.models.architecture import head_of, num_layers
from xkd_trainer.models.forward import rehearse, run
from xkd_trainer.models.lora import trained


class Distiller(nn.Module):
    """Runs the student on a batch and returns what every loss makes of it; `CacheDataset.distiller` makes one.

    `weights` are the factors of the losses, as `parse_loss` makes them; projectors are trained as in the papers where
    a loss is not named. `teachers` says which of several teachers a loss reads: 0, and where it is not named, for that
    of the batch itself, 1 for the first of `batch.others`.
    """

    def __init__(
        self, student: PreTrainedModel, losses: Mapping[str, nn.Module], weights: Mapping[str, float],
        projectors: Mapping[str, Projectors] | None = None, teachers: Mapping[str, int] | None = None, *,
        packing: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.student = student
        self._no_split_modules = getattr(student, "_no_split_modules", None)  # what FSDP keeps whole
        self.losses = nn.ModuleDict(losses)
        self.weights = dict(weights)
        self.projectors = {name: (projectors or {}).get(name, Projectors()) for name in losses}
        self.teachers = dict(teachers or {})
        self._built: dict[str, Loss] = {name: cast(Loss, loss) for name, loss in losses.items()}
        built = self._built.values()
        last, text = ([loss for loss in built if loss.attention == which] for which in (True, "text"))
        self._reads: dict[str, Any] = {
            "layers": sorted({layer for loss in built for layer in loss.layers}),
            "attention": bool(last),
            "attention_layers": sorted({layer for loss in last for layer in loss.layers}),
            "packing": packing,
            "text_layers": sorted({layer for loss in text for layer in (*loss.layers, num_layers(student))}),
        }
        rehearse(student, **self._reads)

    def loss(self, name: str) -> Loss:
        """A loss by name, typed as what it is."""
        return self._built[name]

    def term_weights(self, step: int) -> dict[str, float]:
        """What each term LOSS.TERM is multiplied by at a step, without those that are 0."""
        return term_weights(self.weights, self._built, step)

    def describe(self, last: int) -> str:
        """The whole sum of a run, for people."""
        return describe_weights(self.weights, self._built, last)

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Count of every term, named LOSS.TERM, from the batch alone."""
        every = (batch, *batch.others)
        return {
            f"{name}.{term}": n
            for name, loss in self._built.items()
            for term, n in loss.counts(every[self.teachers.get(name, 0)]).items()
        }

    def step_counts(self, batches: Iterable[Batch]) -> dict[str, Tensor]:
        """Count of every term over all micro-batches of an optimizer step on this process, in float64."""
        total: dict[str, Tensor] = {}
        for batch in batches:
            for name, count in self.counts(batch).items():
                total[name] = total.get(name, 0.0) + count.double()
        return total

    def forward(
        self, batch: Batch, denominators: Mapping[str, Tensor] | None = None, step: int = 0
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """One micro-batch: its share of the step's loss, and each term's share of its own mean, without weight and
        gradient.

        Args:
            batch: On the student's device.
            denominators: Count of every term over the whole optimizer step; None where this batch is all of it.
            step: The optimizer step, for warm-ups and annealing.
        """
        if denominators is None:
            denominators = self.step_counts([batch])
        looked_up: list[tuple[Tensor, int]] = []
        table = self.student.get_input_embeddings()
        plain = type(table).forward is nn.Embedding.forward  # others scale what they look up (Gemma)

        def keep(_module: nn.Module, _inputs: object, output: Tensor) -> None:
            if plain:
                looked_up.append((output, output._version))

        with table.register_forward_hook(keep):
            text_B = batch.student_text_B1[:, 0]
            states = run(self.student, batch.student_ids_BS, batch.student_valid_BS, text_B=text_B, **self._reads)
        embedded = next((rows for rows, version in looked_up if rows._version == version), None)  # CTRL writes in them
        if embedded is not None and states.packing is not None:
            embedded = states.packing.unpack(embedded)
        with torch.autocast(device_type=states.last_BLD.device.type, enabled=False):
            states = states.as_float32()
            passed = StudentPass(batch, states, head_of(self.student).as_float32(), table.weight, embedded)
            return self._losses(batch, passed, denominators, step)

    def _losses(
        self, batch: Batch, passed: StudentPass, denominators: Mapping[str, Tensor], step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        total = passed.states.last_BLD.sum() * 0.0  # keeps every parameter in the graph when no document qualifies
        parts: dict[str, Tensor] = {}
        planned: dict[str, tuple[Planned, Tensor]] = {}
        every = (passed, *map(passed.beside, batch.others))
        for name, loss in self._built.items():
            factors, seen = loss.weights(step), every[self.teachers.get(name, 0)]
            for term, value in loss(seen.batch, seen, step).items():
                key, factor = f"{name}.{term}", self.weights[name] * factors[term]
                count = denominators[key].to(total.dtype)
                share = torch.where(count > 0, count.clamp_min(TINY).reciprocal(), 0.0)
                parts[key] = share
                if isinstance(value, Planned):
                    planned[key] = value, factor * share
                else:
                    total = total + factor * share * value.total
                    parts[key] = (share * value.total).detach().float()
        if planned:
            joint, sums = passed.plan.run([p for p, _ in planned.values()], [f for _, f in planned.values()])
            total = total + joint
            parts |= {key: parts[key] * value for key, value in zip(planned, sums, strict=True)}
        return total, parts

    def parameter_groups(self, *, lr: float, weight_decay: float) -> list[dict[str, object]]:
        """AdamW groups: student with and without decay, and the projectors of each loss that has any."""
        student = [*trained(self.student).values()]
        groups: list[dict[str, object]] = [
            {"params": [p for p in student if p.ndim >= 2], "lr": lr, "weight_decay": weight_decay},
            {"params": [p for p in student if p.ndim < 2], "lr": lr, "weight_decay": 0.0},
        ]
        return [*groups, *self.projector_groups()]

    def projector_groups(self) -> list[dict[str, object]]:
        """Of the projectors of each loss that has any."""
        return [
            {
                "params": [*trained(self.losses[name]).values()],
                "lr": how.projector_lr,
                "weight_decay": how.projector_weight_decay,
            }
            for name, how in self.trained_projectors().items()
        ]

    def trained_projectors(self) -> dict[str, Projectors]:
        """How the projectors of each loss that has any are trained."""
        return {name: how for name, how in self.projectors.items() if trained(self.losses[name])}


TINY = torch.finfo(torch.float32).tiny  # smallest denominator that is not 0


Groups = Sequence[Mapping[str, Any]]


def _adamw_8bit(groups: Groups) -> Any:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UsageError(
            "--optimizer adamw_8bit needs bitsandbytes, which is not installed here",
            fix="pip install bitsandbytes, or --optimizer adafactor",
        )
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit(groups)


OPTIMIZERS: Final[Mapping[str, Callable[[Any], Any]]] = {
    "adamw": torch.optim.AdamW,
    "adamw_fused": partial(torch.optim.AdamW, fused=True),
    "adafactor": torch.optim.Adafactor,
    "adamw_8bit": _adamw_8bit,
}


def make_optimizer(name: str, groups: Groups) -> Any:
    """An optimizer of some groups of parameters, each with its rate and decay; UsageError where it cannot be had.

    The rate of adafactor is a share of each matrix's own size, and at most one over the root of the step.
    """
    return OPTIMIZERS[name]([dict(group) for group in groups])

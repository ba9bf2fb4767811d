"""One document of the tiny cache at a time: what transformers makes of it, and every term of a loss on a batch."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny_models as tiny
from xkd_trainer.data.batch import Batch
from xkd_trainer.data.collate import batch_of
from xkd_trainer.losses.ops.term import LossTerm
from xkd_trainer.training.distiller import Distiller
from xkd_trainer.training.prepare import Ready, set_up

ROWS = (3, 19, 0, 11)


@functools.cache
def student_folder(tied: bool) -> str:
    if tied:
        return str(tiny.tiny_cache().student)
    folder = tiny.tiny_cache().root / "untied"
    return str(tiny.saved(tiny.llama("sentencepiece", seed=5, tied=False), "sentencepiece", folder))


def ready(loss: str, *, tied: bool = True, **settings: Any) -> tuple[Ready, Batch]:
    """A loss built on the tiny cache, alone, and a batch for it."""
    run = tiny.tiny_cache().run(
        loss=f"ce=0+{loss}" if loss != "ce" else "ce", losses={loss: settings}, student__model=student_folder(tied)
    )
    made = set_up(run, "")
    return made, batch_of(made.cache, ROWS, made.wanted)


def ones(distiller: Distiller, batch: Batch) -> dict[str, Tensor]:
    """Denominators of 1, so that parts are totals."""
    return {name: torch.ones((), dtype=torch.float64) for name in distiller.counts(batch)}


def terms_of(distiller: Distiller, batch: Batch, step: int = 0) -> dict[str, LossTerm]:
    """All terms as the losses return them, named LOSS.TERM."""
    found: dict[str, LossTerm] = {}

    def spy(name: str, value: Mapping[str, LossTerm]) -> None:
        found.update({f"{name}.{term}": v for term, v in value.items()})

    handles = [
        module.register_forward_hook(lambda _m, _i, out, name=name: spy(name, out))
        for name, module in distiller.losses.items()
    ]
    distiller(batch, ones(distiller, batch), step)
    for handle in handles:
        handle.remove()
    return found


def totals(terms: Mapping[str, LossTerm]) -> dict[str, float]:
    return {name: float(t.total.detach()) for name, t in terms.items()}


def total_of(loss: str, step: int = 0, **settings: Any) -> dict[str, float]:
    made, batch = ready(loss, **settings)
    factors = made.distiller.loss(loss).weights(step)
    found = totals(terms_of(made.distiller, batch, step))
    return {term: found[f"{loss}.{term}"] * factor for term, factor in factors.items()}


class Alone:
    """One document of the batch: what transformers makes of the student's tokens, and the tables' own rows."""

    def __init__(self, made: Ready, row: int) -> None:
        self.document, self.teacher, self.student = (
            table[row] for table in (made.cache.documents, made.cache.teachers, made.cache.students)
        )
        model = tiny.llama("sentencepiece", seed=2)
        model.set_attn_implementation("eager")
        self.ids = self.student["token_ids"].tolist()
        with torch.no_grad():
            out = model(input_ids=torch.tensor([self.ids]), output_hidden_states=True, output_attentions=True)
        self.logits = out.logits[0]
        self.layers = [states[0].tolist() for states in out.hidden_states]
        text = max(t for t, kind in enumerate(self.student["token_kinds"].tolist()) if kind == 1)
        attention = out.attentions[-1][0, :, text].sum(0)
        self.attention = (attention / attention.sum()).tolist()
        self.head = model.get_output_embeddings().weight.detach()
        self.embeddings = model.get_input_embeddings().weight.detach()
        s, t = self.student["targets"], self.teacher["targets"]
        self.predict = [p for p in range(len(s) - 1) if s[p + 1]]
        self.teacher_predict = [p for p in range(len(t) - 1) if t[p + 1]]
        self.kept = [p for p in range(len(t)) if t[p] or (p + 1 < len(t) and t[p + 1])]

    def hidden(self) -> list[list[float]]:
        """The teacher's last states at its kept rows."""
        bits = torch.from_numpy(self.teacher["hidden_last"].astype("int32")) << 16
        return bits.view(torch.float32).tolist()

    def predictions(self, made: Ready) -> tuple[list[list[float]], list[list[float]]]:
        """Logits of both models at their predictions."""
        states = torch.tensor(self.hidden())[[self.kept.index(p) for p in self.teacher_predict]]
        return self.logits[self.predict].tolist(), (states @ made.cache.head().weight_VD.float().T).tolist()


def alone(made: Ready, rows: Sequence[int] = ROWS) -> list[Alone]:
    return [Alone(made, row) for row in rows]


def assert_term(found: LossTerm, total: float, count: float) -> None:
    assert float(found.total.detach()) == pytest.approx(total, rel=2e-4, abs=1e-6)
    assert float(found.count) == pytest.approx(count, rel=1e-5)

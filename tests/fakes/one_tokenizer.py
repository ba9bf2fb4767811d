"""The tiny cache once more, with every layered signal of its teacher, and students of one tokenizer and of another.

`ready(loss, ...)` is that loss built alone on it, with a batch. The teacher has 4 layers of width 32, students have as
many layers as asked for, width 16; words are read in layer 2, phrases in layers 3 and 4.
"""

import functools
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import tiny_models as tiny
from xkd_pipeline.capture.capture import TeacherSettings
from xkd_pipeline.capture.stage import make_teacher
from xkd_pipeline.stages import align_stage
from xkd_pipeline.workers.contract import Workers
from xkd_schemas.signals import Signal
from xkd_schemas.tokens import END, kept_rows, predictors
from xkd_trainer.data.batch import Batch, blank
from xkd_trainer.data.collate import batch_of
from xkd_trainer.losses.ops.term import LossTerm
from xkd_trainer.models.loading import load_tokenizer
from xkd_trainer.training.distiller import Distiller
from xkd_trainer.training.prepare import Ready, set_up

ROWS = (3, 19, 0, 11)
MASKS = ("predict_valid_BN", "span_valid_BK", "pair_valid_BE", "teacher_predict_valid_BM")
LAYERS = (1, 2, 3, 4)
LEVELS = ((2, "word"), (3, "phrase"), (4, "phrase"))
SIGNALS = (
    *(Signal(name) for name in ("hidden_last", "attention_last", "entropy", "argmax", "logsumexp", "target_logprob")),
    *(Signal(name, top=7) for name in ("topk_logits", "sampled")),
    *(Signal(name, layer) for name in ("hidden", "attention", "attention_text", "centrality") for layer in LAYERS),
    *(Signal(name, *level) for name in ("span_mass", "span_geometry", "span_vectors") for level in LEVELS),
)
SAME, OTHER, FRAMED = "same", "other", "framed"
"""Student tables: with the teacher's tokenizer, with another one, and with the teacher's but another template."""


@functools.cache
def cache() -> Path:
    """Documents of the tiny cache, its teacher with all signals, and both student tables."""
    small = tiny.tiny_cache()
    folder = small.root / "one-tokenizer"
    shutil.copytree(small.cache / "documents", folder / "documents")
    settings = TeacherSettings(model=str(small.teacher), template="none", dtype="float32", batch_tokens=256)
    make_teacher(folder, "teacher", settings, lambda _: SIGNALS, Workers(count=0))
    for name, template in ((SAME, "none"), (OTHER, "none"), (FRAMED, "alpaca")):
        own = {"student__model": student(name), "student__name": name, "student__template": template}
        align_stage(small.run(cache=str(folder), **own), Workers(count=0))
    return folder


@functools.cache
def student(table: str, depth: int = 4) -> str:
    kind = tiny.STUDENT_TOKENIZER if table == OTHER else tiny.TEACHER_TOKENIZER
    folder = tiny.tiny_cache().root / f"student-{table}-{depth}"
    return str(tiny.saved(tiny.llama(kind, seed=2, layers=depth, tied=False), kind, folder))


def ready(
    loss: str, *, table: str = SAME, depth: int = 4, model: str = "", more: str = "", ce: float = 0, **settings: Any
) -> tuple[Ready, Batch]:
    """A loss built alone (or with `more` others), and a batch for it."""
    run = tiny.tiny_cache().run(
        cache=str(cache()), loss=f"ce={ce}+{loss}{more}", losses={loss: settings},
        student__model=model or student(table, depth),
    )  # fmt: skip
    torch.manual_seed(0)
    made = set_up(run, table)
    return made, batch_of(made.cache, ROWS, made.wanted)


def every_term_of(distiller: Distiller, batch: Batch, step: int = 0) -> dict[str, LossTerm]:
    found: dict[str, LossTerm] = {}

    def note(name: str, out: Mapping[str, LossTerm]) -> None:
        found.update({f"{name}.{term}": value for term, value in out.items()})

    handles = [
        module.register_forward_hook(lambda _m, _i, out, name=name: note(name, out))
        for name, module in distiller.losses.items()
    ]
    ones: Mapping[str, Tensor] = {name: torch.ones(()) for name in distiller.counts(batch)}
    distiller(batch, ones, step)
    for handle in handles:
        handle.remove()
    return found


def terms_of(distiller: Distiller, batch: Batch, step: int = 0) -> dict[str, LossTerm]:
    (loss,) = distiller.losses
    return {name.removeprefix(f"{loss}."): term for name, term in every_term_of(distiller, batch, step).items()}


def means(made: Ready, batch: Batch) -> dict[str, float]:
    return {name: float((t.total / t.count).detach()) for name, t in terms_of(made.distiller, batch).items()}


def numbers(column: Any) -> Tensor:
    return (torch.from_numpy(column.astype("int32")) << 16).view(torch.float32)


@torch.no_grad()
def states_of(made: Ready, row: int) -> list[Tensor]:
    """The student's states of one document without padding, Hugging Face indices."""
    ids = torch.tensor([made.cache.students[row]["token_ids"].tolist()])
    out = made.distiller.student(input_ids=ids, output_hidden_states=True)
    return [states[0] for states in out.hidden_states]


class Alone:
    """One document: both models' tokens, states and embeddings at its predictions, unpadded, as lists."""

    def __init__(self, made: Ready, row: int) -> None:
        student, teacher = self.student, self.teacher = made.cache.students[row], made.cache.teachers[row]
        ids, t_ids = student["token_ids"], teacher["token_ids"]
        at, t_at = predictors(student["targets"]), predictors(teacher["targets"])
        self.at, self.t_at = at.tolist(), t_at.tolist()
        model, rows = made.distiller.student, np.searchsorted(kept_rows(teacher["targets"]), t_at)
        self.states = states_of(made, row)[-1][at].tolist()
        self.hidden = numbers(teacher["hidden_last"])[rows].tolist()
        self.targets = ids[at + 1].tolist()
        own, theirs = model.get_input_embeddings().weight.detach(), made.cache.embeddings().float()
        self.s_in, self.s_out = (own[ids[at + k]].tolist() for k in (0, 1))
        self.t_in, self.t_out = (theirs[t_ids[t_at + k]].tolist() for k in (0, 1))
        self.head = model.get_output_embeddings().weight.detach().tolist()
        self.wide = made.cache.head().weight_VD.float().tolist()


def logits_of(made: Ready, row: int) -> tuple[Tensor, Tensor, list[int]]:
    """Logits of both models at their predictions of one document, float64 [N, V] and [M, W], and the N targets."""
    one = Alone(made, row)
    rows, head, t_rows, wide = (torch.tensor(m).double() for m in (one.states, one.head, one.hidden, one.wide))
    return rows @ head.T, t_rows @ wide.T, one.targets


def pieces_of(made: Ready, batch: Batch, *, end_token: bool = False) -> list[Any]:
    """Documents as `slow_pieces` takes them, of the batch's rows."""
    documents: list[Any] = []
    for row in batch.rows:
        one, (own, theirs, targets) = Alone(made, row), logits_of(made, row)
        t_targets = one.teacher["token_ids"][np.array(one.t_at) + 1].tolist()
        spans = zip(one.student["student_spans"].tolist(), one.student["teacher_spans"].tolist(), strict=True)
        pieces = []
        for both in spans:
            is_text = one.student["token_kinds"][both[0][0]] != END
            inside = [
                [k for k, at in enumerate(places) if start <= at + 1 < end]
                for places, (start, end) in zip((one.at, one.t_at), both, strict=True)
            ]
            if all(len(i) == end - start for i, (start, end) in zip(inside, both, strict=True)):
                pieces += [tuple((i[0], i[-1] + 1) for i in inside)] if is_text or end_token else []
        documents.append(((own.tolist(), targets), (theirs.tolist(), t_targets), pieces))
    return documents


def vocabularies(made: Ready) -> tuple[dict[str, int], dict[str, int]]:
    """Token string -> id of both models."""
    teacher = load_tokenizer(str(made.cache.teachers.folder / "tokenizer"))
    return made.tokenizer.get_vocab(), teacher.get_vocab()


def assert_term(found: LossTerm, total: float, count: float, rel: float = 2e-4) -> None:
    assert float(found.total.detach()) == pytest.approx(total, rel=rel, abs=1e-6)
    assert float(found.count) == pytest.approx(count, rel=1e-5)


def only(batch: Batch, place: int) -> Batch:
    """The batch with no prediction, span or level valid but those of one document."""
    empty = blank(batch)
    pairs = [(getattr(empty, name), getattr(batch, name)) for name in MASKS]
    pairs += [(none.valid_BU, level.valid_BU) for none, level in zip(empty.levels, batch.levels, strict=True)]
    for none, valid in pairs:
        none[place] = valid[place]
    return empty

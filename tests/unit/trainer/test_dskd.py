"""The DSKD family: the equations against loops, and the three losses wired to a tiny cache."""

import functools
import shutil
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import ValidationError

import slow_dskd as slow
import tiny_models as tiny
from xkd_pipeline.stages import align_stage, teacher_stage
from xkd_pipeline.workers.contract import Workers
from xkd_schemas.errors import BadData, UsageError
from xkd_trainer.data.batch import Batch, gather_rows
from xkd_trainer.data.collate import batch_of
from xkd_trainer.losses.dual_space import (
    DskdCmaSettings,
    DskdSettings,
    teacher_states,
)
from xkd_trainer.losses.ops.divergence import DIVERGENCES
from xkd_trainer.losses.ops.term import LossTerm
from xkd_trainer.losses.ops.vocabulary import shared_vocabulary
from xkd_trainer.training.distiller import Distiller
from xkd_trainer.training.prepare import Ready, set_up

F64 = torch.float64
KINDS = list(DIVERGENCES)
TERMS = ("projected_ce", "student_space", "teacher_space")


# The equations


def test_defaults_are_those_of_the_scripts_and_every_divergence_can_be_chosen() -> None:
    s = DskdCmaSettings()

    assert (s.temperature, s.student_divergence, s.teacher_divergence) == (2.0, "forward_kl", "forward_kl")
    assert (s.skew, s.adaptive_alpha, s.correct_only) == (0.1, 0.5, True)
    assert [DskdSettings(teacher_divergence=kind).teacher_space.kind for kind in DIVERGENCES] == KINDS
    with pytest.raises(ValidationError):
        DskdSettings.model_validate({"correct_only": True})
    with pytest.raises(ValidationError):
        DskdCmaSettings.model_validate({"student_divergence": "kl"})


# Wired to a cache

ROWS = (3, 19, 0, 11)
STUDENTS = {"dskd": tiny.TEACHER_TOKENIZER, "dskd_cma": tiny.STUDENT_TOKENIZER, "dskd_v2": tiny.STUDENT_TOKENIZER}
"""Loss -> tokenizer of a student it can teach."""


@functools.cache
def student_folder(kind: str) -> str:
    folder = tiny.tiny_cache().root / f"dskd-student-{kind}"
    return str(tiny.saved(tiny.llama(kind, seed=6, tied=False), kind, folder))


@functools.cache
def cache_folder() -> str:
    """The documents of the tiny cache, a teacher captured for these losses, and a student of each tokenizer."""
    cache = tiny.tiny_cache().root / "for-dskd"
    shutil.copytree(tiny.tiny_cache().cache / "documents", cache / "documents")
    teacher_stage(run_of("dskd", cache=str(cache), teacher__losses=tuple(STUDENTS)), Workers(count=0))
    for loss in ("dskd", "dskd_cma"):
        align_stage(run_of(loss, cache=str(cache)), Workers(count=0))
    return str(cache)


def run_of(loss: str, **changed: Any) -> Any:
    return tiny.tiny_cache().run(
        **{"loss": f"ce=0+{loss}", "student__model": student_folder(STUDENTS[loss])} | changed
    )


def ready(loss: str, rows: Sequence[int] = ROWS, **settings: Any) -> tuple[Ready, Batch]:
    made = set_up(run_of(loss, cache=cache_folder(), losses={loss: settings}), "")
    return made, batch_of(made.cache, rows, made.wanted)


def half_agreeing(made: Ready, batch: Batch) -> None:
    """Make dskd_v2's projection predict the label of about every other labelled pair."""
    module = made.distiller.losses["dskd_v2"]
    label_BE, labelled_BE = module._labels(batch)
    hidden_BED = gather_rows(teacher_states(batch), batch.pairs_BE2[..., 1])[labelled_BE]
    head = made.distiller.student.get_output_embeddings().weight.detach()
    unit = torch.nn.functional.normalize(head, dim=-1)
    signs = torch.tensor([1.0, -1.0]).repeat(len(hidden_BED))[: len(hidden_BED), None]
    wanted = 4.0 * signs * unit[label_BE[labelled_BE]]
    with torch.no_grad():
        module.t2s.weight.copy_((torch.linalg.pinv(hidden_BED) @ wanted).T)


def terms_of(distiller: Distiller, batch: Batch) -> dict[str, LossTerm]:
    found: dict[str, LossTerm] = {}
    (name,) = distiller.losses
    handle = distiller.losses[name].register_forward_hook(lambda _m, _i, out: found.update(out))
    distiller(batch, distiller.counts(batch), 0)
    handle.remove()
    return found


class Alone:
    """One document: both models' tokens, states and embeddings at its predictions, unpadded, as lists."""

    def __init__(self, made: Ready, row: int) -> None:
        student, teacher = self.student, self.teacher = made.cache.students[row], made.cache.teachers[row]
        s, t = student["targets"], teacher["targets"]
        ids, t_ids = student["token_ids"].tolist(), teacher["token_ids"].tolist()
        at, t_at = self.at, self.t_at = tuple([p for p in range(len(x) - 1) if x[p + 1]] for x in (s, t))
        kept = [p for p in range(len(t)) if t[p] or (p + 1 < len(t) and t[p + 1])]
        model = made.distiller.student
        with torch.no_grad():
            states = model.base_model(input_ids=torch.tensor([ids])).last_hidden_state[0, at]
        bits = torch.from_numpy(teacher["hidden_last"].astype("int32")) << 16
        self.states = states.tolist()
        self.hidden = bits.view(torch.float32)[[kept.index(p) for p in t_at]].tolist()
        self.targets = [ids[p + 1] for p in at]
        own, theirs = model.get_input_embeddings().weight.detach(), made.cache.embeddings().float()
        self.query_input = torch.cat([own[[ids[p] for p in at]], own[self.targets]], 1).tolist()
        self.t_in, self.t_out = (theirs[[t_ids[p + k] for p in t_at]].tolist() for k in (0, 1))
        self.head = model.get_output_embeddings().weight.detach().tolist()
        self.wide = made.cache.head().weight_VD.float().tolist()


def through(layer: Any, rows: Any) -> list[list[float]]:
    return slow.linear(rows, layer.weight.tolist(), layer.bias.tolist())


def pairs_of(made: Ready, d: Alone) -> tuple[list[tuple[int, int]], list[int | None]]:
    """Exact pairs of predictions of one document, and the teacher's label of each in the student's vocabulary."""
    s, t = (d.student[name].tolist() for name in ("student_spans", "teacher_spans"))
    pairs = [
        (d.at.index(a - 1), d.t_at.index(x - 1))
        for (a, b), (x, y) in zip(s, t, strict=True)
        if d.student["targets"][a] and b - a == y - x == 1
    ]
    vocabularies = [tiny.tokenizer_of(kind).get_vocab() for kind in (tiny.STUDENT_TOKENIZER, tiny.TEACHER_TOKENIZER)]
    own, theirs = shared_vocabulary(*vocabularies, "mapped")
    names = dict(zip(theirs.tolist(), own.tolist(), strict=True))
    return pairs, [names.get(int(d.teacher["argmax"][m])) for _, m in pairs]


def expected_counts(made: Ready, loss: str, d: Alone) -> list[int]:
    """The three counts of one document."""
    if loss != "dskd_v2":
        return [len(d.targets)] * 3
    pairs, labels = pairs_of(made, d)
    projected = slow.linear(
        slow.linear([d.hidden[m] for _, m in pairs], made.distiller.losses["dskd_v2"].t2s.weight.tolist()), d.head
    )
    likeliest = [max(range(len(row)), key=row.__getitem__) for row in projected]
    labelled = sum(label is not None for label in labels)
    return [labelled, sum(a == b for a, b in zip(likeliest, labels, strict=True)), len(pairs)]


def expected_v2(made: Ready, d: Alone) -> list[float]:
    """The three totals of one document (METHODS 4.3)."""
    numbers = ("forward_kl", 2.0, 0.1, 0.5)
    pairs, labels = pairs_of(made, d)
    vocabularies = [tiny.tokenizer_of(kind).get_vocab() for kind in (tiny.STUDENT_TOKENIZER, tiny.TEACHER_TOKENIZER)]
    own, theirs = (ids.tolist() for ids in shared_vocabulary(*vocabularies, "mapped"))
    inverse = torch.linalg.pinv(torch.tensor([d.wide[v] for v in theirs], dtype=F64))
    s2t = (inverse @ torch.tensor([d.head[v] for v in own], dtype=F64)).tolist()
    states, hidden = [d.states[n] for n, _ in pairs], [d.hidden[m] for _, m in pairs]
    t2s = made.distiller.losses["dskd_v2"].t2s.weight.tolist()
    mine, projected = slow.linear(states, d.head), slow.linear(slow.linear(hidden, t2s), d.head)
    back = slow.linear(slow.linear(states, s2t), d.wide)
    at = [e for e, label in enumerate(labels) if label is not None]
    targets = [label for label in labels if label is not None]
    return [
        slow.projected_ce([projected[e] for e in at], targets),
        slow.student_space([mine[e] for e in at], [projected[e] for e in at], targets, *numbers),
        slow.teacher_space(back, slow.linear(hidden, d.wide), *numbers),
    ]


def expected_terms(made: Ready, loss: str, d: Alone) -> list[float]:
    """The three totals of one document (METHODS 4.1 to 4.3)."""
    if loss == "dskd_v2":
        return expected_v2(made, d)
    m, numbers = made.distiller.losses[loss], ("forward_kl", 2.0, 0.1, 0.5)
    if loss == "dskd":
        to_student, to_teacher, targets = through(m.t2s, d.hidden), through(m.s2t, d.states), None
    else:
        key = [[x / m.embedding_std for x in (*a, *b)] for a, b in zip(d.t_in, d.t_out, strict=True)]
        values = [
            [h / m.hidden_std + e / m.embedding_std for h, e in zip(a, b, strict=True)]
            for a, b in zip(d.hidden, d.t_out, strict=True)
        ]
        query, targets = through(m.query, d.query_input), d.targets
        to_student = slow.mixed(slow.attention(query, key), through(m.t2s, values))
        to_teacher = slow.mixed(slow.attention(key, query), through(m.s2t, d.states))
    projected = slow.linear(to_student, d.head)
    return [
        slow.projected_ce(projected, d.targets),
        slow.student_space(slow.linear(d.states, d.head), projected, targets, *numbers),
        slow.teacher_space(slow.linear(to_teacher, d.wide), slow.linear(d.hidden, d.wide), *numbers),
    ]


@pytest.mark.parametrize("loss", STUDENTS)
def test_terms_are_the_loops_over_single_documents(loss: str) -> None:
    made, batch = ready(loss, rows=(11, 19))
    module = made.distiller.losses[loss]
    if loss == "dskd_cma":
        module.hidden_std, module.embedding_std = 3.0, 0.5  # those of the tiny teacher are too near to 1
        with torch.no_grad():
            module.query.weight.mul_(20.0)  # so that no token attends to all alike
            module.t2s.bias.copy_(5.0 * made.distiller.student.get_output_embeddings().weight[batch.target_BN[0, 0]])

    if loss == "dskd_v2":
        half_agreeing(made, batch)

    found = terms_of(made.distiller, batch)

    documents = [Alone(made, row) for row in (11, 19)]
    totals = [sum(column) for column in zip(*(expected_terms(made, loss, d) for d in documents), strict=True)]
    assert min(totals) > 1e-3
    assert [float(found[t].total.detach()) for t in TERMS] == pytest.approx(totals, rel=2e-4)
    counts = [sum(column) for column in zip(*(expected_counts(made, loss, d) for d in documents), strict=True)]
    assert [float(found[t].count) for t in TERMS] == counts


@pytest.mark.parametrize("loss", ["dskd_cma", "dskd_v2"])
def test_only_right_predictions_are_compared_unless_asked_otherwise(loss: str) -> None:
    totals = []
    for changed in ({}, EVERYWHERE[loss]):
        made, batch = ready(loss, **changed)
        if loss == "dskd_v2":
            half_agreeing(made, batch)
        totals.append(float(terms_of(made.distiller, batch)["student_space"].total.detach()))

    masked, everything = totals
    assert masked < 0.7 * everything


EVERYWHERE: dict[str, dict[str, Any]] = {"dskd_cma": {"correct_only": False}, "dskd_v2": {"agreement": False}}
"""Settings without a mask on the student's space."""


def test_dskd_refuses_another_tokenizer_before_anything_is_trained() -> None:
    run = run_of("dskd", cache=cache_folder(), student__model=student_folder(tiny.STUDENT_TOKENIZER))

    with pytest.raises(UsageError, match=r"dskd needs one tokenizer .* vocabulary and probe .* differ.*dskd_cma") as c:
        set_up(run, "")

    assert "\n" not in str(c.value)


def test_dskd_refuses_responses_of_different_length() -> None:
    made, batch = ready("dskd")
    shorter = batch.teacher_predict_valid_BM.clone()
    shorter[1, int(shorter[1].sum()) - 1] = False

    with pytest.raises(BadData, match=r"rows 3, 19, 0, 11 has responses of different length"):
        made.distiller.counts(replace(batch, teacher_predict_valid_BM=shorter))

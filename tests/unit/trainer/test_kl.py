"""The same-vocabulary divergences: loops over single documents, a teacher as its own student, and refusals."""

import functools
import math
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import slow_losses
import small_cache
from one_step import widen
from slow_losses import tail_share
from xkd_pipeline.stages import align_stage
from xkd_schemas.errors import BadData, UsageError
from xkd_trainer.data.batch import Batch
from xkd_trainer.data.collate import batch_of
from xkd_trainer.losses.declaration import StudentPass
from xkd_trainer.losses.ops.divergence import DIVERGENCES
from xkd_trainer.losses.ops.lazy_logits import LazyLogits
from xkd_trainer.losses.ops.term import LossTerm
from xkd_trainer.models.architecture import head_of
from xkd_trainer.models.forward import run
from xkd_trainer.training.prepare import Ready, set_up

ROWS = (0, 5, 2)


@functools.cache
def cache() -> Path:
    """The small cache with a student table of the teacher's own tokenizer and template."""
    made = small_cache.made()
    folder = Path(shutil.copytree(made / "cache", Path(tempfile.mkdtemp(prefix="xkd-kl-")) / "cache"))
    student = {"tokenizer": str(made / "teacher"), "name": "same", "template": "chat"}
    align_stage(small_cache.run_file(folder, student=student, teacher={"name": "T"}), small_cache.IN_PROCESS)
    return folder


@functools.cache
def other_student() -> Path:
    """Another Llama of the same shape and tokenizer."""
    return small_cache.llama(Path(tempfile.mkdtemp(prefix="xkd-kl-student-")), seed=7)


def ready(student: Path, table: str = "same", **settings: Any) -> Ready:
    train = {"loss": "kl", "out": "unused"}
    run_file = small_cache.run_file(
        cache(), student={"model": str(student), "name": table}, train=train, **{"losses.kl": settings}
    )
    return set_up(run_file, table)


def term_of(made: Ready, batch: Batch) -> LossTerm:
    """The loss's one term, of the student's own states."""
    student = made.distiller.student
    states = run(student, batch.student_ids_BS, batch.student_valid_BS)
    passed = StudentPass(batch, states, head_of(student), student.get_input_embeddings().weight)
    return made.distiller.loss("kl")(batch, passed, 0)["kl"]


def slow(kind: str, p: Sequence[float], q: Sequence[float]) -> float:
    """Plain sums over classes of probabilities p (teacher) and q (student)."""
    kl = lambda a, b: math.fsum(x * math.log(x / y) for x, y in zip(a, b, strict=True) if x > 0)  # noqa: E731
    mixed = lambda share: [share * x + (1 - share) * y for x, y in zip(p, q, strict=True)]  # noqa: E731
    return {
        "forward_kl": lambda: kl(p, q),
        "reverse_kl": lambda: kl(q, p),
        "js": lambda: 0.5 * kl(p, mixed(0.5)) + 0.5 * kl(q, mixed(0.5)),
        "skewed_forward_kl": lambda: kl(p, mixed(0.1)),
        "skewed_reverse_kl": lambda: kl(q, mixed(0.9)),
        "tvd": lambda: math.fsum(abs(x - y) for x, y in zip(p, q, strict=True)) / 2,
        "ab": lambda: slow_losses.ab(p, q, 0.2, 0.7),
        "csd": lambda: slow_losses.csd(p, q),
        "adaptive_kl": lambda: (1 - tail_share(p, q, 0.5)) * kl(p, q) + tail_share(p, q, 0.5) * kl(q, p),
    }[kind]()


@pytest.mark.parametrize("kind", DIVERGENCES)
@torch.no_grad()
def test_the_term_is_the_loops_over_single_documents(kind: str) -> None:
    made = ready(other_student(), divergence=kind, temperature=2.0)
    model = AutoModelForCausalLM.from_pretrained(other_student())
    head = made.cache.head().weight_VD.double()
    total, count = 0.0, 0
    for row in ROWS:
        teacher, student = made.cache.teachers[row], made.cache.students[row]
        logits = model(torch.tensor([student["token_ids"].tolist()])).logits[0].double()
        kept = [
            t
            for t, _ in enumerate(teacher["targets"])
            if teacher["targets"][t] or teacher["targets"][t + 1 : t + 2].any()
        ]
        states = (torch.from_numpy(teacher["hidden_last"].astype("int32")) << 16).view(torch.float32).double()
        for t in (t for t in range(len(teacher["targets"]) - 1) if teacher["targets"][t + 1]):
            p = (head @ states[kept.index(t)] / 2).softmax(-1).tolist()
            total += slow(kind, p, (logits[t] / 2).softmax(-1).tolist())
            count += 1

    found = term_of(made, batch_of(made.cache, ROWS, made.wanted))
    assert float(found.total) == pytest.approx(total, rel=1e-4)
    assert int(found.count) == count > 10


def test_classes_beyond_the_tokenizer_take_no_part() -> None:
    hidden, weight = torch.arange(8.0).view(2, 4), torch.arange(-18.0, 18).view(9, 4)  # exact in any order of adding
    cut = LazyLogits(hidden=hidden, weight=weight, bias=torch.arange(9.0)).of_classes(slice(6))
    assert torch.equal(cut.dense(), (hidden @ weight.T + torch.arange(9.0))[:, :6])


@pytest.mark.parametrize("kind", ["forward_kl", "csd"])
@torch.no_grad()
def test_nor_do_they_in_the_loss_whichever_head_has_them(kind: str) -> None:
    made = ready(other_student(), divergence=kind)
    batch = batch_of(made.cache, ROWS, made.wanted)
    before = float(term_of(made, batch).total)

    for owner, name in ((made.distiller.student.lm_head, "weight"), (made.distiller.losses["kl"].head, "weight_VD")):
        widen(owner, name)
        assert float(term_of(made, batch).total) == pytest.approx(before, rel=1e-6)


def test_two_tokenizers_and_other_lengths_are_refused(tmp_path: Path) -> None:
    run_file = small_cache.run_file(
        cache(), student={"model": "new:llama,layers=1,width=16", "tokenizer": str(small_cache.made() / "student")},
        train={"loss": "kl"},
    )  # fmt: skip
    with pytest.raises(UsageError, match=r"loss kl needs one tokenizer on both sides.*Next: use dskd_cma"):
        set_up(run_file, "S")
    made = ready(other_student())
    batch = batch_of(made.cache, ROWS, made.wanted)
    with pytest.raises(BadData, match=r"loss kl: one of the rows 0, 5, 2 has responses of different length"):
        made.distiller.counts(replace(batch, teacher_predict_valid_BM=~batch.teacher_predict_valid_BM))

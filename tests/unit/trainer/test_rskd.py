"""Forward KL from drawn classes on a cache: loops over single documents, the full KL beside it, padding, refusals."""

import functools
import math
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import small_cache
from one_step import gradients, widen
from xkd_pipeline.capture.sampled_logits import draw_classes, uniforms
from xkd_pipeline.stages import align_stage, teacher_stage
from xkd_schemas.cache.table import Table
from xkd_schemas.codecs import TOTAL
from xkd_schemas.config import TeacherSection
from xkd_schemas.errors import BadData, UsageError
from xkd_schemas.signals import Signal
from xkd_schemas.tokens import predictors
from xkd_trainer.data.batch import Batch
from xkd_trainer.data.collate import batch_of
from xkd_trainer.losses.declaration import StudentPass
from xkd_trainer.losses.ops.term import LossTerm
from xkd_trainer.training.prepare import Ready, set_up

ROWS = (0, 5, 2)
K = 6


@functools.cache
def cache() -> Path:
    """The small cache with a teacher table for rskd and kl, and a student table of the same tokenizer."""
    made = small_cache.made()
    folder = Path(shutil.copytree(made / "cache", Path(tempfile.mkdtemp(prefix="xkd-rskd-")) / "cache"))
    teacher = {"model": str(made / "teacher"), "name": "drawn", "losses": ["rskd", "kl"], "samples": K}
    student = {"tokenizer": str(made / "teacher"), "name": "same", "template": "chat"}
    run = small_cache.run_file(folder, teacher=teacher, student=student)
    teacher_stage(run, small_cache.IN_PROCESS)
    align_stage(run.model_copy(update={"teacher": TeacherSection(name="drawn")}), small_cache.IN_PROCESS)
    return folder


@functools.cache
def other_student() -> Path:
    """Another Llama of the same shape and tokenizer."""
    return small_cache.llama(Path(tempfile.mkdtemp(prefix="xkd-rskd-student-")), seed=7)


def ready(loss: str = "rskd") -> Ready:
    train = {"loss": f"ce=0+{loss}", "out": "unused"}
    run = small_cache.run_file(cache(), student={"model": str(other_student()), "name": "same"}, train=train)
    return set_up(run, "same")


def term_of(made: Ready, batch: Batch) -> LossTerm:
    """The loss's one term, of the student's own states."""
    from xkd_trainer.models.architecture import head_of
    from xkd_trainer.models.forward import run

    student = made.distiller.student
    states = run(student, batch.student_ids_BS, batch.student_valid_BS)
    passed = StudentPass(batch, states, head_of(student), student.get_input_embeddings().weight)
    return made.distiller.loss("rskd")(batch, passed, 0)["sampled_kl"]


def test_the_cache_holds_k_entries_of_every_prediction() -> None:
    table = Table(cache(), "teachers/drawn")
    assert table.manifest.spec["signals"] == ["argmax", "entropy", "hidden_last", f"sampled#{K}"]
    for row in table:
        entries = row[f"sampled#{K}"]
        assert entries.shape == (len(predictors(row["targets"])), K)
        assert (entries % (TOTAL + 1)).sum(1).tolist() == [TOTAL] * len(entries)


@torch.no_grad()
def test_the_term_is_the_loops_over_single_documents() -> None:
    made = ready()
    model = AutoModelForCausalLM.from_pretrained(other_student())
    total, count = 0.0, 0
    for row in ROWS:
        teacher, student = made.cache.teachers[row], made.cache.students[row]
        logits = model(torch.tensor([student["token_ids"].tolist()])).logits[0].double()
        places = [t for t in range(len(teacher["targets"]) - 1) if teacher["targets"][t + 1]]
        for n, t in enumerate(places):
            log_q = logits[t].log_softmax(-1).tolist()
            entries = [divmod(entry, TOTAL + 1) for entry in teacher[f"sampled#{K}"][n].tolist()]
            total += math.fsum(-share / TOTAL * log_q[place] for place, share in entries) - float(
                teacher["entropy"][n]
            )
            count += 1

    found = term_of(made, batch_of(made.cache, ROWS, made.wanted))
    assert float(found.total) == pytest.approx(total, rel=1e-4)
    assert int(found.count) == count > 10


@torch.no_grad()
def test_what_is_stored_is_what_is_drawn_from_the_live_teacher() -> None:
    made = ready()
    teacher = AutoModelForCausalLM.from_pretrained(small_cache.made() / "teacher")
    batch = batch_of(made.cache, ROWS, made.wanted)
    ids, weights = batch.teacher_sampled_ids_BMK.clone(), batch.teacher_sampled_weights_BMK.clone()
    for place, row in enumerate(ROWS):
        stored = made.cache.teachers[row]
        where = torch.from_numpy(predictors(stored["targets"]))
        logits = teacher(torch.tensor([stored["token_ids"].tolist()])).logits[0, where]
        random = torch.from_numpy(uniforms(stored["token_ids"], len(where)))
        found = np.divmod(draw_classes(logits, random, K).entries_Nk, TOTAL + 1)
        ids[place, : len(where)] = torch.from_numpy(found[0])
        weights[place, : len(where)] = torch.from_numpy(found[1] / TOTAL)

    valid = batch.teacher_predict_valid_BM
    same = (ids == batch.teacher_sampled_ids_BMK).all(-1)[valid]
    assert float(same.float().mean()) > 0.98  # a draw may fall on the other side of a rounding
    online = replace(batch, teacher_sampled_ids_BMK=ids, teacher_sampled_weights_BMK=weights)
    assert float(term_of(made, batch).total) == pytest.approx(float(term_of(made, online).total), rel=0.02)


@torch.no_grad()
def test_the_manifest_says_how_far_the_draws_are_from_the_distributions() -> None:
    made = ready("rskd")
    wanted = frozenset({*made.wanted, Signal("hidden_last")})
    head, lost, kept = made.cache.head(), 0.0, 0.0
    for row in made.cache.usable:
        batch = batch_of(made.cache, [row], wanted)
        p_MV = head(batch.teacher_hidden_BRD[0, batch.teacher_predict_BM[0]].float()).double().softmax(-1)
        ids, weights = batch.teacher_sampled_ids_BMK[0], batch.teacher_sampled_weights_BMK[0].double()
        lost += float((torch.zeros_like(p_MV).scatter_(-1, ids, weights) - p_MV).square().sum())
        kept += float(p_MV.square().sum())

    said = Table(cache(), "teachers/drawn").manifest.constants["codec_error"]
    assert said == {f"sampled#{K}": pytest.approx((lost / kept) ** 0.5, rel=0.01)}


def test_the_gradient_of_many_documents_goes_where_that_of_kl_goes() -> None:
    slopes = []
    for made in (ready("rskd"), ready("kl")):
        batch = batch_of(made.cache, range(12), made.wanted)
        _, found = gradients(made.distiller, [batch], made.distiller.counts(batch))
        slopes.append(torch.cat([slope.flatten() for slope in found.values()]))

    assert float(torch.nn.functional.cosine_similarity(*slopes, dim=0)) > 0.5


@torch.no_grad()
def test_rows_of_the_students_head_beyond_the_tokenizer_take_no_part() -> None:
    made = ready()
    batch = batch_of(made.cache, ROWS, made.wanted)
    before = float(term_of(made, batch).total)

    widen(made.distiller.student.lm_head, "weight")

    assert float(term_of(made, batch).total) == pytest.approx(before, rel=1e-6)


def test_what_does_not_fit_is_refused() -> None:
    made = ready()
    batch = batch_of(made.cache, ROWS, made.wanted)
    with pytest.raises(BadData, match=r"loss rskd: one of the rows 0, 5, 2 has responses of different length"):
        made.distiller.counts(replace(batch, teacher_predict_valid_BM=~batch.teacher_predict_valid_BM))
    with pytest.raises(BadData, match=r"loss rskd: class 100000 is drawn in one of the rows 0, 5, 2, .*verify"):
        made.distiller.counts(replace(batch, teacher_sampled_ids_BMK=torch.full((3, 1, 1), 100_000)))
    two = small_cache.run_file(
        cache(), student={"model": "new:llama,layers=1,width=16", "tokenizer": str(small_cache.made() / "student")},
        train={"loss": "rskd"},
    )  # fmt: skip
    with pytest.raises(UsageError, match="loss rskd needs"):
        set_up(two, "S")
    with pytest.raises(UsageError, match=r"needs sampled, which|needs entropy, sampled, which"):
        made.cache.__class__(cache(), student="S").require("rskd", tuple(made.wanted))

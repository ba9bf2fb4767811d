"""ce, kl and rskd: loops over single documents, and what the drawn classes stand for."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import one_tokenizer as one
import slow_losses as slow
import tiny_models as tiny
from one_step import gradients
from xkd_pipeline.capture.measure import draw_classes, uniforms
from xkd_schemas.codecs import TOTAL
from xkd_schemas.errors import BadData
from xkd_schemas.tokens import predictors
from xkd_trainer.data.collate import batch_of
from xkd_trainer.losses.baselines.kl import head_sampled_kl
from xkd_trainer.losses.ops.lazy_logits import LazyLogits

COLUMN = "sampled#7"


@pytest.mark.parametrize("kind", ["forward_kl", "adaptive_kl", "csd"])
def test_kl_is_the_loops_over_predictions_of_single_documents(kind: str) -> None:
    made, batch = one.ready("kl", ce=1.0, divergence=kind, temperature=2.0)
    classes = len(tiny.tokenizer_of(tiny.TEACHER_TOKENIZER))
    kl = ce = count = 0.0
    for row in one.ROWS:
        own, theirs, targets = one.logits_of(made, row)
        both = zip(own[:, :classes].tolist(), theirs[:, :classes].tolist(), strict=True)
        kl += sum(slow.divergence(q, p, kind, 2.0, 0.1, 0.5) for q, p in both)
        ce += slow.cross_entropy(own.tolist(), targets)
        count += len(targets)

    found = one.every_term_of(made.distiller, batch)

    one.assert_term(found["kl.kl"], kl, count)
    one.assert_term(found["ce.ce"], ce, count)


def test_cross_entropy_that_skips_a_policy_is_that_of_the_other_documents_and_no_other_loss_skips() -> None:
    made, batch = one.ready("kl", ce=1.0)
    batch = replace(batch, policies=("student", "", *["teacher"] * (len(one.ROWS) - 2)))
    kept = batch_of(made.cache, one.ROWS[1:], made.wanted)
    whole, alone = (one.every_term_of(made.distiller, each) for each in (batch, kept))

    made.distiller.loss("ce").skip = "student"
    found, counts = one.every_term_of(made.distiller, batch), made.distiller.counts(batch)
    slopes = gradients(made.distiller, [batch], counts)[1]
    cut = [batch_of(made.cache, rows, made.wanted) for rows in (one.ROWS[:1], one.ROWS[1:])]
    cut = [replace(cut[0], policies=("student",)), replace(cut[1], policies=batch.policies[1:])]
    parts = gradients(made.distiller, cut, counts)[1]

    one.assert_term(found["ce.ce"], float(alone["ce.ce"].total.detach()), float(alone["ce.ce"].count), rel=1e-5)
    one.assert_term(found["kl.kl"], float(whole["kl.kl"].total.detach()), float(whole["kl.kl"].count), rel=1e-5)
    assert float(counts["ce.ce"]) == float(kept.num_predictions) < float(counts["kl.kl"])
    for name, slope in slopes.items():
        torch.testing.assert_close(parts[name], slope, rtol=1e-4, atol=1e-6, msg=name)
    made.distiller.loss("ce").skip = "teacher, and another"
    assert float(made.distiller.counts(batch)["ce.ce"]) == float(batch.num_predictions)


def test_classes_beyond_the_tokenizer_take_no_part() -> None:
    hidden, weight = torch.arange(8.0).view(2, 4), torch.arange(-18.0, 18).view(9, 4)  # exact in any order of adding
    cut = LazyLogits(hidden=hidden, weight=weight, bias=torch.arange(9.0)).of_classes(slice(6))
    assert torch.equal(cut.dense(), (hidden @ weight.T + torch.arange(9.0))[:, :6])


def test_rskd_is_the_loops_over_drawn_classes_of_single_documents() -> None:
    made, batch = one.ready("rskd")
    total, count = 0.0, 0
    for row in one.ROWS:
        teacher = made.cache.teachers[row]
        log_q = one.logits_of(made, row)[0].log_softmax(-1).tolist()
        for n, entries in enumerate(teacher[COLUMN].tolist()):
            shares = [divmod(entry, TOTAL + 1) for entry in entries]
            assert sum(share for _, share in shares) == TOTAL
            total += math.fsum(-share / TOTAL * log_q[n][place] for place, share in shares)
            total -= float(teacher["entropy"][n])
            count += 1

    one.assert_term(one.terms_of(made.distiller, batch)["sampled_kl"], total, count)


@torch.no_grad()
def test_what_is_stored_is_what_is_drawn_from_the_live_teacher() -> None:
    made, batch = one.ready("rskd")
    teacher = AutoModelForCausalLM.from_pretrained(tiny.tiny_cache().teacher)
    ids, weights = batch.teacher_sampled_ids_BMK.clone(), batch.teacher_sampled_weights_BMK.clone()
    for place, row in enumerate(one.ROWS):
        stored = made.cache.teachers[row]
        where = torch.from_numpy(predictors(stored["targets"]))
        logits = teacher(torch.tensor([stored["token_ids"].tolist()])).logits[0, where]
        random = torch.from_numpy(uniforms(stored["token_ids"], len(where)))
        found = np.divmod(draw_classes(logits, random, 7).entries_Nk, TOTAL + 1)
        ids[place, : len(where)] = torch.from_numpy(found[0])
        weights[place, : len(where)] = torch.from_numpy(found[1] / TOTAL)

    valid = batch.teacher_predict_valid_BM
    same = (ids == batch.teacher_sampled_ids_BMK).all(-1)[valid]
    assert float(same.float().mean()) > 0.98  # a draw may fall on the other side of a rounding
    online = replace(batch, teacher_sampled_ids_BMK=ids, teacher_sampled_weights_BMK=weights)
    assert one.means(made, batch) == pytest.approx(one.means(made, online), rel=0.02)


def test_a_drawn_class_that_the_tokenizer_lacks_is_refused() -> None:
    made, batch = one.ready("rskd")
    with pytest.raises(BadData, match=r"loss rskd: class 100000 is drawn in one of the rows 3, 19, 0, 11, .*verify"):
        made.distiller.counts(replace(batch, teacher_sampled_ids_BMK=torch.full((4, 1, 1), 100_000)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rskd_computes_in_float32_and_far_classes_stay_finite(dtype: torch.dtype) -> None:
    logits_NV = torch.tensor([[0.0, -300.0, 300.0]], dtype=dtype, requires_grad=True)
    student = LazyLogits(hidden=logits_NV, weight=torch.eye(3, dtype=dtype))

    total = head_sampled_kl(student, torch.tensor([[0, 1]]), torch.tensor([[0.5, 0.5]]), torch.tensor([0.1]))
    total.backward()

    assert total.dtype == torch.float32
    assert float(total.detach()) == pytest.approx(450 - 0.1, rel=1e-2)
    assert logits_NV.grad.tolist() == [[-0.5, -0.5, 1.0]]

"""ULD against loops over sorted floats, its gradients, its approximation by the k largest, and some steps of it."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import one_tokenizer as one
import slow_ot
import tiny_models as tiny
from slow_losses import generator
from xkd_pipeline.stages import teacher_stage
from xkd_pipeline.workers.contract import Workers
from xkd_schemas.errors import UsageError
from xkd_trainer.data.collate import batch_of
from xkd_trainer.losses.baselines.uld import SortedTeacher, sorted_l1, sorted_teacher
from xkd_trainer.losses.declaration import describe_loss
from xkd_trainer.losses.ops.lazy_logits import LazyLogits, chunked_sum
from xkd_trainer.losses.pairing import find_pairs
from xkd_trainer.losses.registry import loss_named


def lazy(seed: int, positions: int, classes: int) -> LazyLogits:
    g = generator(seed)
    hidden = torch.randn(positions, 3, generator=g, dtype=torch.float64)
    return LazyLogits(hidden=hidden, weight=2 * torch.randn(classes, 3, generator=g, dtype=torch.float64))


def summed(student: LazyLogits, teacher: SortedTeacher, weights: Tensor, temperature: float) -> Tensor:
    return chunked_sum(lambda rows, logits: sorted_l1(logits, teacher(rows), temperature), student, weights)


@pytest.mark.parametrize("classes", [(6, 4), (4, 6), (5, 5)])
def test_gradients_by_states_and_head_are_numerically_right(classes: tuple[int, int]) -> None:
    student, teacher = lazy(3, 4, classes[0]), sorted_teacher(lazy(4, 4, classes[1]), 1.5)
    weights = torch.tensor([1.0, 0.0, 2.0, 0.5], dtype=torch.float64)

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return summed(LazyLogits(hidden=hidden, weight=weight), teacher, weights, 1.5)

    inputs = (student.hidden.clone().requires_grad_(), student.weight.clone().requires_grad_())
    assert torch.autograd.gradcheck(loss, inputs)


@pytest.mark.parametrize("mean", ["tokens", "documents"])
def test_the_term_is_the_loop_over_predictions_of_single_documents(mean: str) -> None:
    made, _ = one.ready("uld", table=one.OTHER, mean=mean, temperature=2.0)
    rows = one.ROWS[:2]  # the loop sorts all classes in Python
    documents = [tuple(logits.tolist() for logits in one.logits_of(made, row)[:2]) for row in rows]

    found = one.terms_of(made.distiller, batch_of(made.cache, rows, made.wanted))["l1"]

    one.assert_term(found, *slow_ot.uld(documents, 2.0, mean))


@pytest.mark.parametrize("short", ["predict_valid_BN", "teacher_predict_valid_BM"])
def test_a_pair_needs_a_prediction_of_both_models(short: str) -> None:
    _, batch = one.ready("uld")
    cut = getattr(batch, short).clone()
    cut[:, 2:] = False

    found = find_pairs(replace(batch, **{short: cut}))

    assert found.sum(-1).tolist() == [2] * len(one.ROWS)


def test_the_k_largest_stay_within_the_bound_of_what_they_leave_out_and_are_called_an_approximation() -> None:
    (made, batch), (exact, full) = (one.ready("uld", table=one.OTHER, teacher=kind) for kind in ("topk", "exact"))

    found = float(one.terms_of(made.distiller, batch)["approximate_l1"].total.detach())
    expected = float(one.terms_of(exact.distiller, full)["l1"].total.detach())

    known = (batch.teacher_topk_logits_BMK - batch.teacher_logsumexp_BM[..., None]).exp().sum(-1)
    tail = float((1.0 - known)[batch.teacher_predict_valid_BM].sum())
    assert 0 < abs(found - expected) <= tail
    assert tail > 0.1
    assert "teacher = topk is an approximation" in describe_loss(loss_named("uld"))["source"]


def test_more_classes_than_the_teacher_has_are_refused_before_anything_is_made() -> None:
    t = tiny.tiny_cache()
    run = t.run(losses={"uld": {"teacher": "topk"}}, teacher__losses=["uld"], teacher__topk=10**6, teacher__name="big")

    with pytest.raises(UsageError, match=r"topk is 1000000, .* has \d+ classes. Next: --topk \d+ at most"):
        teacher_stage(run, Workers(count=0))
    assert not (t.cache / "teachers" / "big").exists()


def test_topk_has_no_other_temperature_than_its_own() -> None:
    with pytest.raises(UsageError, match="teacher = topk is stored for temperature 1 only"):
        one.ready("uld", table=one.OTHER, teacher="topk", temperature=2.0)

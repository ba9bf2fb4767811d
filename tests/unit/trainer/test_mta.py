import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import slow_losses as slow
from slow_documents import ROWS, Alone, alone, ready, terms_of
from slow_documents import assert_term as assert_wired
from xkd_trainer.losses.mta import dsa, hid, span_weights
from xkd_trainer.losses.ops.term import LossTerm
from xkd_trainer.models.measures import cosine_matrix
from xkd_trainer.training.prepare import Ready

SEEDS = st.integers(0, 2**31)
D = 4


def cosines(seed: int, sizes: list[int], width: int = D) -> list[Tensor]:
    return [cosine_matrix(v[None])[0] for v in slow.ragged(seed, sizes, width)]


def assert_term(found: LossTerm, expected: tuple[float, float]) -> None:
    assert float(found.total) == pytest.approx(expected[0], abs=1e-9)
    assert float(found.count) == pytest.approx(expected[1], abs=1e-9)
    assert not found.count.requires_grad


# DSA


@settings(max_examples=40, deadline=None)
@given(seed=SEEDS)
def test_dsa_equals_equation_11_over_all_pairs_of_all_documents(seed: int) -> None:
    sizes = slow.lengths(seed)
    student, teacher, omega = cosines(seed + 1, sizes), cosines(seed + 2, sizes, 9), slow.masses(seed + 3, sizes)

    squares = (slow.padded_square(side, torch.nan) for side in (student, teacher))
    found = dsa(*squares, slow.padded(omega, torch.nan), slow.mask(sizes))

    documents = zip(student, teacher, omega, strict=True)
    assert_term(found, slow.dsa([(s.tolist(), t.tolist(), w.tolist()) for s, t, w in documents]))


def test_dsa_has_the_right_gradient_for_the_student_and_none_for_the_teacher() -> None:
    sizes = [3, 1, 2]
    student, teacher, omega = (
        slow.padded_square(cosines(1, sizes)),
        slow.padded_square(cosines(2, sizes)).requires_grad_(),
        slow.padded(slow.masses(3, sizes)).requires_grad_(),
    )

    assert torch.autograd.gradcheck(
        lambda s: dsa(s, teacher.detach(), omega.detach(), slow.mask(sizes)).total, student.requires_grad_()
    )

    dsa(student, teacher, omega, slow.mask(sizes)).total.backward()
    assert teacher.grad is None
    assert omega.grad is None


def test_an_empty_batch_is_zero_over_zero() -> None:
    none = torch.zeros(0, 3, 3)

    assert_term(dsa(none, none, torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.bool)), (0.0, 0.0))
    assert_term(hid(none, none, torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.bool)), (0.0, 0.0))


# Hid


@settings(max_examples=40, deadline=None)
@given(seed=SEEDS)
def test_hid_equals_equation_13_over_the_sum_of_weights(seed: int) -> None:
    sizes = slow.lengths(seed)
    student, teacher = slow.ragged(seed, sizes, D), slow.ragged(seed + 1, sizes, D)
    weights = slow.masses(seed + 2, sizes)

    found = hid(*(slow.padded(x, torch.nan) for x in (student, teacher, weights)), slow.mask(sizes))

    documents = zip(student, teacher, weights, strict=True)
    assert_term(found, slow.hid([(s.tolist(), t.tolist(), w.tolist()) for s, t, w in documents]))


def test_hid_has_the_right_gradient() -> None:
    student, teacher, _ = slow.ragged(4, [3, 3, 3], D)

    assert torch.autograd.gradcheck(
        lambda s: hid(s, teacher[None], torch.ones(1, 3), torch.ones(1, 3, dtype=torch.bool)).total,
        student[None].requires_grad_(),
    )


def test_hid_is_zero_for_parallel_vectors_and_finite_for_zero_vectors() -> None:
    (vectors,) = slow.ragged(8, [3], D)
    ones = torch.ones(1, 3, dtype=torch.bool)

    assert float(hid(vectors[None] * 7, vectors[None], ones.double(), ones).total) < 1e-14
    value, gradient = slow.with_gradient(
        lambda s: hid(s, vectors[None], ones.double(), ones).total, torch.zeros(1, 3, D, dtype=torch.float64)
    )
    assert value == 3
    assert (gradient == 0).all()


# Weights, layers, settings


@settings(max_examples=20, deadline=None)
@given(seed=SEEDS)
def test_span_weights_are_equation_9_in_each_document(seed: int) -> None:
    sizes = slow.lengths(seed)
    mass = slow.masses(seed, sizes)

    found = span_weights(slow.padded(mass, fill=torch.nan).requires_grad_(), slow.mask(sizes))

    assert not found.requires_grad
    for row, m in enumerate(mass):
        torch.testing.assert_close(found[row, : len(m)], torch.tensor(slow.omega(m.tolist(), 1.0), dtype=m.dtype))
        assert (found[row, len(m) :] == 0).all()


def test_documents_without_mass_weigh_nothing() -> None:
    assert (span_weights(torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)) == 0).all()


# Wired to the cache


def mta_document(made: Ready, d: Alone, teacher_layer: int, unit: str, layer: int, projector: Any) -> Any:
    """(student cosines, teacher cosines, omega) and (projected, teacher vectors, omega) over the valid spans."""
    ranges, mass = d.student[f"{unit}_tokens"].tolist(), d.teacher[f"span_mass@{teacher_layer}:{unit}"].tolist()
    valid = [u for u, (a, b) in enumerate(ranges) if b > a and mass[u] > 0]
    weights = slow.centrality(d.layers[layer])
    vectors = [slow.pool(d.layers[layer], weights, *ranges[u])[0] for u in valid]
    packed, count = d.teacher[f"span_geometry@{teacher_layer}:{unit}"].tolist(), len(ranges)
    place = {pair: n for n, pair in enumerate((i, j) for i in range(count) for j in range(i + 1, count))}
    own = [[slow.cosine(a, b) for b in vectors] for a in vectors]
    theirs = [[1.0 if i == j else packed[place[min(i, j), max(i, j)]] for j in valid] for i in valid]
    omega = [mass[u] / math.fsum(mass[v] for v in valid) for u in valid]
    bits = torch.from_numpy(d.teacher[f"span_vectors@{teacher_layer}:{unit}"].astype("int32")) << 16
    wanted = bits.view(torch.float32).tolist()
    projected = projector(torch.tensor(vectors)).tolist() if vectors else []
    return (own, theirs, omega), (projected, [wanted[u] for u in valid], omega)


@pytest.mark.parametrize(("teacher_layer", "unit", "layer"), [(2, "word", 1), (3, "phrase", 2), (4, "phrase", 2)])
@torch.no_grad()
def test_mta_is_the_loops_over_spans_of_single_documents(teacher_layer: int, unit: str, layer: int) -> None:
    made, batch = ready("mta")
    key = f"{teacher_layer}:{unit}"
    projector = made.distiller.losses["mta"].projectors[key]

    found = terms_of(made.distiller, batch)

    both = [mta_document(made, d, teacher_layer, unit, layer, projector) for d in alone(made)]
    assert_wired(found[f"mta.dsa@{key}"], *slow.dsa([dsa for dsa, _ in both]))
    assert_wired(found[f"mta.hid@{key}"], *slow.hid([hid for _, hid in both]))
    spans = [len(omega) for (_, _, omega), _ in both if omega]
    assert_wired(found[f"mta.spans@{key}"], sum(spans), len(spans))


def test_the_weights_that_pool_the_students_spans_are_constants() -> None:
    """MTA eq. 8 with w detached, as in the authors' code."""
    made, batch = ready("mta")
    hidden_BSd = torch.randn(*batch.student_ids_BS.shape, 16, requires_grad=True)

    weights_BS = made.distiller.losses["mta"]._weigh_tokens(batch, batch.levels[0], hidden_BSd)

    assert not weights_BS.requires_grad
    torch.testing.assert_close(weights_BS.sum(1), torch.ones(len(ROWS)))

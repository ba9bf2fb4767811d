import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

import slow_losses as slow
from xkd_trainer.losses.mta import MtaSettings, dsa, hid, span_weights
from xkd_trainer.losses.ops.term import LossTerm
from xkd_trainer.models.measures import centrality, cosine_matrix, pool_spans

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

    found = dsa(slow.padded_square(student), slow.padded_square(teacher), slow.padded(omega), slow.mask(sizes))

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


def test_dsa_ignores_what_padding_holds_bit_for_bit() -> None:
    sizes = [3, 1, 0, 2]
    student, teacher, omega = cosines(4, sizes), cosines(5, sizes), slow.masses(6, sizes)

    def run(fill: float) -> tuple[Tensor, Tensor]:
        return slow.with_gradient(
            lambda s: dsa(s, slow.padded_square(teacher, fill), slow.padded(omega, fill), slow.mask(sizes)).total,
            slow.padded_square(student, fill),
        )

    value, gradient = run(0.0)
    for fill in (1e9, torch.nan, torch.inf):
        slow.assert_same_bits(value, run(fill)[0])
        slow.assert_same_bits(gradient, run(fill)[1])
    assert (gradient[~(slow.mask(sizes)[:, None] & slow.mask(sizes)[..., None])] == 0).all()


def test_dsa_does_not_depend_on_how_the_batch_is_cut() -> None:
    sizes = [3, 1, 5, 2]
    batch = [
        slow.padded_square(cosines(7, sizes)),
        slow.padded_square(cosines(8, sizes)),
        slow.padded(slow.masses(9, sizes)),
        slow.mask(sizes),
    ]

    whole = dsa(*batch)
    parts = [dsa(*(x[r] for x in batch)) for r in (slice(0, 1), slice(1, 4))]

    torch.testing.assert_close(whole.total, parts[0].total + parts[1].total)
    torch.testing.assert_close(whole.count, parts[0].count + parts[1].count)


@settings(max_examples=15, deadline=None)
@given(seed=SEEDS)
def test_dsa_is_zero_for_a_student_that_is_the_teacher_rotated_and_scaled(seed: int) -> None:
    sizes = [5, 2]
    teacher = slow.padded(slow.ragged(seed, sizes, D))
    rotation = torch.linalg.qr(torch.randn(D, D, generator=slow.generator(seed), dtype=torch.float64)).Q
    omega = slow.padded(slow.masses(seed, sizes))

    found = dsa(cosine_matrix(teacher @ rotation * 3), cosine_matrix(teacher), omega, slow.mask(sizes))

    assert float(found.total) < 1e-24
    assert found.count > 0


@pytest.mark.parametrize("sizes", [[0], [1], [1, 0, 1], [2, 1]])
@pytest.mark.parametrize("vector", [0.0, 1.0])
def test_dsa_of_degenerate_documents_is_finite(sizes: list[int], vector: float) -> None:
    vectors = torch.full((len(sizes), max(sizes), D), vector)
    valid = slow.mask(sizes)

    value, gradient = slow.with_gradient(
        lambda v: dsa(cosine_matrix(v), cosine_matrix(vectors), torch.ones(valid.shape), valid).total, vectors
    )

    assert value == 0
    assert gradient.isfinite().all()


def test_an_empty_batch_is_zero_over_zero() -> None:
    none = torch.zeros(0, 3, 3)

    assert_term(dsa(none, none, torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.bool)), (0.0, 0.0))
    assert_term(hid(none, none, torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.bool)), (0.0, 0.0))


def test_a_document_of_one_span_changes_nothing() -> None:
    sizes = [3, 1]
    student, teacher = slow.padded_square(cosines(10, sizes)), slow.padded_square(cosines(11, sizes))
    omega, valid = slow.padded(slow.masses(12, sizes)), slow.mask(sizes)

    both, first = dsa(student, teacher, omega, valid), dsa(student[:1], teacher[:1], omega[:1], valid[:1])

    slow.assert_same_bits(both.total, first.total)
    slow.assert_same_bits(both.count, first.count)


@settings(max_examples=15, deadline=None)
@given(seed=SEEDS)
def test_dsa_from_hidden_states_to_loss_equals_equations_5_to_11(seed: int) -> None:
    sizes, student_sizes = [4, 3, 6], [5, 2, 4]
    teacher, student = slow.ragged(seed, sizes, 6), slow.ragged(seed + 1, student_sizes, D)
    spans_T = torch.tensor([[[0, 2], [1, 4], [3, 4]], [[0, 1], [1, 3], [0, 0]], [[2, 3], [0, 6], [0, 0]]])
    spans_S = torch.tensor([[[0, 3], [2, 5], [4, 5]], [[0, 1], [1, 2], [0, 0]], [[1, 2], [0, 4], [0, 0]]])
    counts = [3, 2, 2]

    def fast(hidden: list[Tensor], lengths: list[int], spans: Tensor) -> tuple[Tensor, Tensor]:
        padded = slow.padded(hidden, fill=2.0)
        vectors, mass = pool_spans(padded, centrality(padded, slow.mask(lengths)), spans)
        return cosine_matrix(vectors), mass

    valid = slow.mask(counts)
    teacher_cosines, mass = fast(teacher, sizes, spans_T)
    found = dsa(fast(student, student_sizes, spans_S)[0], teacher_cosines, span_weights(mass, valid), valid)

    documents = []
    for b, count in enumerate(counts):
        weights_T, weights_S = slow.centrality(teacher[b].tolist()), slow.centrality(student[b].tolist())
        T = [slow.pool(teacher[b].tolist(), weights_T, *span) for span in spans_T[b, :count].tolist()]
        S = [slow.pool(student[b].tolist(), weights_S, *span) for span in spans_S[b, :count].tolist()]
        geometry = [[[slow.cosine(u[0], v[0]) for v in side] for u in side] for side in (S, T)]
        documents.append((geometry[0], geometry[1], slow.omega([m for _, m in T], 1.0)))
    assert_term(found, slow.dsa(documents))


# Hid


@settings(max_examples=40, deadline=None)
@given(seed=SEEDS)
def test_hid_equals_equation_13_over_the_sum_of_weights(seed: int) -> None:
    sizes = slow.lengths(seed)
    student, teacher = slow.ragged(seed, sizes, D), slow.ragged(seed + 1, sizes, D)
    weights = slow.masses(seed + 2, sizes)

    found = hid(slow.padded(student), slow.padded(teacher), slow.padded(weights), slow.mask(sizes))

    documents = zip(student, teacher, weights, strict=True)
    assert_term(found, slow.hid([(s.tolist(), t.tolist(), w.tolist()) for s, t, w in documents]))


def test_hid_has_the_right_gradient_and_ignores_what_padding_holds() -> None:
    sizes = [3, 0, 2]
    student, teacher, weights = slow.ragged(1, sizes, D), slow.ragged(2, sizes, D), slow.masses(3, sizes)
    valid = slow.mask(sizes)

    def run(fill: float) -> tuple[Tensor, Tensor]:
        return slow.with_gradient(
            lambda s: hid(s, slow.padded(teacher, fill), slow.padded(weights, fill), valid).total,
            slow.padded(student, fill),
        )

    value, gradient = run(0.0)
    for fill in (1e9, torch.nan, torch.inf):
        slow.assert_same_bits(value, run(fill)[0])
        slow.assert_same_bits(gradient, run(fill)[1])
    assert (gradient[~valid] == 0).all()
    full = slow.ragged(4, [3, 3, 3], D)
    assert torch.autograd.gradcheck(
        lambda s: hid(s, full[1][None], torch.ones(1, 3), torch.ones(1, 3, dtype=torch.bool)).total,
        full[0][None].requires_grad_(),
    )


def test_hid_does_not_depend_on_how_the_batch_is_cut() -> None:
    sizes = [3, 1, 5, 2]
    batch = [
        slow.padded(slow.ragged(5, sizes, D)),
        slow.padded(slow.ragged(6, sizes, D)),
        slow.padded(slow.masses(7, sizes)),
        slow.mask(sizes),
    ]

    whole = hid(*batch)
    parts = [hid(*(x[r] for x in batch)) for r in (slice(0, 3), slice(3, 4))]

    torch.testing.assert_close(whole.total, parts[0].total + parts[1].total)
    torch.testing.assert_close(whole.count, parts[0].count + parts[1].count)


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


def test_settings_refuse_unknown_keys_and_values() -> None:
    with pytest.raises(ValidationError):
        MtaSettings(lambda_dssa=1.0)  # type: ignore[call-arg]
    with pytest.raises(ValidationError):
        MtaSettings(hid="tokens")  # type: ignore[arg-type]
    with pytest.raises(ValidationError):
        MtaSettings(lambda_dsa=-1.0)

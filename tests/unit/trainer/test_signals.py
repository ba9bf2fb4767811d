import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import slow_losses as slow
from xkd_schemas.errors import BadData
from xkd_trainer.models import measures as signals
from xkd_trainer.models.measures import (
    _std,
    centrality,
    cosine_matrix,
    normalise_row,
    pack_triangle,
    pool_spans,
    prediction_stats,
    unpack_triangle,
)  # fmt: skip

SEEDS = st.integers(0, 2**31)
D = 5


@settings(max_examples=40, deadline=None)
@given(seed=SEEDS)
def test_centrality_equals_the_loops_on_each_document(seed: int) -> None:
    sizes = slow.lengths(seed)
    documents = slow.ragged(seed, sizes, D)

    found = centrality(slow.padded(documents, fill=3.0), slow.mask(sizes))

    expected = [torch.tensor(slow.centrality(document.tolist()), dtype=torch.float64) for document in documents]
    torch.testing.assert_close(found, slow.padded(expected), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("elements", [1, 7, 40])
def test_centrality_does_not_depend_on_the_chunk(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = [6, 1, 0, 4]
    hidden, valid = slow.padded(slow.ragged(3, sizes, D)), slow.mask(sizes)
    whole = centrality(hidden, valid)

    monkeypatch.setattr(signals, "CHUNK_ELEMENTS", elements)

    torch.testing.assert_close(centrality(hidden, valid), whole)


def test_centrality_works_with_padding_on_the_left() -> None:
    (document,) = slow.ragged(4, [4], D)
    left = torch.cat([torch.full((1, 2, D), 9.0, dtype=torch.float64), document[None]], 1)

    found = centrality(left, torch.tensor([[False, False, True, True, True, True]]))

    torch.testing.assert_close(found[:, 2:], centrality(document[None], torch.ones(1, 4, dtype=torch.bool)))


def test_gradients_of_signals_are_the_derivatives() -> None:
    sizes = [4, 1, 3]
    hidden, valid = slow.padded(slow.ragged(7, sizes, D)).requires_grad_(), slow.mask(sizes)
    spans = torch.tensor([[[0, 2], [1, 4], [0, 0]], [[0, 1], [0, 1], [1, 1]], [[0, 3], [2, 3], [0, 1]]])
    weights = slow.padded(slow.masses(8, sizes)).requires_grad_()

    assert torch.autograd.gradcheck(lambda h: centrality(h, valid), hidden)
    assert torch.autograd.gradcheck(lambda h, w: pool_spans(h, w, spans), (hidden, weights))
    assert torch.autograd.gradcheck(cosine_matrix, slow.ragged(9, [2, 2, 2], 4, D)[0].requires_grad_())


DEGENERATE = {
    "zero": torch.zeros(2, 3, D), "no documents": torch.zeros(0, 3, D), "no tokens": torch.zeros(2, 0, D),
    "constant": torch.ones(2, 3, D), "identical": torch.ones(2, 3, D) * torch.arange(D),
    "large": torch.full((2, 3, D), 1e4) * torch.tensor([1.0, -1, 1, -1, 1]),
}  # fmt: skip


@pytest.mark.parametrize("what", DEGENERATE)
def test_degenerate_states_are_finite_in_value_and_gradient(what: str) -> None:
    hidden = DEGENERATE[what]
    valid = torch.ones(hidden.shape[:2], dtype=torch.bool)
    spans = torch.tensor([[0, 2], [1, 3], [0, 0]]).expand(len(hidden), 3, 2)

    def loss(h: Tensor) -> Tensor:
        vectors, mass = pool_spans(h, centrality(h, valid), spans)
        return cosine_matrix(vectors).sum() + mass.sum() + vectors.sum()

    value, gradient = slow.with_gradient(loss, hidden)

    assert value.isfinite()
    assert gradient.isfinite().all()


def test_a_span_without_mass_is_a_zero_vector_and_a_tiny_mass_is_not() -> None:
    hidden = torch.tensor([[[2.0, 4.0], [6.0, 8.0]]])

    vectors, mass = pool_spans(hidden, torch.tensor([[0.0, 1e-30]]), torch.tensor([[[0, 1], [1, 2]]]))

    assert vectors.tolist() == [[[0.0, 0.0], [6.0, 8.0]]]
    assert mass.tolist()[0][0] == 0


def test_half_precision_is_pooled_in_float32() -> None:
    hidden = torch.randn(1, 300, D, generator=slow.generator(9)).bfloat16()
    weights = torch.full((1, 300), 1 / 300, dtype=torch.bfloat16)

    vectors, mass = pool_spans(hidden, weights, torch.tensor([[[0, 300]]]))

    assert vectors.dtype == mass.dtype == torch.float32
    torch.testing.assert_close(vectors[0, 0], hidden.float().mean(1)[0])
    assert centrality(hidden, torch.ones(1, 300, dtype=torch.bool)).dtype == torch.float32


@settings(max_examples=20, deadline=None)
@given(seed=SEEDS, k=st.integers(0, 6))
def test_cosine_matrix_equals_the_loops_and_its_diagonal_is_one(seed: int, k: int) -> None:
    (vectors,) = slow.ragged(seed, [k], D)
    vectors[k // 2 :][:1] = 0

    found = cosine_matrix(vectors[None])[0]

    rows = vectors.tolist()
    expected = [[1.0 if i == j else slow.cosine(rows[i], rows[j]) for j in range(k)] for i in range(k)]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64).reshape(k, k))


@settings(max_examples=20, deadline=None)
@given(seed=SEEDS, k=st.integers(0, 7))
def test_triangle_packs_row_by_row_and_unpacks_to_the_same_matrix(seed: int, k: int) -> None:
    (vectors,) = slow.ragged(seed, [k], D)
    matrix = cosine_matrix(vectors[None])[0]

    packed = pack_triangle(matrix)

    assert packed.tolist() == [float(matrix[i, j]) for i in range(k) for j in range(i + 1, k)]
    assert torch.equal(unpack_triangle(packed, k), matrix.triu() + matrix.triu(1).T)
    assert unpack_triangle(packed.half(), k).dtype == torch.float16


def test_a_triangle_of_the_wrong_size_is_refused() -> None:
    with pytest.raises(BadData, match=r"\(4,\) cosines do not fit 3 spans, which need 3"):
        unpack_triangle(torch.zeros(4), 3)


@pytest.mark.parametrize("elements", [1, 20, 1 << 24])
def test_prediction_stats_equal_the_loops_whatever_the_chunk(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "CHUNK_ELEMENTS", elements)
    (logits,) = slow.ragged(11, [9], 7)

    entropy, argmax, logsumexp = signals._prediction_stats((logits * 5).float())

    rows = (logits * 5).float().tolist()
    shares = [slow.softmax(row) for row in rows]
    assert entropy.tolist() == pytest.approx([-slow.kl(p, [1.0] * 7) for p in shares], abs=1e-6)
    assert argmax.tolist() == [row.index(max(row)) for row in rows]
    assert logsumexp.tolist() == pytest.approx(
        [max(r) - math.log(max(p)) for r, p in zip(rows, shares, strict=True)], abs=1e-5
    )
    assert (entropy.dtype, argmax.dtype, logsumexp.dtype) == (torch.float32, torch.int64, torch.float32)


def test_a_row_of_attention_is_summed_over_heads_and_normalised_over_the_document() -> None:
    row = torch.rand(3, 2, 5, generator=slow.generator(12))
    valid = slow.mask([5, 3, 0])
    row[1, :, 3:] = torch.nan

    found = normalise_row(row, valid)

    kept = [row[n, :, :size].sum(0) for n, size in enumerate((5, 3, 0))]
    torch.testing.assert_close(found, slow.padded([weights / weights.sum() for weights in kept]))


@pytest.mark.parametrize("mean", [0.0, 1.0, 30.0, 1000.0])
def test_centrality_in_float32_is_that_of_float64_where_the_mean_is_large(mean: float) -> None:
    generator = torch.Generator().manual_seed(3)
    noise_BLD = torch.randn(2, 9, 64, generator=generator)
    hidden_BLD = (noise_BLD + mean * (torch.arange(9) % 2)[None, :, None]).float()
    valid_BL = torch.arange(9) < torch.tensor([[9], [5]])

    found = centrality(hidden_BLD, valid_BL)

    torch.testing.assert_close(found.double(), centrality(hidden_BLD.double(), valid_BL), rtol=5e-3, atol=1e-4)


def test_a_row_of_one_number_has_no_spread_also_beside_others() -> None:
    hidden_LD = torch.cat([torch.full((1, 8), 7.0), torch.randn(3, 8, generator=torch.Generator().manual_seed(1))])
    std_L1 = _std(hidden_LD, hidden_LD.mean(-1))
    assert std_L1[0] == 0
    torch.testing.assert_close(std_L1[:, 0], hidden_LD.std(-1), rtol=1e-5, atol=1e-6)


def test_classes_far_below_the_likeliest_change_nothing_and_equals_give_the_first() -> None:
    logits = torch.tensor([[3.0, 3.0, -90.0, -2000.0, -torch.inf]], requires_grad=True)
    entropy, argmax, logsumexp = prediction_stats(logits)
    assert float(entropy[0]) == pytest.approx(math.log(2), rel=1e-6)
    assert int(argmax[0]) == 0
    assert float(logsumexp[0]) == pytest.approx(3 + math.log(2), rel=1e-6)
    for broken in ([1.0, math.nan, 0.0], [1.0, math.inf, 0.0], [-math.inf] * 3):
        entropy, _, logsumexp = prediction_stats(torch.tensor([broken]))
        assert entropy.isnan().all()
        assert logsumexp.isnan().all()

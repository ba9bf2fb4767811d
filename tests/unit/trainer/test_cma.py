import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import slow_dwa as slow
from xkd_trainer.losses.dual_space import MASKED, align_scores, attend


def batch(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(3, 5, 6, generator=generator, dtype=torch.float64)
    key = torch.randn(3, 4, 6, generator=generator, dtype=torch.float64)
    student = torch.arange(5) < torch.tensor([[5], [2], [1]])
    teacher = torch.arange(4) < torch.tensor([[4], [3], [1]])
    return query, key, student, teacher


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    sizes=st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=4),
)
def test_both_directions_agree_with_loops(seed: int, sizes: list[tuple[int, int]]) -> None:
    student, teacher = (torch.arange(max(side)) < torch.tensor(side)[:, None] for side in zip(*sizes, strict=True))
    generator = torch.Generator().manual_seed(seed)
    query, key = (
        torch.randn(*valid.shape, 6, generator=generator, dtype=torch.float64) for valid in (student, teacher)
    )

    scores = align_scores(query, key, student, teacher)

    for b, (n, m) in enumerate(sizes):
        forth = slow.attention(query[b, :n].tolist(), key[b, :m].tolist())
        back = slow.attention(key[b, :m].tolist(), query[b, :n].tolist())
        torch.testing.assert_close(attend(scores, "teacher")[b, :n, :m], torch.tensor(forth, dtype=torch.float64))
        torch.testing.assert_close(attend(scores, "student")[b, :m, :n], torch.tensor(back, dtype=torch.float64))


def test_padding_gets_exactly_no_attention_and_its_content_changes_no_bit() -> None:
    query, key, student, teacher = batch(0)
    scores = align_scores(query, key, student, teacher)
    query.requires_grad_()
    key.requires_grad_()
    changed_query = torch.where(student[:, :, None], query, 1e6)
    changed_key = torch.where(teacher[:, :, None], key, -1e9)

    changed = align_scores(changed_query, changed_key, student, teacher)
    gradients = []
    for q, k in ((query, key), (changed_query, changed_key)):
        attention = attend(align_scores(q, k, student, teacher), "teacher")
        gradients.append(torch.autograd.grad((attention**2).sum(), (query, key)))

    assert torch.equal(scores, changed)
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert not attend(scores, "teacher")[student][~teacher[:, None, :].expand(3, 5, 4)[student]].any()
    assert not attend(scores, "student")[teacher][~student[:, None, :].expand(3, 4, 5)[teacher]].any()
    assert (scores[~(student[:, :, None] & teacher[:, None, :])] == MASKED).all()


def test_gradcheck_passes_through_scores_and_attention() -> None:
    query, key, student, teacher = batch(1)

    def forth_and_back(q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scores = align_scores(q, k, student, teacher)
        return attend(scores, "teacher"), attend(scores, "student")

    assert torch.autograd.gradcheck(forth_and_back, (query.requires_grad_(), key.requires_grad_()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_worked_in_float32_where_the_mask_fits(dtype: torch.dtype) -> None:
    query, key, student, teacher = batch(0)

    attention = attend(align_scores(query.to(dtype), key.to(dtype), student, teacher), "teacher")

    assert attention.dtype == torch.float32
    assert attention.isfinite().all()

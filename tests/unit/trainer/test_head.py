import pytest
import torch
from torch import Tensor

from xkd_trainer.losses.ops import lazy_logits
from xkd_trainer.losses.ops.divergence import Comparison
from xkd_trainer.losses.ops.lazy_logits import LazyLogits, chunked, chunked_sum
from xkd_trainer.losses.ops.shared_pass import head_divergence


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of positions whose logits are made at once."""
    found: list[int] = []
    make = lazy_logits.Chunk.of

    def watched(self: lazy_logits.Chunk, logits: LazyLogits) -> Tensor:
        found.append(len(logits.hidden))
        return make(self, logits)

    monkeypatch.setattr(lazy_logits.Chunk, "of", watched)
    monkeypatch.setattr(lazy_logits, "CHUNK_BYTES", 64 * 4 * 10)
    return found


def test_nothing_reaches_the_teacher_or_the_weights_and_a_detached_head_stays_as_it_is() -> None:
    hidden, weight, bias, wide, head, weights = (
        torch.ones(shape, requires_grad=True) for shape in ((5, 4), (7, 4), (7,), (5, 3), (7, 3), (5,))
    )
    fixed, teacher = LazyLogits(hidden=hidden, weight=weight.detach()), LazyLogits(hidden=wide, weight=head, bias=bias)

    head_divergence(fixed, teacher, weights, Comparison(kind="forward_kl", temperature=1.0)).backward()

    assert hidden.grad is not None
    assert [x.grad for x in (weight, bias, wide, head, weights)] == [None] * 5
    constant = teacher.detach()
    assert not any(x.requires_grad for x in (constant.hidden, constant.weight, constant.bias) if x is not None)


@pytest.mark.parametrize("learns", [True, False])
def test_the_logits_of_all_positions_are_never_held_at_once(made: list[int], *, learns: bool) -> None:
    student = LazyLogits(hidden=torch.randn(95, 8), weight=torch.randn(64, 8, requires_grad=learns))

    head_divergence(student, student, None, Comparison(kind="forward_kl", temperature=1.0))

    assert max(made) == (10 if learns else 10 * lazy_logits.WIDER)
    assert sum(made) == 2 * 95


def test_a_function_in_chunks_reads_every_position_once_for_a_sum_and_twice_for_values(made: list[int]) -> None:
    student = LazyLogits(hidden=torch.randn(95, 2, 8), weight=torch.randn(64, 8, requires_grad=True))

    chunked_sum(lambda _, logits_CPV: logits_CPV.logsumexp(-1).mean(-1), student).backward()
    once = made.copy()
    made.clear()
    chunked(lambda _, logits_CPV: logits_CPV.logsumexp(-1), student).sum().backward()

    assert max(once) == max(made) == 5
    assert 2 * sum(once) == sum(made) == 2 * 95

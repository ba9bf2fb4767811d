from typing import Any

import pytest
import torch
from torch import Tensor

from xkd_trainer.losses.ops import lazy_logits
from xkd_trainer.losses.ops.divergence import Comparison
from xkd_trainer.losses.ops.lazy_logits import LazyLogits, chunked, chunked_sum
from xkd_trainer.losses.ops.shared_pass import head_cross_entropy, head_divergence


def random_logits(seed: int, num: int = 5, width: int = 4, classes: int = 7, *, grad: bool = False) -> LazyLogits:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_(grad)

    return LazyLogits(hidden=draw(num, width), weight=draw(classes, width), bias=draw(classes))


def leaves(logits: LazyLogits) -> tuple[Tensor, Tensor, Tensor]:
    assert logits.bias is not None
    return logits.hidden, logits.weight, logits.bias


def test_nothing_reaches_the_teacher_or_the_weights_and_a_detached_head_stays_as_it_is() -> None:
    student, teacher = random_logits(0, grad=True), random_logits(1, grad=True)
    weights = torch.ones(5, dtype=torch.float64, requires_grad=True)
    fixed = LazyLogits(hidden=student.hidden, weight=student.weight.detach())

    head_divergence(fixed, teacher, weights, Comparison(kind="forward_kl", temperature=1.0)).backward()

    assert student.hidden.grad is not None
    constants = (student.weight, weights, *leaves(teacher))
    assert [x.grad for x in constants] == [None] * len(constants)
    assert not any(x.requires_grad for x in leaves(student.detach()))


def test_no_positions_and_extreme_logits_are_finite() -> None:
    none = random_logits(0, num=0, grad=True)
    loss = head_divergence(none, random_logits(1, num=0), None, Comparison(kind="js", temperature=1.0))
    loss.backward()
    assert loss.item() == 0.0
    assert head_cross_entropy(none, torch.zeros(0, dtype=torch.int64)).item() == 0.0

    sure = LazyLogits(
        hidden=torch.full((1, 1), 300.0, requires_grad=True), weight=torch.tensor([[1.0], [-1.0], [0.0]])
    )
    other = LazyLogits(hidden=torch.full((1, 1), 300.0), weight=torch.tensor([[-1.0], [1.0], [0.0]]))
    loss = head_divergence(sure, other, None, Comparison(kind="forward_kl", temperature=1.0))
    loss.backward()
    assert loss.item() == pytest.approx(600.0)
    assert sure.hidden.grad is not None
    assert sure.hidden.grad.isfinite().all()


@pytest.mark.parametrize("learns", [True, False])
def test_the_logits_of_all_positions_are_never_held_at_once(monkeypatch: pytest.MonkeyPatch, *, learns: bool) -> None:
    seen: list[int] = []

    def watched(number: int, make: Any) -> Any:
        def made(*arguments: Any) -> Tensor:
            seen.append(arguments[number].hidden.shape[0])
            return make(*arguments)

        return made

    monkeypatch.setattr(lazy_logits.Chunk, "of", watched(1, lazy_logits.Chunk.of))
    monkeypatch.setattr(lazy_logits, "CHUNK_BYTES", 64 * 4 * 10)
    student = LazyLogits(hidden=torch.randn(95, 8), weight=torch.randn(64, 8, requires_grad=learns))

    head_divergence(student, student, None, Comparison(kind="forward_kl", temperature=1.0))

    assert max(seen) == (10 if learns else 10 * lazy_logits.WIDER)
    assert sum(seen) == 2 * 95


def test_a_function_in_chunks_reads_every_position_once_for_a_sum_and_twice_for_values(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[int] = []
    make = lazy_logits.Chunk.of

    def watched(self: lazy_logits.Chunk, logits: LazyLogits) -> Tensor:
        seen.append(len(logits.hidden))
        return make(self, logits)

    monkeypatch.setattr(lazy_logits.Chunk, "of", watched)
    monkeypatch.setattr(lazy_logits, "CHUNK_BYTES", 2 * 64 * 4 * 10)
    student = LazyLogits(hidden=torch.randn(95, 2, 8), weight=torch.randn(64, 8, requires_grad=True))

    chunked_sum(lambda _, logits_CPV: logits_CPV.logsumexp(-1).mean(-1), student).backward()
    once = seen.copy()
    seen.clear()
    chunked(lambda _, logits_CPV: logits_CPV.logsumexp(-1), student).sum().backward()

    assert max(once) == max(seen) == 10
    assert 2 * sum(once) == sum(seen) == 2 * 95

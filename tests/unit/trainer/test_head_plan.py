"""One pass for all that losses want of the student's logits, against loops, plain autograd and passes of their own."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from xkd_trainer.losses.dwa import student_weights
from xkd_trainer.losses.ops import lazy_logits
from xkd_trainer.losses.ops import shared_pass as head_plan
from xkd_trainer.losses.ops.divergence import Comparison, Kind, Knobs, divergence
from xkd_trainer.losses.ops.lazy_logits import LazyLogits, chunked, chunked_sum
from xkd_trainer.losses.ops.shared_pass import HeadPlan, Planned, head_cross_entropy, head_divergence

F64 = torch.float64
CLASSES = 7
HOW = Comparison(kind="forward_kl", temperature=1.7, knobs=Knobs(skew=0.2, adaptive_alpha=0.6))
FACTORS = torch.tensor([0.5, 1.5, 3.0, 0.25], dtype=F64)


def draw(seed: int, *shape: int, grad: bool = False) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64).requires_grad_(grad)


def weigh(entropy_BN: Tensor, peak_BN: Tensor, valid_BN: Tensor) -> Tensor:
    return student_weights(entropy_BN, peak_BN, valid_BN, "gate_before")


class Case:
    """A student, a projected teacher in its space, and a teacher whose head has two more classes."""

    def __init__(self, lengths: Sequence[int], seed: int = 0, how: Comparison = HOW) -> None:
        shape = len(lengths), max(lengths, default=0)
        self.valid = torch.arange(shape[1]) < torch.tensor(lengths, dtype=torch.int64)[:, None]
        self.target = torch.randint(0, CLASSES, shape, generator=torch.Generator().manual_seed(seed))
        weight, bias = draw(seed + 1, CLASSES, 4, grad=True), draw(seed + 2, CLASSES, grad=True)
        self.own = LazyLogits(hidden=draw(seed + 3, *shape, 4, grad=True), weight=weight, bias=bias)
        self.projected = replace(self.own.detach(), hidden=draw(seed + 4, *shape, 4, grad=True))
        self.teacher = LazyLogits(hidden=draw(seed + 5, *shape, 3, grad=True), weight=draw(seed + 6, CLASSES + 2, 3))
        self.how = how
        self.plan = HeadPlan(own=self.own, target_BN=self.target, valid_BN=self.valid)

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return self.own.hidden, self.own.weight, self.own.bias, self.projected.hidden

    def wanted(self) -> list[Planned]:
        return [
            self.plan.cross_entropy(),
            self.plan.cross_entropy(self.projected),
            self.plan.divergence(self.projected, self.how, weigh=weigh),
            self.plan.divergence(self.teacher, self.how, classes=CLASSES - 1),
        ]

    def joint(self) -> tuple[Tensor, list[Tensor]]:
        return self.plan.run(self.wanted(), list(FACTORS))

    def plain(self) -> tuple[Tensor, list[Tensor]]:
        """The same with all logits at once and torch's own gradients."""
        v, how = self.valid, self.how
        own, projected = self.own.dense()[v], self.projected.dense()[v]
        entropy, peak = (torch.zeros(v.shape, dtype=F64) for _ in range(2))
        entropy[v] = -(own.detach().softmax(-1) * own.detach().log_softmax(-1)).sum(-1)
        peak[v] = projected.detach().softmax(-1).amax(-1)
        cross = torch.nn.functional.cross_entropy

        def compared(student: Tensor, teacher: Tensor) -> Tensor:
            return divergence(student, teacher.detach(), how.kind, temperature=how.temperature, knobs=how.knobs)

        few = slice(0, CLASSES - 1)
        sums = [
            cross(own, self.target[v], reduction="sum"),
            cross(projected, self.target[v], reduction="sum"),
            (weigh(entropy, peak, v)[v] * compared(own, projected)).sum(),
            compared(own[:, few], self.teacher.dense()[v][:, few]).sum(),
        ]
        total: Tensor = (FACTORS * torch.stack(sums)).sum()
        return total, sums


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Positions of each chunk of logits that is made from now on."""
    found, make_in = list[int](), LazyLogits.make_in

    def watched(self: LazyLogits, *given: Any) -> Tensor:
        found.append(self.hidden.shape[0])
        return make_in(self, *given)

    monkeypatch.setattr(LazyLogits, "make_in", watched)
    return found


def assert_same(case: Case, first: Callable[[], Tensor], second: Callable[[], Tensor]) -> None:
    a, b = first(), second()
    torch.testing.assert_close(a, b, atol=1e-10, rtol=0)
    gradients = (torch.autograd.grad(3.0 * x, case.leaves) for x in (a, b))
    for got, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("kind", get_args(Kind))
@settings(max_examples=10, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 5), min_size=1, max_size=5), seed=st.integers(0, 1000),
    positions=st.integers(1, 12),
)  # fmt: skip
def test_values_and_gradients_are_those_of_the_plain_form_in_chunks_of_any_size(
    kind: Kind, lengths: list[int], seed: int, positions: int
) -> None:
    case = Case(lengths, seed, replace(HOW, kind=kind))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(head_plan, "PASS_BYTES", CLASSES * 8 * positions)
        assert_same(case, lambda: case.joint()[0], lambda: case.plain()[0])
        torch.testing.assert_close(torch.stack(case.joint()[1]), torch.stack(case.plain()[1]), atol=1e-10, rtol=0)


def test_a_term_alone_is_its_share_of_the_joint_pass() -> None:
    case = Case([3, 1, 4])
    assert_same(
        case,
        lambda: case.joint()[0],
        lambda: (FACTORS * torch.stack([planned.total for planned in case.wanted()])).sum(),
    )
    assert [float(planned.count) for planned in case.wanted()] == [8.0] * 4


def test_a_term_alone_reaches_what_it_may_and_nothing_else() -> None:
    case = Case([3, 1])
    reached = []
    for planned in case.wanted():
        found = torch.autograd.grad(planned.total, (*case.leaves, case.teacher.hidden), allow_unused=True)
        reached.append([g is not None and bool(g.any()) for g in found])

    own, projected = [True, True, True, False, False], [False, False, False, True, False]
    assert reached == [own, projected, own, own]


def test_wishes_for_the_same_sum_add_up() -> None:
    case = Case([3, 2])
    once, twice = [case.plan.cross_entropy()], [case.plan.cross_entropy() for _ in range(2)]
    assert_same(
        case,
        lambda: case.plan.run([*twice, case.plan.cross_entropy(case.projected)], [FACTORS[0]] * 3)[0],
        lambda: case.plan.run([*once, case.plan.cross_entropy(case.projected)], [2 * FACTORS[0], FACTORS[0]])[0],
    )


@pytest.mark.parametrize(("positions", "times"), [(4, 1), (2, 2)])
def test_logits_are_made_once_where_documents_fit_and_twice_where_not(
    made: list[int], monkeypatch: pytest.MonkeyPatch, positions: int, times: int
) -> None:
    monkeypatch.setattr(head_plan, "PASS_BYTES", CLASSES * 8 * positions)
    case = Case([4, 3, 4])

    case.plan.run(case.wanted()[:3], list(FACTORS[:3]))

    assert max(made) == positions
    assert sum(made) == times * 2 * 11
    made.clear()
    assert case.wanted()[1].total.requires_grad
    assert sum(made) == 11, "the student's own logits are not read by the projected teacher's cross-entropy"


def test_a_second_backward_gives_the_same_gradient_and_a_second_derivative_is_refused() -> None:
    case = Case([2, 3])
    total, _ = case.joint()

    first, second = (torch.autograd.grad(2.0 * total, case.leaves, retain_graph=True) for _ in range(2))

    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    (slope,) = torch.autograd.grad(case.joint()[0].square(), case.own.hidden, create_graph=True)
    with pytest.raises(RuntimeError, match=r"not have been used|once_differentiable"):
        torch.autograd.grad(slope.sum(), case.own.hidden)


def test_a_constant_head_and_constant_states_get_no_gradient() -> None:
    case = Case([2, 3])
    fixed = replace(case.own, weight=case.own.weight.detach(), bias=None)
    plan = HeadPlan(own=fixed, target_BN=case.target, valid_BN=case.valid)
    wanted = [plan.cross_entropy(), plan.cross_entropy(case.projected.detach())]

    plan.run(wanted, list(FACTORS[:2]))[0].backward()

    assert case.own.hidden.grad is not None
    assert [x.grad for x in case.leaves[1:]] == [None] * 3


@pytest.mark.parametrize("lengths", [[0, 0], [1], [0, 1]])
def test_next_to_nothing_is_finite(lengths: list[int]) -> None:
    case = Case(lengths)
    total, sums = case.joint()
    found: list[Any] = [total, *sums, *torch.autograd.grad(total, case.leaves)]
    assert all(bool(x.isfinite().all()) for x in found)
    assert (float(total.detach()) == 0.0) == (sum(lengths) == 0)
    assert case.plan.run([], []) == (torch.zeros((), dtype=F64), [])


def test_a_head_in_bfloat16_gives_float32_sums_near_those_of_float32() -> None:
    case = Case([3, 4])

    def brought(logits: LazyLogits, dtype: torch.dtype) -> LazyLogits:
        bias = None if logits.bias is None else logits.bias.detach().to(dtype)
        hidden = logits.hidden.detach().float().requires_grad_()
        return LazyLogits(hidden=hidden, weight=logits.weight.detach().to(dtype).requires_grad_(), bias=bias)

    values = {}
    for dtype in (torch.float32, torch.bfloat16):
        own, projected = brought(case.own, dtype), brought(case.projected, dtype)
        plan = HeadPlan(own=own, target_BN=case.target, valid_BN=case.valid)
        wanted = [plan.cross_entropy(), plan.divergence(projected, HOW, weigh=weigh), plan.cross_entropy(projected)]
        total, sums = plan.run(wanted, list(FACTORS[:3]))
        total.backward()  # type: ignore[no-untyped-call]
        assert (total.dtype, own.weight.grad.dtype, own.hidden.grad.dtype) == (torch.float32, dtype, torch.float32)
        values[dtype] = torch.stack(sums)
    torch.testing.assert_close(values[torch.bfloat16], values[torch.float32], rtol=0.05, atol=0.05)


def logits_of(seed: int, num: int = 5, width: int = 4) -> LazyLogits:
    weight, bias = draw(seed + 1, CLASSES, width, grad=True), draw(seed + 2, CLASSES, grad=True)
    return LazyLogits(hidden=draw(seed, num, width, grad=True), weight=weight, bias=bias)


def test_nothing_reaches_the_teacher_or_the_weights_and_a_detached_head_stays_as_it_is() -> None:
    student, teacher = logits_of(0), logits_of(1)
    weights = torch.ones(5, dtype=F64, requires_grad=True)
    fixed = LazyLogits(hidden=student.hidden, weight=student.weight.detach())

    head_divergence(fixed, teacher, weights, HOW).backward()

    assert student.hidden.grad is not None
    constants = (student.weight, weights, teacher.hidden, teacher.weight, teacher.bias)
    assert [x.grad for x in constants if x is not None] == [None] * 5
    detached = student.detach()
    assert not any(x.requires_grad for x in (detached.hidden, detached.weight, detached.bias) if x is not None)


def test_no_positions_are_finite() -> None:
    none = logits_of(0, num=0)
    loss = head_divergence(none, logits_of(1, num=0), None, replace(HOW, kind="js"))
    loss.backward()
    assert loss.item() == head_cross_entropy(none, torch.zeros(0, dtype=torch.int64)).item() == 0.0


@pytest.mark.parametrize("learns", [True, False])
def test_the_logits_of_all_positions_are_never_held_at_once(
    made: list[int], monkeypatch: pytest.MonkeyPatch, *, learns: bool
) -> None:
    monkeypatch.setattr(lazy_logits, "CHUNK_BYTES", 64 * 4 * 10)
    student = LazyLogits(hidden=torch.randn(95, 8), weight=torch.randn(64, 8, requires_grad=learns))

    head_divergence(student, student, None, Comparison(kind="forward_kl", temperature=1.0))

    assert max(made) == (10 if learns else 10 * lazy_logits.WIDER)
    assert sum(made) == 2 * 95


def test_a_function_in_chunks_reads_every_position_once_for_a_sum_and_twice_for_values(
    made: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lazy_logits, "CHUNK_BYTES", 2 * 64 * 4 * 10)
    student = LazyLogits(hidden=torch.randn(95, 2, 8), weight=torch.randn(64, 8, requires_grad=True))

    chunked_sum(lambda _, logits_CPV: logits_CPV.logsumexp(-1).mean(-1), student).backward()
    once = made.copy()
    chunked(lambda _, logits_CPV: logits_CPV.logsumexp(-1), student).sum().backward()

    assert max(made) == 10
    assert (sum(once), sum(made)) == (95, 3 * 95)

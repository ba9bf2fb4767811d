"""FDD: its equations against loops, and wired to a cache of one tokenizer."""

from typing import Any

import pytest
import torch
from torch import Tensor

import one_tokenizer as one
import slow_chunks as slow
import slow_losses
import tiny_models as tiny
from xkd_schemas.errors import UsageError
from xkd_schemas.tokens import predictors
from xkd_trainer.data.collate import batch_of
from xkd_trainer.losses.baselines.fdd import FddSettings, derivative, needs
from xkd_trainer.losses.declaration import Levels
from xkd_trainer.losses.ops import lazy_logits
from xkd_trainer.losses.ops.lazy_logits import LazyLogits

F64 = torch.float64
TERMS = ("final", "trajectory", "derivative")


def drawn(seed: int, num: int, layers: int, width: int, classes: int, *, bias: bool = True) -> LazyLogits:
    g = torch.Generator().manual_seed(seed)
    return LazyLogits(
        hidden=torch.randn(num, layers, width, generator=g, dtype=F64),
        weight=torch.randn(classes, width, generator=g, dtype=F64),
        bias=torch.randn(classes, generator=g, dtype=F64) if bias else None,
    )


def test_the_derivative_has_the_right_gradient_in_any_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = drawn(1, 4, 3, 3, 6), drawn(2, 4, 3, 5, 6)
    leaves = [t.requires_grad_() for t in (student.hidden, student.weight, student.bias) if t is not None]

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return derivative(LazyLogits(hidden=hidden, weight=weight, bias=bias), teacher)

    whole = loss(*leaves)
    monkeypatch.setattr(lazy_logits, "CHUNK_BYTES", 1)
    assert torch.autograd.gradcheck(loss, leaves)
    torch.testing.assert_close(loss(*leaves), whole)


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0}, {"layers": [2, 4]}, {"layers": [1, 3]}])
def test_the_terms_are_the_loops_over_single_documents(settings: dict[str, Any]) -> None:
    made, _ = one.ready("fdd", **settings)
    rows = one.ROWS[:2]
    tau, picked = settings.get("temperature", 2.0), settings.get("layers", [1, 2, 3, 4])
    classes = len(tiny.tokenizer_of(tiny.TEACHER_TOKENIZER))
    head, teacher_head = made.distiller.student.get_output_embeddings().weight.detach(), made.cache.head().weight_VD
    totals, count = dict.fromkeys(TERMS, 0.0), 0
    for row in rows:
        teacher, states = made.cache.teachers[row], one.states_of(made, row)
        predict, last = predictors(teacher["targets"]), one.logits_of(made, row)[1]
        inner = {layer: one.numbers(teacher[f"hidden@{layer}"])[predict].double() for layer in (1, 2, 3)}
        theirs = {layer: hidden @ teacher_head.double().T for layer, hidden in inner.items()} | {4: last}
        for n, place in enumerate(predict):
            t, s = (
                {layer: z[:classes].tolist() for layer, z in side.items()}
                for side in (
                    {layer: z[n] for layer, z in theirs.items()},
                    {layer: head.double() @ states[layer][place].double() for layer in (1, 2, 3, 4)},
                )
            )
            kl = {layer: slow_losses.divergence(s[layer], t[layer], "forward_kl", tau, 0.1, 0.5) for layer in t}
            totals["final"] += kl[4]
            totals["trajectory"] += sum(kl[layer] for layer in picked) / len(picked)
            totals["derivative"] += slow.derivative([t[layer] for layer in picked], [s[layer] for layer in picked])
            count += 1

    found = one.terms_of(made.distiller, batch_of(made.cache, rows, made.wanted))

    assert sorted(found) == sorted(TERMS)
    for name, term in found.items():
        one.assert_term(term, totals[name], count, rel=1e-4)


def test_each_term_teaches_the_layers_it_reads_and_the_head() -> None:
    made, batch = one.ready("fdd", layers=[1, 2], student_layers=[1, 3])
    body = made.distiller.student.base_model.layers
    for name, deepest in (("final", 4), ("trajectory", 3), ("derivative", 3)):
        made.distiller.zero_grad(set_to_none=True)
        one.terms_of(made.distiller, batch)[name].total.backward()
        reached = [any(p.grad is not None and p.grad.abs().sum() > 0 for p in block.parameters()) for block in body]
        assert reached == [layer <= deepest for layer in (1, 2, 3, 4)], name
        assert made.distiller.student.get_output_embeddings().weight.grad.abs().sum() > 0
    assert list(made.distiller.losses.parameters()) == []


@pytest.mark.parametrize(
    ("settings", "terms"),
    [
        ({"layers": [4]}, ["final", "trajectory"]),
        ({"final": 0.0}, ["derivative", "trajectory"]),
        ({"trajectory": 0.0, "derivative": 0.0}, ["final"]),
    ],
)
def test_a_part_without_weight_or_without_a_second_layer_is_no_term(settings: dict[str, Any], terms: Any) -> None:
    made, batch = one.ready("fdd", **settings)

    assert sorted(one.terms_of(made.distiller, batch)) == sorted(made.distiller.loss("fdd").weights(0)) == terms
    assert sorted(made.distiller.counts(batch)) == [f"fdd.{name}" for name in terms]


def test_needs_are_the_last_states_and_those_of_the_picked_layers_below() -> None:
    levels = Levels([(15, "word"), (30, "phrase")], num_layers=30, states=[15, 22, 30])

    assert [s.column for s in needs(FddSettings(), levels)] == ["hidden_last", "hidden@15", "hidden@22"]
    assert [s.column for s in needs(FddSettings(layers=(30, 7)), levels)] == ["hidden_last", "hidden@7"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": [5]}, r"fdd.layers: layer 5 does not exist, the teacher has layers 1 to 4|needs hidden@5"),
        ({"layers": [2, 4], "student_layers": [1]}, r"fdd.student_layers has 1 layers for the teacher's 2, 4"),
        ({"layers": [2], "student_layers": [5]}, r"layer 5 does not exist, the student has layers 1 to 4"),
        ({"depth": 2}, r"fdd would read a layer twice .*Next: --set losses.fdd.layers"),
        ({"layers": [0]}, r"fdd.layers"),
        ({"final": 0.0, "trajectory": 0.0, "layers": [3]}, r"loss fdd has no term left"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_trained(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        one.ready("fdd", **settings)

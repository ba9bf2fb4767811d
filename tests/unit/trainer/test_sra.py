"""SRA: its equations against loops, and all its options on a cache."""

import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError

import one_tokenizer as one
import slow_losses as slow
import tiny_models as tiny
from xkd_schemas.errors import UsageError
from xkd_schemas.tokens import CONTENT
from xkd_trainer.losses.declaration import Levels
from xkd_trainer.losses.ops.vocabulary import shared_vocabulary
from xkd_trainer.losses.sra import SraSettings, layer_shares, needs, span_omega
from xkd_trainer.training.prepare import Ready

OPTIONS: tuple[tuple[str, dict[str, Any]], ...] = (
    (one.SAME, {"layers": [2, 3], "beta": [1, 2, 5], "spans": "phrase"}),
    (one.OTHER, {"layers": [1, 4], "student_layers": [3], "weights": "centrality", "spans": "phrase"}),
    (one.OTHER, {}),
    (one.OTHER, {"weights": "centrality", "tau": 4.0, "kd": "mean", "shared_vocab": "exact"}),
    (one.OTHER, {"layers": [3], "weights": "uniform", "weighted_pooling": False, "weighted_loss": False,
                 "spans": "word"}),
    (one.OTHER, {"weighted_pooling": False, "p": 2.0}),
    (one.SAME, {"weighted_loss": False}),
    (one.OTHER, {"layers": [3], "end_token": "include"}),
)  # fmt: skip
BESIDE = {2: {2: 2, 3: 3, 4: 4}, 1: {1: 3, 4: 4}, 3: {3: 3, 4: 4}, 4: {4: 4}}


def test_omega_of_no_mass_is_zero_and_a_high_power_does_not_underflow() -> None:
    ones = torch.ones(1, 2, dtype=torch.bool)

    assert span_omega(torch.zeros(1, 2), ones, 1.0).tolist() == [[0.0, 0.0]]
    assert span_omega(torch.tensor([[1e-20, 1e-20]]), ones, 4.0).tolist() == [[0.5, 0.5]]
    assert span_omega(torch.zeros(3, 0), torch.zeros(3, 0, dtype=torch.bool), 1.0).shape == (3, 0)


def student_weights(made: Ready, row: int, layer: int, how: str, end_token: str) -> list[float]:
    """a_t of the student at one of its layers, from transformers' own attention maps."""
    if how == "centrality":
        return slow.centrality(one.states_of(made, row)[layer].tolist())
    ids = torch.tensor([made.cache.students[row]["token_ids"].tolist()])
    if how == "uniform":
        return [1.0] * ids.shape[1]
    model = made.distiller.student
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    kinds = made.cache.students[row]["token_kinds"].tolist()
    place = len(kinds) - 1 if end_token == "include" else max(t for t, kind in enumerate(kinds) if kind == CONTENT)
    row_L = model(input_ids=ids, output_attentions=True).attentions[layer - 1][0, :, place].sum(0)
    model.set_attn_implementation(before)
    return (row_L / row_L.sum()).tolist()


def spans_of(made: Ready, row: int, unit: str, end_token: str) -> list[tuple[list[int], list[int]]]:
    student, teacher, text = (t[row] for t in (made.cache.students, made.cache.teachers, made.cache.documents))
    if unit == "aligned":
        both = zip(student["student_spans"].tolist(), student["teacher_spans"].tolist(), strict=True)
        text = [True] * len(student["targets"]) if end_token == "include" else student["token_kinds"] == CONTENT
        return [(s, t) for s, t in both if student["targets"][s[0]] and text[s[0]]]
    found = []
    places, kinds = teacher["token_spans"].tolist(), teacher["token_kinds"].tolist()
    for (start, end), own in zip(text[f"{unit}s"].tolist(), student[f"{unit}_tokens"].tolist(), strict=True):
        inside = [t for t, (a, b) in enumerate(places) if kinds[t] == 1 and a < b and a >= start and b <= end]
        if own[1] > own[0] and inside and student["targets"][own[0]]:
            found.append((own, [inside[0], inside[-1] + 1]))
    return found


def document(made: Ready, row: int, layer: int, beside: int, settings: dict[str, Any]) -> Any:
    """Student and teacher span vectors of one document at one layer, and the loss weights."""
    how, teacher = settings.get("weights", "attention"), made.cache.teachers[row]
    end_token = settings.get("end_token", "exclude")
    theirs_T = {
        "attention": lambda: teacher[f"attention{'' if end_token == 'include' else '_text'}@{layer}"].tolist(),
        "centrality": lambda: teacher[f"centrality@{layer}"].tolist(),
        "uniform": lambda: [1.0] * len(teacher["token_ids"]),
    }[how]()
    own_S = student_weights(made, row, beside, how, end_token)
    states, hidden = one.states_of(made, row)[beside].tolist(), one.numbers(teacher[f"hidden@{layer}"]).tolist()
    student, vectors, mass = [], [], []
    for (a, b), (x, y) in spans_of(made, row, settings.get("spans", "aligned"), end_token):
        weighted = settings.get("weighted_pooling", True)
        student.append(slow.pool(states, own_S if weighted else [1.0] * len(states), a, b)[0])
        vectors.append(slow.pool(hidden, theirs_T if weighted else [1.0] * len(hidden), x, y)[0])
        mass.append(math.fsum(theirs_T[x:y]) if settings.get("weighted_loss", True) else 1.0)
    return student, vectors, slow.omega(mass, settings.get("p", 1.0))


@pytest.mark.parametrize(("table", "settings"), OPTIONS)
@torch.no_grad()
def test_the_terms_are_the_loops_over_single_documents(table: str, settings: dict[str, Any]) -> None:
    made, batch = one.ready("sra", table=table, **settings)
    module = made.distiller.losses["sra"]
    layers = BESIDE[min(settings.get("layers", [4]))]

    found = one.terms_of(made.distiller, batch)

    names = {layer: f"cos@{layer}" if len(layers) > 1 else "cos" for layer in layers}
    assert sorted(found) == sorted([*names.values(), "geo", "kd", "spans"])
    for layer, beside in layers.items():
        documents = [document(made, row, layer, beside, settings) for row in one.ROWS]
        documents = [d for d in documents if d[0]]
        projector = module.projector if layer == 4 else module.inner_projectors[str(layer)]
        projected = [(projector(torch.tensor(s)).tolist(), t, w) for s, t, w in documents]
        total, count = slow.hid(projected)[0], len(projected)
        assert float(found[names[layer]].total) == pytest.approx(total, rel=2e-4), layer
        assert float(found[names[layer]].count) == count > 0
    one.assert_term(found["geo"], *slow.geometric(documents), rel=2e-3)
    one.assert_term(found["spans"], sum(len(s) for s, _, _ in documents), len(documents))
    kinds = tiny.TEACHER_TOKENIZER if table == one.SAME else tiny.STUDENT_TOKENIZER, tiny.TEACHER_TOKENIZER
    vocabularies = [tiny.tokenizer_of(kind).get_vocab() for kind in kinds]
    ids = shared_vocabulary(*vocabularies, settings.get("shared_vocab", "mapped"))
    heads = made.distiller.student.get_output_embeddings().weight, made.cache.head().weight_VD
    logits = [
        [(torch.tensor(side) @ head[chosen].T).tolist() for side, head, chosen in zip(d, heads, ids, strict=False)]
        for d in documents
    ]
    tau, total = settings.get("tau", 2.0), 0.0
    for side in logits:
        values = [slow.divergence(s, t, "forward_kl", tau, 0.1, 0.5) for s, t in zip(*side, strict=True)]
        total += math.fsum(values) / (len(values) if settings.get("kd") == "mean" else 1)
    one.assert_term(found["kd"], total, len(logits))


def test_each_layers_cosine_teaches_that_layer_and_its_own_projector() -> None:
    made, batch = one.ready("sra", layers=[2, 3])
    body = made.distiller.student.base_model.layers
    for layer in (2, 3, 4):
        made.distiller.zero_grad(set_to_none=True)
        one.terms_of(made.distiller, batch)[f"cos@{layer}"].total.backward()
        reached = [any(p.grad is not None and p.grad.abs().sum() > 0 for p in block.parameters()) for block in body]
        assert reached == [number <= layer for number in (1, 2, 3, 4)]
        with_slope = {n for n, p in made.distiller.losses.named_parameters() if p.grad is not None}
        assert with_slope == {"sra.projector.weight" if layer == 4 else f"sra.inner_projectors.{layer}.weight"}


def test_beta_shares_the_weight_of_the_cosines() -> None:
    made, _ = one.ready("sra", layers=[2, 3], beta=[1, 2, 5], cos=2.0)

    expected = {"cos@2": 0.25, "cos@3": 0.5, "cos@4": 1.25, "geo": 50.0, "kd": 1.0, "spans": 0.0}
    assert made.distiller.loss("sra").weights(0) == pytest.approx(expected)
    assert one.ready("sra")[0].distiller.loss("sra").weights(0) == {"cos": 1.0, "geo": 50.0, "kd": 1.0, "spans": 0.0}
    assert layer_shares((), 4) == (0.25,) * 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": [2], "beta": [1]}, r"sra.beta has 1 weights, with sum 1, for 2 layers. Next: give one for each"),
        ({"layers": [2], "beta": [0, 0]}, r"sra.beta has 2 weights, with sum 0, for 2 layers"),
        ({"layers": [2, 3], "student_layers": [1]}, r"sra.student_layers has 1 layers, sra.layers has 2 below the"),
        ({"layers": [2], "student_layers": [4]}, r"sra would read a layer twice .*4 beside 2, 4 beside 4"),
        ({"layers": [9]}, r"loss sra needs .*hidden@9.*Next: xkd-cache add .* --signals attention_text@9,hidden@9"),
    ],
)
def test_layers_that_do_not_fit_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        one.ready("sra", **settings)


def test_needs_are_those_of_the_layers_and_the_weights() -> None:
    levels = Levels([(2, "word"), (4, "phrase")], num_layers=4, states=[])

    def columns(**settings: Any) -> set[str]:
        return {s.column for s in needs(SraSettings(**settings), levels)} - {"hidden_last"}

    assert columns() == {"attention_text@4"}
    assert columns(end_token="include") == {"attention_last"}
    assert columns(layers=(4, 2)) == {"attention_text@4", "attention_text@2", "hidden@2"}
    assert columns(layers=(4, 2), end_token="include") == {"attention_last", "attention@2", "hidden@2"}
    assert columns(layers=(2,), weights="centrality") == {"hidden@2", "centrality@2", "centrality@4"}
    assert columns(weights="uniform", layers=(3,)) == {"hidden@3"}
    assert columns(spans="phrase") == {"attention_text@4", "span_mass@4:phrase"}
    with pytest.raises(ValidationError):
        SraSettings(beta=(-1.0,))


def test_the_projector_of_sra_starts_by_xaviers_uniform_rule() -> None:
    projector = one.ready("sra")[0].distiller.losses["sra"].projector
    weight_Dd = projector.weight.detach()

    assert projector.bias is None
    bound = math.sqrt(6 / (16 + 32))  # the widths of both models
    assert 0.95 * bound < float(weight_Dd.abs().max()) <= bound
    assert float(weight_Dd.std()) == pytest.approx(bound / math.sqrt(3), rel=0.1)

    weight_Dd = one.ready("sra", projector="orthogonal")[0].distiller.losses["sra"].projector.weight.detach()
    torch.testing.assert_close(weight_Dd.T @ weight_Dd, torch.eye(16))

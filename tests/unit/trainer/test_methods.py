"""Every loss wired to the cache: its terms against loops over single documents, its counts, gradients and refusals."""

import functools
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import slow_dwa
import slow_losses as slow
import tiny_models as tiny
from poison import poisoned
from xkd_pipeline.stages import align_stage, teacher_stage
from xkd_pipeline.workers.contract import Workers
from xkd_schemas.errors import InputMissing, Mismatch, UsageError
from xkd_trainer.data.batch import Batch, blank
from xkd_trainer.data.collate import batch_of
from xkd_trainer.losses.declaration import StudentPass, describe_loss
from xkd_trainer.losses.ops.term import LossTerm
from xkd_trainer.losses.ops.vocabulary import shared_vocabulary
from xkd_trainer.losses.registry import LOSSES
from xkd_trainer.models.forward import run
from xkd_trainer.models.head import head_of
from xkd_trainer.training.distiller import Distiller
from xkd_trainer.training.prepare import Ready, set_up

ROWS = (3, 19, 0, 11)
ALL = ("ce", "mta", "sra", "dwa")
TERMS = {
    "ce": ["ce"],
    "mta": [f"{t}@{level}" for level in ("2:word", "3:phrase", "4:phrase") for t in ("dsa", "hid", "spans")],
    "sra": ["cos", "geo", "kd", "spans"],
    "dwa": ["projected_ce", "student_space", "teacher_space", "dtw_embeddings", "dtw_states"],
}


@functools.cache
def student_folder(tied: bool) -> str:
    if tied:
        return str(tiny.tiny_cache().student)
    folder = tiny.tiny_cache().root / "untied"
    return str(tiny.saved(tiny.llama("sentencepiece", seed=5, tied=False), "sentencepiece", folder))


def ready(loss: str, *, tied: bool = True, **settings: Any) -> tuple[Ready, Batch]:
    """A loss built on the tiny cache, alone, and a batch for it."""
    run = tiny.tiny_cache().run(
        loss=f"ce=0+{loss}" if loss != "ce" else "ce", losses={loss: settings}, student__model=student_folder(tied)
    )
    made = set_up(run, "")
    return made, batch_of(made.cache, ROWS, made.wanted)


def ones(distiller: Distiller, batch: Batch) -> dict[str, Tensor]:
    """Denominators of 1, so that parts are totals."""
    return {name: torch.ones((), dtype=torch.float64) for name in distiller.counts(batch)}


def terms_of(distiller: Distiller, batch: Batch, step: int = 0) -> dict[str, LossTerm]:
    """All terms as the losses return them, named LOSS.TERM."""
    found: dict[str, LossTerm] = {}

    def spy(name: str, value: Mapping[str, LossTerm]) -> None:
        found.update({f"{name}.{term}": v for term, v in value.items()})

    handles = [
        module.register_forward_hook(lambda _m, _i, out, name=name: spy(name, out))
        for name, module in distiller.losses.items()
    ]
    distiller(batch, ones(distiller, batch), step)
    for handle in handles:
        handle.remove()
    return found


def totals(terms: Mapping[str, LossTerm]) -> dict[str, float]:
    return {name: float(t.total.detach()) for name, t in terms.items()}


@pytest.mark.parametrize("loss", ALL)
def test_counts_from_the_batch_alone_are_the_counts_of_the_terms(loss: str) -> None:
    made, batch = ready(loss)

    counts, terms = made.distiller.counts(batch), terms_of(made.distiller, batch)

    assert sorted(counts) == sorted(terms) == sorted(f"{loss}.{t}" for t in TERMS[loss])
    for name, value in terms.items():
        torch.testing.assert_close(counts[name].double(), value.count.double(), msg=name)
        assert float(value.count) > 0, name
        assert float(value.total.detach()) > 0, name
    assert set(made.distiller.loss(loss).weights(0)) == set(TERMS[loss])


# Terms against loops, one document at a time and without padding


class Alone:
    """One document of the batch: what transformers makes of the student's tokens, and the tables' own rows."""

    def __init__(self, made: Ready, row: int) -> None:
        self.document, self.teacher, self.student = (
            table[row] for table in (made.cache.documents, made.cache.teachers, made.cache.students)
        )
        model = tiny.llama("sentencepiece", seed=2)
        model.set_attn_implementation("eager")
        self.ids = self.student["token_ids"].tolist()
        with torch.no_grad():
            out = model(input_ids=torch.tensor([self.ids]), output_hidden_states=True, output_attentions=True)
        self.logits = out.logits[0]
        self.layers = [states[0].tolist() for states in out.hidden_states]
        text = max(t for t, kind in enumerate(self.student["token_kinds"].tolist()) if kind == 1)
        attention = out.attentions[-1][0, :, text].sum(0)
        self.attention = (attention / attention.sum()).tolist()
        self.head = model.get_output_embeddings().weight.detach()
        self.embeddings = model.get_input_embeddings().weight.detach()
        s, t = self.student["targets"], self.teacher["targets"]
        self.predict = [p for p in range(len(s) - 1) if s[p + 1]]
        self.teacher_predict = [p for p in range(len(t) - 1) if t[p + 1]]
        self.kept = [p for p in range(len(t)) if t[p] or (p + 1 < len(t) and t[p + 1])]

    def hidden(self) -> list[list[float]]:
        """The teacher's last states at its kept rows."""
        bits = torch.from_numpy(self.teacher["hidden_last"].astype("int32")) << 16
        return bits.view(torch.float32).tolist()


def alone(made: Ready) -> list[Alone]:
    return [Alone(made, row) for row in ROWS]


def assert_term(found: LossTerm, total: float, count: float) -> None:
    assert float(found.total.detach()) == pytest.approx(total, rel=2e-4, abs=1e-6)
    assert float(found.count) == pytest.approx(count, rel=1e-5)


def test_cross_entropy_is_that_of_the_models_own_logits() -> None:
    made, batch = ready("ce")

    found = terms_of(made.distiller, batch)["ce.ce"]

    rows = [(d.logits[p].tolist(), d.ids[p + 1]) for d in alone(made) for p in d.predict]
    total, count = slow.cross_entropy([z for z, _ in rows], [y for _, y in rows], [True] * len(rows))
    assert_term(found, total, count)


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
    assert_term(found[f"mta.dsa@{key}"], *slow.dsa([dsa for dsa, _ in both]))
    assert_term(found[f"mta.hid@{key}"], *slow.hid([hid for _, hid in both]))
    spans = [len(omega) for (_, _, omega), _ in both if omega]
    assert_term(found[f"mta.spans@{key}"], sum(spans), len(spans))


def linguistic_spans(d: Alone, unit: str) -> list[tuple[list[int], list[int]]]:
    """Words or phrases with tokens of both models in them, as token ranges of student and teacher."""
    found = []
    intervals, kinds = d.teacher["token_spans"].tolist(), d.teacher["token_kinds"].tolist()
    for (start, end), own in zip(
        d.document[f"{unit}s"].tolist(), d.student[f"{unit}_tokens"].tolist(), strict=True
    ):  # fmt: skip
        inside = [t for t, (a, b) in enumerate(intervals) if kinds[t] == 1 and a < b and a >= start and b <= end]
        if own[1] > own[0] and inside:
            found.append((own, [inside[0], inside[-1] + 1]))
    return found


def sra_document(made: Ready, d: Alone, unit: str = "aligned") -> tuple[Any, Any, list[float]]:
    """Student and teacher vectors of the spans in the response, and the loss weights."""
    hidden, attention = d.hidden(), d.teacher["attention_text@4"].tolist()
    at = {position: place for place, position in enumerate(d.kept)}
    student, teacher, mass = [], [], []
    spans = list(zip(d.student["student_spans"].tolist(), d.student["teacher_spans"].tolist(), strict=True))
    for (a, b), (x, y) in spans if unit == "aligned" else linguistic_spans(d, unit):
        if d.student["targets"][a] and d.student["token_kinds"][a] == 1:
            student.append(slow.pool(d.layers[-1], d.attention, a, b)[0])
            rows = [attention[t] for t in range(x, y)]
            vector, weight = slow.pool([hidden[at[t]] for t in range(x, y)], rows, 0, y - x)
            teacher.append(vector)
            mass.append(weight)
    return student, teacher, slow.omega(mass, 1.0)


@pytest.mark.parametrize("unit", ["aligned", "word", "phrase"])
@pytest.mark.parametrize(("tau", "kd", "shared"), [(2.0, "sum", "mapped"), (4.0, "mean", "exact")])
@torch.no_grad()
def test_sra_is_the_loops_over_spans_of_single_documents(unit: str, tau: float, kd: str, shared: Any) -> None:
    made, batch = ready("sra", spans=unit, tau=tau, kd=kd, shared_vocab=shared)
    projector = made.distiller.losses["sra"].projector

    found = terms_of(made.distiller, batch)

    parts = [(d, *sra_document(made, d, unit)) for d in alone(made)]
    parts = [part for part in parts if part[1]]
    projected = [(projector(torch.tensor(s)).tolist(), t, w) for _, s, t, w in parts]
    assert_term(found["sra.cos"], *slow.weighted_cosine(projected))
    assert_term(found["sra.geo"], *slow.geometric([(s, t, w) for _, s, t, w in parts]))
    vocabularies = [tiny.tokenizer_of(kind).get_vocab() for kind in ("sentencepiece", "byte_level")]
    own, theirs = shared_vocabulary(*vocabularies, shared)
    head = made.cache.head().weight_VD
    logits = [
        ((torch.tensor(s) @ d.head[own].T).tolist(), (torch.tensor(t) @ head[theirs].T).tolist())
        for d, s, t, _ in parts
    ]
    assert_term(found["sra.kd"], *slow.span_logits(logits, tau, mean=kd == "mean"))
    assert_term(found["sra.spans"], sum(len(s) for _, s, _, _ in parts), len(parts))


def dwa_document(made: Ready, d: Alone) -> dict[str, float]:
    """The five totals of one document, eq. 7-25 with N(x) of the cache's constants."""
    m = made.distiller.losses["dwa"]
    s = m.settings
    table, head = made.cache.embeddings().float(), made.cache.head().weight_VD.float()
    t_ids, rows = d.teacher["token_ids"].tolist(), {p: n for n, p in enumerate(d.kept)}
    hidden = torch.tensor(d.hidden())[[rows[p] for p in d.teacher_predict]]
    t_in, t_out = table[[t_ids[p] for p in d.teacher_predict]], table[[t_ids[p + 1] for p in d.teacher_predict]]
    s_in, s_out = d.embeddings[[d.ids[p] for p in d.predict]], d.embeddings[[d.ids[p + 1] for p in d.predict]]
    states = torch.tensor(d.layers[-1])[d.predict]
    query, key = m.query(torch.cat([s_in, s_out], 1)), torch.cat([t_in, t_out], 1) / m.embedding_std
    a = slow_dwa.attention(query.tolist(), key.tolist())
    back = slow_dwa.attention(key.tolist(), query.tolist())
    mixed = torch.tensor(a) @ m.t2s(hidden / m.hidden_std + t_out / m.embedding_std)
    mixed_back = torch.tensor(back) @ m.s2t(states)
    projected, own = (mixed @ d.head.T).tolist(), (states @ d.head.T).tolist()
    theirs, projected_back = (hidden @ head.T).tolist(), (mixed_back @ head.T).tolist()
    gates = [max(slow_dwa.softmax(z)) if s.gate else 1.0 for z in projected]
    entropies = [slow_dwa.entropy(z) if s.entropy_weights else 1.0 for z in own]
    w_s, w_t = slow_dwa.student_weights(entropies, gates, s.student_weight), [1.0] * len(theirs)
    if s.entropy_weights:
        w_t = slow_dwa.teacher_weights(d.teacher["entropy"].tolist(), made.cache.sizes.vocab_size)

    def divergence(x: Tensor, y: Tensor) -> float:
        cross = slow_dwa.cosine_cost(x.tolist(), y.tolist())
        if s.band == "soft":
            follows = a
            if s.band_source == "sdtw":
                follows = [[v / sum(row) for v in row] for row in slow_dwa.soft_dtw(cross, s.gamma)[1]]
            penalty = slow_dwa.band(follows, s.band_width, s.band_beta, s.band_centre_mix, s.band_penalty)
            cross = [[c + p for c, p in zip(cs, ps, strict=True)] for cs, ps in zip(cross, penalty, strict=True)]
        within = [slow_dwa.soft_dtw(slow_dwa.cosine_cost(z.tolist(), z.tolist()), s.gamma)[0] for z in (x, y)]
        return slow_dwa.soft_dtw(cross, s.gamma)[0] - (0.5 * sum(within) if s.dtw_divergence else 0.0)

    def compared(student: Any, teacher: Any, kind: str) -> float:
        return slow.divergence(student, teacher, kind, s.temperature, s.skew, s.adaptive_alpha)

    return {
        "projected_ce": sum(
            slow_dwa.cross_entropy(z, d.ids[p + 1]) for z, p in zip(projected, d.predict, strict=True)
        ),
        "student_space": sum(
            w * compared(q, p, s.student_divergence) for w, p, q in zip(w_s, projected, own, strict=True)
        ),
        "teacher_space": sum(
            w * compared(q, p, s.teacher_divergence) for w, p, q in zip(w_t, theirs, projected_back, strict=True)
        ),
        "dtw_embeddings": divergence(s_out, m.embed_t2s(t_out)),
        "dtw_states": divergence(states, m.t2s(hidden)),
    }  # fmt: skip


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gate": False, "student_divergence": "skewed_reverse_kl", "skew": 0.3, "band": "none"},
        {"student_weight": "gate_after", "student_divergence": "adaptive_kl", "adaptive_alpha": 0.4, "gamma": 0.7},
        {"entropy_weights": False, "teacher_divergence": "js", "temperature": 1.5, "dtw_divergence": False},
        {"entropy_weights": False, "gate": False, "student_divergence": "reverse_kl",
         "teacher_divergence": "reverse_kl", "band_width": 1.0, "band_beta": 0.1, "band_centre_mix": 0.4,
         "band_penalty": 0.6},
        {"band_source": "sdtw", "band_width": 1.0, "band_beta": 0.1, "gamma": 0.5},
    ],
)  # fmt: skip
@torch.no_grad()
def test_dwa_is_the_loops_over_predictions_of_single_documents(settings: dict[str, Any]) -> None:
    made, batch = ready("dwa", **settings)
    rows = ROWS[:2] if settings else ROWS
    batch = batch_of(made.cache, rows, made.wanted)
    module, sizes = made.distiller.losses["dwa"], made.cache.sizes
    assert (module.hidden_std, module.embedding_std) == (sizes.hidden_std, sizes.embedding_std)
    module.hidden_std, module.embedding_std = 3.0, 0.5  # those of the tiny teacher are too near to 1
    module.query.weight.mul_(20.0)  # so that no token attends to all alike

    found = terms_of(made.distiller, batch)

    documents = [Alone(made, row) for row in rows]
    totals = [dwa_document(made, d) for d in documents]
    count = sum(len(d.predict) for d in documents)
    for name in TERMS["dwa"]:
        assert_term(found[f"dwa.{name}"], sum(t[name] for t in totals), count)


# Gradients

REACHES = {
    "ce.ce": {"body", "head", "embeddings"},
    "mta.dsa@2:word": {"body", "embeddings"},
    "mta.hid@2:word": {"body", "embeddings", "mta.projectors.2:word"},
    "mta.dsa@4:phrase": {"body", "embeddings"},
    "mta.hid@4:phrase": {"body", "embeddings", "mta.projectors.4:phrase"},
    "sra.cos": {"body", "embeddings", "sra.projector"},
    "sra.geo": {"body", "embeddings"},
    "sra.kd": {"body", "head", "embeddings"},
    "dwa.projected_ce": {"dwa.t2s", "dwa.query"},
    "dwa.student_space": {"body", "head", "embeddings"},
    "dwa.teacher_space": {"body", "embeddings", "dwa.s2t", "dwa.query"},
    "dwa.dtw_embeddings": {"embeddings", "dwa.embed_t2s"},
    "dwa.dtw_states": {"body", "embeddings", "dwa.t2s"},
}
"""What learns from each term: METHODS 1.5, 2.3 and 3.4."""


def reached(distiller: Distiller) -> set[str]:
    """Groups of parameters with a gradient that is not 0."""
    found = set()
    for name, parameter in distiller.named_parameters():
        if parameter.grad is not None and parameter.grad.abs().sum() > 0:
            group = "head" if "lm_head" in name else "embeddings" if "embed_tokens" in name else "body"
            found.add(name.removeprefix("losses.").rpartition(".")[0] if name.startswith("losses.") else group)
    return found


@pytest.mark.parametrize("name", REACHES)
def test_each_term_teaches_what_the_paper_lets_it_teach_and_nothing_else(name: str) -> None:
    loss, _, term = name.partition(".")
    made, batch = ready(loss, tied=False)
    found: dict[str, LossTerm] = {}
    made.distiller.losses[loss].register_forward_hook(lambda _m, _i, out: found.update(out))
    made.distiller(batch, ones(made.distiller, batch), 0)

    found[term].total.backward()

    assert reached(made.distiller) == REACHES[name]


def test_the_weights_that_pool_the_students_spans_are_constants() -> None:
    """MTA eq. 8 with w detached, as in the authors' code."""
    made, batch = ready("mta")
    hidden_BSd = torch.randn(*batch.student_ids_BS.shape, 16, requires_grad=True)

    weights_BS = made.distiller.losses["mta"]._weigh_tokens(batch, batch.levels[0], hidden_BSd)

    assert not weights_BS.requires_grad
    torch.testing.assert_close(weights_BS.sum(1), torch.ones(len(ROWS)))


d, D = 16, 32
"""Widths of the tiny student and teacher."""
LINEAR = {
    "mta": {f"projectors.{level}": (D, d, True) for level in ("2:word", "3:phrase", "4:phrase")},
    "sra": {"projector": (D, d, False)},
    "dwa": {"t2s": (d, D, True), "s2t": (D, d, True), "query": (2 * D, 2 * d, True), "embed_t2s": (d, D, True)},
    "dskd_cma": {"t2s": (d, D, True), "s2t": (D, d, True), "query": (2 * D, 2 * d, True)},
    "dskd_v2": {"t2s": (d, D, False)},
}
"""Width out, width in, bias: METHODS 1.5, 2.3, 3.5, 4.2 and 4.3."""


@pytest.mark.parametrize("loss", LINEAR)
def test_projectors_are_single_linear_layers_of_the_papers_shapes(loss: str) -> None:
    module = ready(loss)[0].distiller.losses[loss]

    expected = {f"{name}.weight": (out, into) for name, (out, into, _) in LINEAR[loss].items()}
    expected |= {f"{name}.bias": (out,) for name, (out, _, bias) in LINEAR[loss].items() if bias}
    assert {name: tuple(p.shape) for name, p in module.named_parameters()} == expected


def test_the_projector_of_sra_starts_by_xaviers_uniform_rule() -> None:
    weight_Dd = ready("sra")[0].distiller.losses["sra"].projector.weight.detach()

    bound = math.sqrt(6 / (d + D))
    assert 0.95 * bound < float(weight_Dd.abs().max()) <= bound
    assert float(weight_Dd.std()) == pytest.approx(bound / math.sqrt(3), rel=0.1)

    weight_Dd = ready("sra", projector="orthogonal")[0].distiller.losses["sra"].projector.weight.detach()
    torch.testing.assert_close(weight_Dd.T @ weight_Dd, torch.eye(d))


@pytest.mark.parametrize("loss", ALL)
def test_nothing_of_the_teacher_is_a_parameter_or_saved(loss: str) -> None:
    made, _ = ready(loss)

    assert set(made.distiller.losses.state_dict()) == {n for n, _ in made.distiller.losses.named_parameters()}
    assert not any(b.requires_grad for b in made.distiller.losses.buffers())


def gradients(distiller: Distiller, batches: Sequence[Batch], counts: Mapping[str, Tensor], step: int = 0) -> Any:
    """Loss and gradients, summed over micro-batches."""
    distiller.zero_grad(set_to_none=True)
    total = 0.0
    for batch in batches:
        loss, _ = distiller(batch, counts, step)
        loss.backward()
        total += float(loss.detach())
    return total, {
        name: p.grad.clone() if p.grad is not None else torch.zeros_like(p) for name, p in distiller.named_parameters()
    }


def test_losses_together_have_the_gradient_of_each_alone() -> None:
    weights = {"ce": 0.7, "mta": 2.0, "sra": 0.5, "dwa": 1.5}
    made = set_up(tiny.tiny_cache().run(loss="ce=0.7+mta=4+sra+dwa=1.5", student__model=student_folder(True)), "")
    assert made.distiller.weights == weights
    batch = batch_of(made.cache, ROWS, made.wanted)
    counts = made.distiller.counts(batch)
    expected, together = gradients(made.distiller, [batch], counts)

    total, alone = 0.0, {name: torch.zeros_like(g) for name, g in together.items()}
    for name in weights:
        made.distiller.weights = dict.fromkeys(weights, 0.0) | {name: weights[name]}
        value, found = gradients(made.distiller, [batch], counts)
        total += value
        alone = {key: alone[key] + g for key, g in found.items()}

    assert total == pytest.approx(expected, rel=1e-5)
    for key, g in together.items():
        scale = max(1.0, float(g.abs().max()))
        torch.testing.assert_close(alone[key] / scale, g / scale, rtol=1e-4, atol=1e-5, msg=key)


def test_what_the_model_looked_up_are_the_embeddings_of_the_targets() -> None:
    made, batch = ready("dwa")
    table_Vd = made.distiller.student.get_input_embeddings().weight
    states = run(made.distiller.student, batch.student_ids_BS, batch.student_valid_BS)
    looked_up_BSd = table_Vd[batch.student_ids_BS]
    found, expected = (
        StudentPass(batch, states, head_of(made.distiller.student), table_Vd, embedded).target_embeddings_BNd
        for embedded in (looked_up_BSd, None)
    )
    valid_BN = batch.predict_valid_BN
    assert torch.equal(found[valid_BN], expected[valid_BN])


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("loss", ALL)
def test_micro_batches_give_the_gradient_of_the_whole_step(loss: str, size: int) -> None:
    made, whole = ready(loss)
    cut = [batch_of(made.cache, ROWS[i : i + size], made.wanted) for i in range(0, len(ROWS), size)]
    counts = made.distiller.counts(whole)

    expected, one = gradients(made.distiller, [whole], counts)
    found, many = gradients(made.distiller, cut, counts)

    assert found == pytest.approx(expected, rel=1e-5)
    assert sum(float(g.abs().sum()) for g in one.values()) > 0
    for name in one:
        scale = max(1.0, float(one[name].abs().max()))
        torch.testing.assert_close(many[name] / scale, one[name] / scale, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("loss", ALL)
def test_a_blank_batch_adds_exactly_nothing(loss: str) -> None:
    made, batch = ready(loss)

    counts = made.distiller.counts(blank(batch))
    total, slopes = gradients(made.distiller, [blank(batch)], made.distiller.counts(batch))

    assert {name: float(n) for name, n in counts.items()} == dict.fromkeys(counts, 0.0)
    assert total == 0.0
    assert all(float(g.abs().max()) == 0.0 for g in slopes.values())
    assert gradients(made.distiller, [blank(batch)], counts)[0] == 0.0  # nor where the whole step is blank


@pytest.mark.parametrize("loss", ALL)
def test_what_stands_at_padding_changes_no_bit_of_loss_or_gradient(loss: str) -> None:
    made, batch = ready(loss)
    assert not batch.student_valid_BS.all()
    assert not batch.teacher_predict_valid_BM.all()
    counts = made.distiller.counts(batch)

    clean, slopes = gradients(made.distiller, [batch], counts)
    dirty, others = gradients(made.distiller, [poisoned(batch)], counts)

    assert dirty == clean
    assert {name: float(n) for name, n in made.distiller.counts(poisoned(batch)).items()} == {
        name: float(n) for name, n in counts.items()
    }
    for name, slope in slopes.items():
        assert torch.equal(slope, others[name]), name


@pytest.mark.parametrize("loss", ALL)
def test_the_prompt_of_one_document_changes_no_term_of_another(loss: str) -> None:
    made, batch = ready(loss)
    changed = batch.student_ids_BS.clone()
    changed[1, 1:3] = torch.tensor([300, 301])
    only_first = {
        name: torch.cat([getattr(batch, name)[:1], torch.zeros_like(getattr(batch, name)[1:])])
        for name in ("predict_valid_BN", "span_valid_BK", "teacher_predict_valid_BM")
    }
    levels = tuple(
        replace(lv, valid_BU=torch.cat([lv.valid_BU[:1], torch.zeros_like(lv.valid_BU[1:])])) for lv in batch.levels
    )
    first = replace(batch, levels=levels, **only_first)

    before = terms_of(made.distiller, first)
    after = terms_of(made.distiller, replace(first, student_ids_BS=changed))

    assert totals(before) == totals(after)
    assert next(iter(totals(before).values())) > 0


# Settings


def total_of(loss: str, step: int = 0, **settings: Any) -> dict[str, float]:
    made, batch = ready(loss, **settings)
    factors = made.distiller.loss(loss).weights(step)
    found = totals(terms_of(made.distiller, batch, step))
    return {term: found[f"{loss}.{term}"] * factor for term, factor in factors.items()}


@pytest.mark.parametrize(
    ("loss", "settings"),
    [
        ("mta", {"student_pooling": "uniform"}),
        ("mta", {"word_spans": "in_phrases"}),
        ("mta", {"spans_over": "response"}),
        ("mta", {"span_weights": "uniform"}),
        ("mta", {"hid_layers": "sum"}),
        ("mta", {"lambda_dsa": 1.0}),
        ("mta", {"student_layers": [1, 1, 2]}),
        ("sra", {"weights": "uniform"}),
        ("sra", {"kd": "mean"}),
        ("sra", {"weighted_pooling": False}),
        ("sra", {"weighted_loss": False}),
        ("sra", {"shared_vocab": "exact"}),
        ("sra", {"tau": 4.0}),
        ("sra", {"p": 2.0}),
        ("sra", {"geo": 10.0}),
        ("sra", {"spans": "word"}),
        ("sra", {"spans": "phrase"}),
        ("dwa", {"entropy_weights": False}),
        ("dwa", {"gate": False}),
        ("dwa", {"student_weight": "gate_after"}),
        ("dwa", {"student_divergence": "reverse_kl"}),
        ("dwa", {"teacher_divergence": "js"}),
        ("dwa", {"temperature": 1.0}),
        ("dwa", {"gamma": 1.0}),
        ("dwa", {"dtw_divergence": False}),
        ("dwa", {"band": "none"}),
        ("dwa", {"band": "hard", "band_width": 1.0}),
        ("dwa", {"band_source": "sdtw"}),
        ("dwa", {"band_warmup_steps": 3}),
        ("dwa", {"gate_warmup_steps": 3}),
        ("dwa", {"dtw_warmup_steps": 3}),
        ("dwa", {"kd": 1.0}),
    ],
)
@torch.no_grad()
def test_every_setting_changes_something(loss: str, settings: dict[str, Any]) -> None:
    changed, default = total_of(loss, **settings), total_of(loss)

    assert changed != default
    assert all(math.isfinite(value) for value in changed.values())


@pytest.mark.parametrize("loss", LOSSES)
def test_no_number_of_the_settings_may_be_infinite_or_none_at_all(loss: str) -> None:
    defaults = LOSSES[loss].parse({})
    numbers = [name for name, value in defaults if isinstance(value, float)]
    for name in numbers:
        for value in (math.inf, -math.inf, math.nan):
            with pytest.raises(UsageError, match=name):
                LOSSES[loss].parse({name: value})
    assert numbers or loss in ("ce", "rskd", "uld")


@torch.no_grad()
def test_warm_ups_are_the_ramps_of_the_code() -> None:
    """Step n of w has (n + 1) / w; the code multiplies the gate, so that the student's space starts small."""
    warm, full = {"band_warmup_steps": 4, "gate_warmup_steps": 4, "dtw_warmup_steps": 4}, total_of("dwa")

    assert total_of("dwa", step=3, **warm) == full
    for step, share in ((0, 0.25), (1, 0.5), (7, 1.0)):
        for key, name in (("gate_warmup_steps", "student_space"), ("dtw_warmup_steps", "dtw_states")):
            found = total_of("dwa", step=step, **{key: 4})
            assert found == full | {
                n: pytest.approx(v * share, rel=1e-6) for n, v in full.items() if n[:4] == name[:4]
            }
        banded = total_of("dwa", step=step, band_warmup_steps=4)["dtw_states"]
        assert banded == pytest.approx(total_of("dwa", band_penalty=share)["dtw_states"], rel=1e-6)
    off = total_of("dwa", gate=False)["student_space"]
    assert total_of("dwa", gate=False, gate_warmup_steps=4)["student_space"] == off
    assert total_of("dwa", step=4, gamma_steps=4)["dtw_states"] == pytest.approx(
        total_of("dwa", gamma=0.8)["dtw_states"], rel=1e-6
    )


def test_a_loss_that_is_off_has_no_term_no_projector_and_asks_for_no_signal() -> None:
    made, batch = ready("mta", lambda_hid=0.0)

    assert sorted(terms_of(made.distiller, batch)) == sorted(f"mta.{t}" for t in TERMS["mta"] if "hid" not in t)
    assert list(made.distiller.losses.parameters()) == []
    assert {s.name for s in made.wanted} == {"span_mass", "span_geometry"}
    assert {s.name for s in ready("mta", hid="off")[0].wanted} == {"span_mass", "span_geometry"}
    assert {s.name for s in ready("mta", lambda_dsa=0.0)[0].wanted} == {"span_mass", "span_vectors"}
    assert {s.name for s in ready("sra", weights="uniform")[0].wanted} == {"hidden_last"}
    assert {s.column for s in ready("sra", spans="phrase")[0].wanted} == {
        "attention_text@4", "hidden_last", "span_mass@3:phrase",
    }  # fmt: skip
    assert {s.name for s in ready("dwa", entropy_weights=False)[0].wanted} == {"hidden_last"}


def test_described_needs_are_the_declared_ones() -> None:
    described = {name: describe_loss(declaration) for name, declaration in LOSSES.items()}

    assert described["ce"]["needs"] == []
    assert described["mta"]["needs"] == ["span_geometry@LAYER:UNIT", "span_mass@LAYER:UNIT", "span_vectors@LAYER:UNIT"]
    assert described["sra"]["needs"] == ["attention_text@LAYER", "hidden_last"]
    assert described["dwa"]["needs"] == ["entropy", "hidden_last"]
    assert described["dwa"]["settings"]["gamma"] == 2.0


# Refusals


def refused(**changed: Any) -> UsageError:
    with pytest.raises(UsageError) as caught:
        set_up(tiny.tiny_cache().run(**changed), "")
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"loss": "mtaa"}, "'mtaa' is not a loss. Next: use one of: ce, "),
        ({"loss": "mta=-1"}, "'mta=-1' is not NAME or NAME=NUMBER"),
        ({"loss": "mta=nan"}, "'mta=nan' is not NAME or NAME=NUMBER"),
        ({"loss": "mta=much"}, "'mta=much' is not NAME or NAME=NUMBER"),
        ({"loss": "mta=1+mta=2"}, "'mta=2' is not NAME or NAME=NUMBER"),
        ({"loss": "sra", "losses": {"sra": {"taw": 3}}}, "losses.sra: 'taw' is not a setting. Next: did you mean"),
        ({"loss": "sra", "losses": {"sra": {"kd": "most"}}}, "losses.sra.kd: "),
        ({"loss": "ce", "losses": {"sra": {"taw": 3}}}, "losses.sra: 'taw' is not a setting"),
        ({"loss": "ce", "losses": {"sar": {}}}, "'sar' is not a loss"),
        ({"loss": "mta", "losses": {"mta": {"student_layers": [1]}}}, "mta.student_layers has 1 layers, the cache"),
        ({"student__model": ""}, "no student is named"),
        ({"student__model": "new:llama"}, "a new student needs a tokenizer"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_trained(changed: dict[str, Any], message: str) -> None:
    assert message in str(refused(**changed))


@pytest.mark.parametrize("layer", [0, 3])
def test_a_student_layer_that_does_not_exist_is_refused_at_setup(layer: int) -> None:
    with pytest.raises(UsageError, match=f"layer {layer} does not exist, the student has layers 1 to 2"):
        ready("mta", student_layers=[1, 2, layer])


@functools.cache
def cache_for_sra() -> tiny.Tiny:
    """The documents of the tiny cache with a teacher that was captured for SRA only."""
    small = tiny.Tiny(tiny.tiny_cache().root / "for-sra")
    shutil.copytree(tiny.tiny_cache().cache / "documents", small.cache / "documents")
    run = tiny.tiny_cache().run(cache=str(small.cache), teacher__losses=("sra",))
    teacher_stage(run, Workers(count=0))
    align_stage(run, Workers(count=0))
    return small


@pytest.mark.parametrize(
    ("loss", "missing", "command"),
    [
        (
            "dwa",
            "loss dwa needs entropy, which",
            r"xkd-cache add .*/cache --model PATH_OF_teacher .*--signals ent",
        ),
        ("mta", "loss mta needs span_mass", r"xkd-cache add CACHE --model M --for mta"),
    ],
)
def test_a_signal_that_is_not_cached_is_named_with_the_command_that_adds_it(
    loss: str, missing: str, command: str
) -> None:
    run = tiny.tiny_cache().run(cache=str(cache_for_sra().cache), loss=loss)

    with pytest.raises(UsageError, match=command) as caught:
        set_up(run, "")

    assert missing in str(caught.value)
    assert caught.value.exit_code == 2
    assert set_up(run.model_copy(update={"train": run.train.model_copy(update={"loss": "sra"})}), "").wanted


def test_another_tokenizer_is_a_mismatch_that_names_the_fields(tmp_path: Path) -> None:
    folder = tiny.saved(tiny.llama("unigram"), "unigram", tmp_path / "student")

    for table in ("", "student"):
        with pytest.raises(Mismatch, match=r"vocabulary: cache has [0-9a-f]+.*xkd-cache align") as caught:
            set_up(tiny.tiny_cache().run(student__model=str(folder)), table)
        assert "probe: cache has" in str(caught.value)
        assert caught.value.exit_code == 78


def test_a_tokenizer_with_another_end_token_alone_is_a_mismatch(tmp_path: Path) -> None:
    tokenizer = tiny.fresh("sentencepiece")
    tokenizer.eos_token = "<pad>"
    tiny.llama("sentencepiece").save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)

    with pytest.raises(Mismatch, match=r"student: special_tokens: cache has"):
        set_up(tiny.tiny_cache().run(student__model=str(tmp_path)), "")


def test_a_student_with_fewer_embeddings_than_tokens_is_refused(tmp_path: Path) -> None:
    tiny.saved(tiny.llama("unigram"), "sentencepiece", tmp_path)

    run = tiny.tiny_cache().run(student__model=str(tmp_path))
    with pytest.raises(UsageError, match=r"has \d+ embeddings, its tokenizer \d+ tokens"):
        set_up(run, "")


def test_a_cache_that_is_not_there_is_missing() -> None:
    with pytest.raises(InputMissing, match=r"nowhere"):
        set_up(tiny.tiny_cache().run(cache="nowhere/at/all"), "")


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_new_student_takes_part_in_every_loss(family: str) -> None:
    run = tiny.tiny_cache().run(
        loss="mta+sra+dwa",
        student__model=f"new:{family},layers=3,width=16,heads=2",
        student__tokenizer=str(tiny.tiny_cache().student),
    )
    made = set_up(run, "")
    batch = batch_of(made.cache, ROWS, made.wanted)

    loss, parts = made.distiller(batch, made.distiller.counts(batch), 0)
    loss.backward()

    expected = 0.0
    for name, mean in parts.items():
        owner, _, term = name.partition(".")
        expected += made.distiller.weights[owner] * made.distiller.loss(owner).weights(0)[term] * float(mean)
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-5)
    assert all(p.grad is not None for p in made.distiller.parameters())


def test_projectors_do_not_depend_on_how_the_student_was_made() -> None:
    def projector(**changed: Any) -> Tensor:
        return set_up(tiny.tiny_cache().run(loss="sra", **changed), "").distiller.losses["sra"].projector.weight

    new = {"student__model": "new:llama,layers=1,width=16,heads=2", "student__tokenizer": student_folder(True)}
    assert torch.equal(projector(), projector(**new))
    assert torch.equal(projector(**new), projector(**new))
    assert not torch.equal(projector(), projector(seed=1))


def test_groups_decay_matrices_and_give_projectors_their_own_rate() -> None:
    made, _ = ready("dwa")

    matrices, vectors, projectors = made.distiller.parameter_groups(lr=0.1, weight_decay=0.3)

    assert (matrices["lr"], matrices["weight_decay"]) == (0.1, 0.3)
    assert (vectors["lr"], vectors["weight_decay"]) == (0.1, 0.0)
    assert (projectors["lr"], projectors["weight_decay"]) == (1e-3, 0.01)
    grouped = [p for group in (matrices, vectors, projectors) for p in group["params"]]
    assert {id(p) for p in grouped} == {id(p) for p in made.distiller.parameters()}
    assert len(grouped) == len({id(p) for p in grouped})
    assert all(p.ndim < 2 for p in vectors["params"])

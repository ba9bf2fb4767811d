import math
from typing import Any, Literal

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

import slow_dwa as slow
import slow_losses
from slow_documents import ROWS, Alone, ready, terms_of, total_of
from slow_documents import assert_term as assert_wired
from xkd_trainer.data.collate import batch_of
from xkd_trainer.losses.declaration import StudentPass
from xkd_trainer.losses.dual_space import align_scores, attend
from xkd_trainer.losses.dwa import (
    DwaSettings,
    anneal,
    band,
    sequence_term,
    student_weights,
    teacher_weights,
)
from xkd_trainer.losses.ops.term import LossTerm
from xkd_trainer.models.architecture import head_of
from xkd_trainer.models.forward import run
from xkd_trainer.training.prepare import Ready

Order = Literal["gate_before", "gate_after"]
ORDERS: tuple[Order, Order] = ("gate_before", "gate_after")
F64 = torch.float64
SEEDS = st.integers(0, 2**31)
PAIRS = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=4)
"""Lengths of both sides of each document."""


def draw(seed: int, *shape: int, grad: bool = False) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64).requires_grad_(grad)


def valid_of(*lengths: int) -> Tensor:
    return torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


def rows(x: Tensor, valid: Tensor) -> list[list[Any]]:
    return [a[v].tolist() for a, v in zip(x, valid, strict=True)]


# weights


def test_weights_are_constants_and_padding_is_not_read() -> None:
    valid, entropy, gate = valid_of(3, 1), draw(0, 2, 3, grad=True), draw(1, 2, 3, grad=True)
    entropy_, gate_ = entropy.detach().abs(), gate.detach().abs()

    def all_weights() -> list[Tensor]:
        both = [student_weights(entropy_, gate_, valid, order) for order in ORDERS]
        return [*both, teacher_weights(entropy_, 5, valid)]

    before = all_weights()
    entropy_[~valid], gate_[~valid] = math.nan, 9.0
    after = all_weights()

    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    for weights in (student_weights(entropy, gate, valid, "gate_after"), teacher_weights(entropy, 5, valid)):
        assert not weights.requires_grad


def test_a_document_with_nothing_to_weigh_has_weights_of_zero() -> None:
    valid, zeros, full = valid_of(3, 0), torch.zeros(2, 3), torch.full((2, 3), math.log(5.0) + 1.0)

    assert not student_weights(zeros, torch.ones(2, 3), valid, "gate_before").any()
    assert not student_weights(torch.ones(2, 3), zeros, valid, "gate_before").any()
    assert not student_weights(zeros, torch.ones(2, 3), valid, "gate_after").any()
    assert not teacher_weights(full, 5, valid).any()


# token level


def grads(term: LossTerm, *tensors: Tensor) -> list[bool]:
    """Which tensors a term sends a gradient to that is not zero."""
    found = torch.autograd.grad(term.total, tensors, allow_unused=True)
    return [g is not None and bool(g.any()) for g in found]


# sequence level


@pytest.mark.parametrize("kind", ["soft", "hard", "none"])
@pytest.mark.parametrize("divergence", [True, False])
@hypothesis_settings(max_examples=15, deadline=None)
@given(seed=SEEDS, sizes=PAIRS)
def test_the_sequence_term_agrees_with_loops(
    kind: Literal["soft", "hard", "none"], divergence: bool, seed: int, sizes: list[tuple[int, int]]
) -> None:
    lengths, teacher_lengths = torch.tensor(sizes).unbind(-1)
    valid, teacher_valid = (valid_of(*side.tolist()) for side in (lengths, teacher_lengths))
    x, y = draw(seed, *valid.shape, 4), draw(seed + 1, *teacher_valid.shape, 4)
    attention = attend(align_scores(x, y, valid, teacher_valid), "teacher")
    settings = DwaSettings(band=kind, band_width=1.0, band_beta=0.1)
    wall = band(attention, lengths, teacher_lengths, settings)

    term = sequence_term(x, y, wall, lengths, teacher_lengths, gamma=2.0, divergence=divergence)

    expected = 0.0
    for b, (s, t) in enumerate(sizes):
        if not s * t:
            continue
        own, other = x[b, :s].tolist(), y[b, :t].tolist()
        cost = torch.tensor(slow.cosine_cost(own, other), dtype=F64)
        if kind == "soft":
            cost += torch.tensor(slow.band(attention[b, :s, :t].tolist(), 1.0, 0.1, 0.7, 1.0), dtype=F64)
        if kind == "hard":
            reach = max(1.0, t / s)
            cost += torch.tensor(
                [
                    [math.inf if abs(j - i * t / s) > reach + 1e-9 else 0.0 for j in range(1, t + 1)]
                    for i in range(1, s + 1)
                ]
            )
        expected += slow.soft_dtw(cost.tolist(), 2.0)[0]
        if divergence:
            expected -= sum(slow.soft_dtw(slow.cosine_cost(z, z), 2.0)[0] for z in (own, other)) / 2
    assert term.total.item() == pytest.approx(expected, rel=1e-9, abs=1e-9)
    assert term.count.item() == float(lengths.sum())


def test_the_sequence_term_teaches_student_and_projector_and_not_through_the_band() -> None:
    x, y, lengths = draw(0, 1, 6, 4, grad=True), draw(1, 1, 6, 4, grad=True), torch.tensor([6])
    attention = draw(2, 1, 6, 6, grad=True).softmax(-1)
    wall = band(attention, lengths, lengths, DwaSettings(band_width=0.1, band_beta=0.0))
    assert wall is not None
    leaf = (wall + 0.0).requires_grad_()

    term = sequence_term(x, y, leaf, lengths, lengths, gamma=2.0, divergence=True)

    assert grads(term, x, y, leaf) == [True, True, False]
    assert not wall.requires_grad


def test_padding_of_the_sequences_changes_no_bit_of_value_or_gradient() -> None:
    x, y = draw(0, 2, 6, 4, grad=True), draw(1, 2, 5, 4, grad=True)
    lengths, teacher_lengths = torch.tensor([6, 2]), torch.tensor([3, 5])

    def results() -> list[Tensor]:
        total = sequence_term(x, y, None, lengths, teacher_lengths, gamma=2.0, divergence=True).total
        return [total, *torch.autograd.grad(total, (x, y))]

    before = results()
    with torch.no_grad():
        x[1, 2:], y[0, 3:] = math.nan, -math.inf
    after = results()

    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert not after[1][1, 2:].any()


def test_the_sequence_term_passes_gradcheck() -> None:
    x, y = draw(0, 2, 4, 3, grad=True), draw(1, 2, 5, 3, grad=True)
    lengths, teacher_lengths = torch.tensor([4, 2]), torch.tensor([3, 5])

    def loss(a: Tensor, b: Tensor) -> Tensor:
        return sequence_term(a, b, None, lengths, teacher_lengths, gamma=0.5, divergence=True).total

    assert torch.autograd.gradcheck(loss, (x, y))


# settings


def test_defaults_are_those_of_the_paper_and_the_scripts() -> None:
    s = DwaSettings()

    assert (s.kd, s.dtw, s.temperature, s.gamma, s.gamma_steps) == (0.5, 0.2, 2.0, 2.0, 0)
    assert s.band_source == "cma"
    assert (s.band, s.band_width, s.band_beta, s.band_centre_mix, s.band_penalty) == ("soft", 5.0, 2.0, 0.7, 1.0)
    assert (s.student_space.kind, s.teacher_space.kind, s.student_weight) == (
        "forward_kl",
        "forward_kl",
        "gate_before",
    )
    assert (s.student_space.temperature, s.skew, s.adaptive_alpha) == (2.0, 0.1, 0.5)
    assert (s.gate_warmup_steps, s.dtw_warmup_steps, s.band_warmup_steps) == (0, 0, 0)
    assert (s.dtw_divergence, s.entropy_weights, s.gate) == (True, True, True)


@pytest.mark.parametrize(
    "wrong",
    [{"gama": 1.0}, {"gamma": 0.0}, {"temperature": -1.0}, {"skew": 1.0}, {"band": "wide"}, {"band_width": math.inf},
     {"student_divergence": "kl"}, {"gamma_steps": -1}, {"band_centre_mix": 1.5}, {"dtw": math.nan}],
)  # fmt: skip
def test_settings_refuse_unknown_names_and_numbers_out_of_range(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        DwaSettings.model_validate(wrong)


def test_gamma_goes_linearly_from_start_to_end_and_stays() -> None:
    settings = DwaSettings(gamma_steps=100)

    assert [settings.gamma_at(step) for step in (0, 50, 100, 10**6)] == pytest.approx([2.0, 1.4, 0.8, 0.8])
    assert [DwaSettings().gamma_at(step) for step in (0, 10**6)] == [2.0, 2.0]
    assert anneal(3, 1.0, 5.0, 4) == 4.0


# Wired to the cache


TERMS = ("projected_ce", "student_space", "teacher_space", "dtw_embeddings", "dtw_states")


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
    a = slow.attention(query.tolist(), key.tolist())
    back = slow.attention(key.tolist(), query.tolist())
    mixed = torch.tensor(a) @ m.t2s(hidden / m.hidden_std + t_out / m.embedding_std)
    mixed_back = torch.tensor(back) @ m.s2t(states)
    projected, own = (mixed @ d.head.T).tolist(), (states @ d.head.T).tolist()
    theirs, projected_back = (hidden @ head.T).tolist(), (mixed_back @ head.T).tolist()
    gates = [max(slow.softmax(z)) if s.gate else 1.0 for z in projected]
    entropies = [slow.entropy(z) if s.entropy_weights else 1.0 for z in own]
    w_s, w_t = slow.student_weights(entropies, gates, s.student_weight), [1.0] * len(theirs)
    if s.entropy_weights:
        w_t = slow.teacher_weights(d.teacher["entropy"].tolist(), made.cache.sizes.vocab_size)

    def divergence(x: Tensor, y: Tensor) -> float:
        cross = slow.cosine_cost(x.tolist(), y.tolist())
        if s.band == "soft":
            follows = a
            if s.band_source == "sdtw":
                follows = [[v / sum(row) for v in row] for row in slow.soft_dtw(cross, s.gamma)[1]]
            penalty = slow.band(follows, s.band_width, s.band_beta, s.band_centre_mix, s.band_penalty)
            cross = [[c + p for c, p in zip(cs, ps, strict=True)] for cs, ps in zip(cross, penalty, strict=True)]
        within = [slow.soft_dtw(slow.cosine_cost(z.tolist(), z.tolist()), s.gamma)[0] for z in (x, y)]
        return slow.soft_dtw(cross, s.gamma)[0] - (0.5 * sum(within) if s.dtw_divergence else 0.0)

    def compared(student: Any, teacher: Any, kind: str) -> float:
        return slow_losses.divergence(student, teacher, kind, s.temperature, s.skew, s.adaptive_alpha)

    return {
        "projected_ce": sum(
            slow.cross_entropy(z, d.ids[p + 1]) for z, p in zip(projected, d.predict, strict=True)
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
    rows = ROWS[:2]
    batch = batch_of(made.cache, rows, made.wanted)
    module, sizes = made.distiller.losses["dwa"], made.cache.sizes
    assert (module.hidden_std, module.embedding_std) == (sizes.hidden_std, sizes.embedding_std)
    module.hidden_std, module.embedding_std = 3.0, 0.5  # those of the tiny teacher are too near to 1
    module.query.weight.mul_(20.0)  # so that no token attends to all alike

    found = terms_of(made.distiller, batch)

    documents = [Alone(made, row) for row in rows]
    totals = [dwa_document(made, d) for d in documents]
    count = sum(len(d.predict) for d in documents)
    for name in TERMS:
        assert_wired(found[f"dwa.{name}"], sum(t[name] for t in totals), count)


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


@torch.no_grad()
def test_warm_ups_are_the_ramps_of_the_code() -> None:
    """Step n of w has (n + 1) / w; the code multiplies the gate, so that the student's space starts small."""
    warm, full = {"band_warmup_steps": 4, "gate_warmup_steps": 4, "dtw_warmup_steps": 4}, total_of("dwa")

    assert total_of("dwa", step=3, **warm) == full
    for step, share in ((1, 0.5), (7, 1.0)):
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

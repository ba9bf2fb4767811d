"""DWA-KD and the cross-model attention below it: scores, weights and sequences against loops, and wired to a cache."""

import math
from typing import Any, Literal

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor

import one_tokenizer as one
import slow_dskd
import slow_dwa as slow
import slow_losses
from xkd_trainer.data.collate import batch_of
from xkd_trainer.losses.declaration import StudentPass
from xkd_trainer.losses.dual_space import MASKED, align_scores
from xkd_trainer.losses.dwa import DwaSettings, find_band, sequence_term, student_weights, teacher_weights
from xkd_trainer.losses.softdtw import look_at
from xkd_trainer.models.architecture import head_of
from xkd_trainer.models.forward import run
from xkd_trainer.training.prepare import Ready

F64 = torch.float64
SEEDS = st.integers(0, 2**31)
PAIRS = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=4)
"""Lengths of both sides of each document."""


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def valid_of(*lengths: int) -> Tensor:
    return torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


@hypothesis_settings(max_examples=30, deadline=None)
@given(seed=SEEDS, sizes=PAIRS)
def test_scores_attend_as_in_loops_and_padding_is_masked_and_changes_no_bit(
    seed: int, sizes: list[tuple[int, int]]
) -> None:
    student, teacher = (valid_of(*side) for side in zip(*sizes, strict=True))
    query, key = draw(seed, *student.shape, 6), draw(seed + 1, *teacher.shape, 6)

    scores = align_scores(query, key, student, teacher)

    assert (scores[~(student[:, :, None] & teacher[:, None, :])] == MASKED).all()
    dirty = (torch.where(valid[:, :, None], x, 1e9) for x, valid in ((query, student), (key, teacher)))
    assert torch.equal(scores, align_scores(*dirty, student, teacher))
    for b, (n, m) in enumerate(sizes):
        forth = slow_dskd.attention(query[b, :n].tolist(), key[b, :m].tolist()) if m else []
        assert scores[b].softmax(-1)[:n, :m].tolist() == [pytest.approx(row) for row in forth] or not m
        assert not scores[b].softmax(-1)[:n, m:].any() or not m


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_scores_are_float32_where_the_mask_fits(dtype: torch.dtype) -> None:
    x, valid = draw(0, 2, 4, 6).to(dtype), valid_of(4, 1)
    scores = align_scores(x, x, valid, valid)
    assert (scores.dtype, float(scores.min())) == (torch.float32, MASKED)


def test_a_document_with_nothing_to_weigh_has_weights_of_zero() -> None:
    valid, zeros, full = valid_of(3, 0), torch.zeros(2, 3), torch.full((2, 3), math.log(5.0) + 1.0)

    assert not student_weights(zeros, torch.ones(2, 3), valid, "gate_before").any()
    assert not student_weights(torch.ones(2, 3), zeros, valid, "gate_before").any()
    assert not student_weights(zeros, torch.ones(2, 3), valid, "gate_after").any()
    assert not teacher_weights(full, 5, valid).any()


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
    attention = align_scores(x, y, valid, teacher_valid).softmax(-1)
    settings = DwaSettings(band=kind, band_width=1.0, band_beta=0.1)
    wall = find_band(look_at(attention), (lengths, teacher_lengths), settings)

    term = sequence_term(x, y, (lengths, teacher_lengths), wall, gamma=2.0, divergence=divergence)

    expected = 0.0
    for b, (s, t) in enumerate(sizes):
        if not s * t:
            continue
        own, other = x[b, :s].tolist(), y[b, :t].tolist()
        cost = torch.tensor(slow.cosine_cost(own, other), dtype=F64)
        if kind == "soft":
            cost += torch.tensor(slow.band(attention[b, :s, :t].tolist(), 1.0, 0.1, 0.7, 1.0), dtype=F64)
        if kind == "hard":
            places = torch.arange(1, t + 1) - torch.arange(1, s + 1)[:, None] * t / s
            cost += torch.where(places.abs() > max(1.0, t / s) + 1e-6, math.inf, 0.0)
        expected += slow.soft_dtw(cost.tolist(), 2.0)[0]
        if divergence:
            expected -= sum(slow.soft_dtw(slow.cosine_cost(z, z), 2.0)[0] for z in (own, other)) / 2
    assert term.total.item() == pytest.approx(expected, rel=1e-9, abs=1e-9)
    assert term.count.item() == float(lengths.sum())


def test_defaults_are_those_of_the_paper_and_the_scripts() -> None:
    assert DwaSettings().model_dump() == {
        "kd": 0.5, "dtw": 0.2, "temperature": 2.0, "student_divergence": "forward_kl",
        "teacher_divergence": "forward_kl", "student_weight": "gate_before", "entropy_weights": True, "gate": True,
        "gamma": 2.0, "gamma_end": 0.8, "dtw_divergence": True, "band": "soft", "band_source": "cma",
        "band_width": 5.0, "band_beta": 2.0, "band_centre_mix": 0.7, "band_penalty": 1.0, "skew": 0.1,
        "adaptive_alpha": 0.5, "js_share": 0.5, "ab_alpha": 0.2, "ab_beta": 0.7,
        **dict.fromkeys(("gamma_steps", "gate_warmup_steps", "dtw_warmup_steps", "band_warmup_steps"), 0),
    }  # fmt: skip


def dwa_document(made: Ready, d: one.Alone) -> dict[str, float]:
    """The five totals of one document, eq. 7-25 with N(x) of the cache's constants."""
    m = made.distiller.losses["dwa"]
    s = m.settings
    hidden, t_in, t_out, s_in, s_out, states = map(
        torch.tensor, (d.hidden, d.t_in, d.t_out, d.s_in, d.s_out, d.states)
    )
    query, key = m.query(torch.cat([s_in, s_out], 1)), torch.cat([t_in, t_out], 1) / m.embedding_std
    a = slow_dskd.attention(query.tolist(), key.tolist())
    back = slow_dskd.attention(key.tolist(), query.tolist())
    mixed = torch.tensor(a) @ m.t2s(hidden / m.hidden_std + t_out / m.embedding_std)
    mixed_back = torch.tensor(back) @ m.s2t(states)
    head, wide = torch.tensor(d.head), torch.tensor(d.wide)
    projected, own = (mixed @ head.T).tolist(), (states @ head.T).tolist()
    theirs, projected_back = (hidden @ wide.T).tolist(), (mixed_back @ wide.T).tolist()
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

    def compared(weights: list[float], student: Any, teacher: Any, kind: str) -> float:
        each = zip(weights, student, teacher, strict=True)
        return sum(w * slow_losses.divergence(q, p, kind, s.temperature, s.skew, s.adaptive_alpha) for w, q, p in each)

    return {
        "projected_ce": slow_losses.cross_entropy(projected, d.targets),
        "student_space": compared(w_s, own, projected, s.student_divergence),
        "teacher_space": compared(w_t, projected_back, theirs, s.teacher_divergence),
        "dtw_embeddings": divergence(s_out, m.embed_t2s(t_out)),
        "dtw_states": divergence(states, m.t2s(hidden)),
    }


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
    made, _ = one.ready("dwa", table=one.OTHER, **settings)
    rows = one.ROWS[:2]
    module, sizes = made.distiller.losses["dwa"], made.cache.sizes
    assert (module.hidden_std, module.embedding_std) == (sizes.hidden_std, sizes.embedding_std)
    module.hidden_std, module.embedding_std = 3.0, 0.5  # those of the tiny teacher are too near to 1
    module.query.weight.mul_(20.0)  # so that no token attends to all alike

    found = one.terms_of(made.distiller, batch_of(made.cache, rows, made.wanted))

    documents = [one.Alone(made, row) for row in rows]
    totals, count = [dwa_document(made, d) for d in documents], sum(len(d.targets) for d in documents)
    for name, term in found.items():
        one.assert_term(term, sum(t[name] for t in totals), count)


def test_what_the_model_looked_up_are_the_embeddings_of_the_targets() -> None:
    made, batch = one.ready("dwa", table=one.OTHER)
    table_Vd = made.distiller.student.get_input_embeddings().weight
    states = run(made.distiller.student, batch.student_ids_BS, batch.student_valid_BS)
    looked_up_BSd = table_Vd[batch.student_ids_BS]
    found, expected = (
        StudentPass(batch, states, head_of(made.distiller.student), table_Vd, embedded).target_embeddings_BNd
        for embedded in (looked_up_BSd, None)
    )
    valid_BN = batch.predict_valid_BN
    assert torch.equal(found[valid_BN], expected[valid_BN])


def total_of(step: int = 0, **settings: Any) -> dict[str, float]:
    made, batch = one.ready("dwa", table=one.OTHER, **settings)
    found, factors = one.terms_of(made.distiller, batch, step), made.distiller.loss("dwa").weights(step)
    return {name: float(found[name].total.detach()) * factor for name, factor in factors.items()}


@torch.no_grad()
def test_warm_ups_are_the_ramps_of_the_code() -> None:
    """Step n of w has (n + 1) / w; the code multiplies the gate, so that the student's space starts small."""
    warm, full = {"band_warmup_steps": 4, "gate_warmup_steps": 4, "dtw_warmup_steps": 4}, total_of()

    assert total_of(step=3, **warm) == full
    for step, share in ((1, 0.5), (7, 1.0)):
        for key, name in (("gate_warmup_steps", "student_space"), ("dtw_warmup_steps", "dtw_states")):
            found = total_of(step=step, **{key: 4})
            assert found == full | {
                n: pytest.approx(v * share, rel=1e-6) for n, v in full.items() if n[:4] == name[:4]
            }
        banded = total_of(step=step, band_warmup_steps=4)["dtw_states"]
        assert banded == pytest.approx(total_of(band_penalty=share)["dtw_states"], rel=1e-6)
    off = total_of(gate=False)["student_space"]
    assert total_of(gate=False, gate_warmup_steps=4)["student_space"] == off
    annealed = total_of(step=4, gamma_steps=4)["dtw_states"]
    assert annealed == pytest.approx(total_of(gamma=0.8)["dtw_states"], rel=1e-6)

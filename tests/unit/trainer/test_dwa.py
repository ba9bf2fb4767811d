"""DWA-KD and the cross-model attention below it: its equations against loops, wired to a cache."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import one_tokenizer as one
import slow_dskd
import slow_dwa as slow
import slow_losses
from xkd_trainer.data.collate import batch_of
from xkd_trainer.losses.dual_space import MASKED, align_scores
from xkd_trainer.losses.dwa import DwaSettings, sequence_term, student_weights, teacher_weights
from xkd_trainer.training.prepare import Ready


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_scores_are_float32_where_the_mask_fits(dtype: torch.dtype) -> None:
    x, valid = slow_losses.ragged(0, [2], 4, 6)[0].to(dtype), slow_losses.mask([4, 1])
    scores = align_scores(x, x, valid, valid)
    assert (scores.dtype, float(scores.min())) == (torch.float32, MASKED)


def test_a_document_with_nothing_to_weigh_has_weights_of_zero() -> None:
    valid, zeros, full = slow_losses.mask([3, 0]), torch.zeros(2, 3), torch.full((2, 3), math.log(5.0) + 1.0)

    assert not student_weights(zeros, torch.ones(2, 3), valid, "gate_before").any()
    assert not student_weights(torch.ones(2, 3), zeros, valid, "gate_before").any()
    assert not student_weights(zeros, torch.ones(2, 3), valid, "gate_after").any()
    assert not teacher_weights(full, 5, valid).any()


def test_a_document_without_tokens_on_one_side_adds_nothing() -> None:
    (x,), (y,) = slow_losses.ragged(1, [2], 3, 4), slow_losses.ragged(2, [2], 5, 4)
    lengths = torch.tensor([3, 0]), torch.tensor([0, 5])

    assert float(sequence_term(x, y, lengths, None, gamma=2.0, divergence=True).total) == 0.0


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
        if s.band == "hard":
            slope = len(y) / len(x)
            reach = max(s.band_width, slope, 1.0) + 1e-6
            cross = [
                [c if abs(j - i * slope) <= reach else math.inf for j, c in enumerate(cs, 1)]
                for i, cs in enumerate(cross, 1)
            ]
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
        {"band": "hard", "band_width": 1.0},
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


@torch.no_grad()
def test_warm_ups_are_the_ramps_of_the_code() -> None:
    """Step n of w has (n + 1) / w; the code multiplies the gate, so that the student's space starts small."""
    made, batch = one.ready("dwa", table=one.OTHER)
    loss = made.distiller.loss("dwa")

    def total_of(step: int = 0, **settings: Any) -> dict[str, float]:
        loss.settings = DwaSettings(**settings)
        found = one.terms_of(made.distiller, batch, step)
        return {name: float(found[name].total) * factor for name, factor in loss.weights(step).items()}

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

"""The DSKD family: the equations against loops, and the three losses wired to a tiny cache."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from pydantic import ValidationError

import one_tokenizer as one
import slow_dskd as slow
import tiny_models as tiny
from slow_losses import cross_entropy, ragged
from xkd_trainer.data.batch import Batch, gather_rows
from xkd_trainer.data.collate import batch_of
from xkd_trainer.losses.baselines.dskd import DskdCmaSettings, DskdGaSettings, pseudo_inverse
from xkd_trainer.losses.dual_space import DualSpaceSettings, teacher_states
from xkd_trainer.losses.ops.divergence import DIVERGENCES
from xkd_trainer.losses.ops.vocabulary import shared_vocabulary
from xkd_trainer.training.prepare import Ready

F64 = torch.float64
TERMS = ("projected_ce", "student_space", "teacher_space")
ROWS = (21, 19)  # short ones
TABLES = {"dskd": one.SAME, "dskd_cma": one.OTHER, "dskd_cma_ga": one.OTHER, "dskd_v2": one.OTHER}
"""Loss -> a student it can teach."""


def test_defaults_are_those_of_the_scripts_and_every_divergence_can_be_chosen() -> None:
    s = DskdCmaSettings()

    assert (s.temperature, s.student_divergence, s.teacher_divergence) == (2.0, "forward_kl", "forward_kl")
    assert (s.skew, s.adaptive_alpha, s.correct_only) == (0.1, 0.5, True)
    assert (DskdGaSettings().kq_rate, DskdGaSettings().hidden) == (0.01, 768)
    chosen = [DualSpaceSettings(teacher_divergence=kind).teacher_space.kind for kind in DIVERGENCES]
    assert chosen == list(DIVERGENCES)
    with pytest.raises(ValidationError):
        DualSpaceSettings.model_validate({"correct_only": True})


@hypothesis_settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), rows=st.integers(1, 12), width=st.integers(1, 6), rank=st.integers(1, 6))
def test_the_inverse_is_the_one_by_singular_values_whatever_the_rank(
    seed: int, rows: int, width: int, rank: int
) -> None:
    matrix = ragged(seed, [rows], rank)[0] @ ragged(seed + 1, [rank], width)[0]

    torch.testing.assert_close(
        pseudo_inverse(matrix), torch.linalg.pinv(matrix, rtol=1e-6), rtol=1e-5, atol=1e-6 / float(matrix.norm())
    )


def test_the_inverse_of_nothing_is_nothing_and_half_precision_comes_out_in_float32() -> None:
    assert torch.equal(pseudo_inverse(torch.zeros(5, 3)), torch.zeros(3, 5))
    assert pseudo_inverse(torch.eye(3, dtype=torch.bfloat16)).dtype == torch.float32


def half_agreeing(made: Ready, batch: Batch) -> None:
    """Make dskd_v2's projection predict the label of about every other labelled pair."""
    module = made.distiller.losses["dskd_v2"]
    label_BE, labelled_BE = module._find_labels(batch)
    hidden_BED = gather_rows(teacher_states(batch), batch.pairs_BE2[..., 1])[labelled_BE]
    head = made.distiller.student.get_output_embeddings().weight.detach()
    unit = torch.nn.functional.normalize(head, dim=-1)
    signs = torch.tensor([1.0, -1.0]).repeat(len(hidden_BED))[: len(hidden_BED), None]
    wanted = 4.0 * signs * unit[label_BE[labelled_BE]]
    with torch.no_grad():
        module.t2s.weight.copy_((torch.linalg.pinv(hidden_BED) @ wanted).T)


def through(layer: Any, rows: Any) -> list[list[float]]:
    return slow.linear(rows, layer.weight.tolist(), layer.bias.tolist())


def expected_v2(made: Ready, d: one.Alone) -> list[tuple[float, int]]:
    """The three terms of one document (METHODS 4.3), over exact pairs and the teacher's labels of them."""
    s, t = (d.student[name].tolist() for name in ("student_spans", "teacher_spans"))
    pairs = [
        (d.at.index(a - 1), d.t_at.index(x - 1))
        for (a, b), (x, y) in zip(s, t, strict=True)
        if d.student["targets"][a] and b - a == y - x == 1
    ]
    vocabularies = [tiny.tokenizer_of(kind).get_vocab() for kind in (tiny.STUDENT_TOKENIZER, tiny.TEACHER_TOKENIZER)]
    own, theirs = (ids.tolist() for ids in shared_vocabulary(*vocabularies, "mapped"))
    names = dict(zip(theirs, own, strict=True))
    labels = [names.get(int(d.teacher["argmax"][m])) for _, m in pairs]
    inverse = torch.linalg.pinv(torch.tensor([d.wide[v] for v in theirs], dtype=F64))
    s2t = (inverse @ torch.tensor([d.head[v] for v in own], dtype=F64)).tolist()
    states, hidden = [d.states[n] for n, _ in pairs], [d.hidden[m] for _, m in pairs]
    t2s = made.distiller.losses["dskd_v2"].t2s.weight.tolist()
    mine, projected = slow.linear(states, d.head), slow.linear(slow.linear(hidden, t2s), d.head)
    back = slow.linear(slow.linear(states, s2t), d.wide)
    at = [e for e, label in enumerate(labels) if label is not None]
    targets = [label for label in labels if label is not None]
    projected_at = [projected[e] for e in at]
    agreeing = sum(slow.best(row) == target for row, target in zip(projected_at, targets, strict=True))
    return [
        (cross_entropy(projected_at, targets), len(at)),
        (slow.space([mine[e] for e in at], projected_at, targets), agreeing),
        (slow.space(back, slow.linear(hidden, d.wide)), len(pairs)),
    ]


def expected_terms(made: Ready, loss: str, d: one.Alone) -> list[tuple[float, int]]:
    """The three terms of one document, total and count (METHODS 4.1 to 4.3)."""
    if loss == "dskd_v2":
        return expected_v2(made, d)
    m = made.distiller.losses[loss]
    if loss == "dskd":
        to_student, to_teacher, targets = through(m.t2s, d.hidden), through(m.s2t, d.states), None
    else:
        key = [[x / m.embedding_std for x in (*a, *b)] for a, b in zip(d.t_in, d.t_out, strict=True)]
        values = [
            [h / m.hidden_std + e / m.embedding_std for h, e in zip(a, b, strict=True)]
            for a, b in zip(d.hidden, d.t_out, strict=True)
        ]
        query = through(m.query, [[*a, *b] for a, b in zip(d.s_in, d.s_out, strict=True)])
        targets = d.targets
        to_student = slow.mixed(slow.attention(query, key), through(m.t2s, values))
        to_teacher = slow.mixed(slow.attention(key, query), through(m.s2t, d.states))
    projected = slow.linear(to_student, d.head)
    totals = (
        cross_entropy(projected, d.targets),
        slow.space(slow.linear(d.states, d.head), projected, targets),
        slow.space(slow.linear(to_teacher, d.wide), slow.linear(d.hidden, d.wide)),
    )
    return [(total, len(d.targets)) for total in totals]


@pytest.mark.parametrize("loss", TABLES)
def test_terms_are_the_loops_over_single_documents(loss: str) -> None:
    made, _ = one.ready(loss, table=TABLES[loss])
    batch = batch_of(made.cache, ROWS, made.wanted)
    module = made.distiller.losses[loss]
    if loss.startswith("dskd_cma"):
        module.hidden_std, module.embedding_std = 3.0, 0.5  # those of the tiny teacher are too near to 1
        with torch.no_grad():
            module.query.weight.mul_(20.0)  # so that no token attends to all alike
            module.t2s.bias.copy_(5.0 * made.distiller.student.get_output_embeddings().weight[batch.target_BN[0, 0]])
    if loss == "dskd_v2":
        half_agreeing(made, batch)

    found = one.terms_of(made.distiller, batch)

    documents = [expected_terms(made, loss, one.Alone(made, row)) for row in ROWS]
    for name, parts in zip(TERMS, zip(*documents, strict=True), strict=True):
        total, count = map(sum, zip(*parts, strict=True))
        assert total > 1e-3
        one.assert_term(found[name], total, count)


def test_keys_and_queries_are_told_apart_as_in_the_loops_over_single_documents() -> None:
    made, _ = one.ready("dskd_cma_ga", table=one.OTHER, hidden=5)
    batch, m = batch_of(made.cache, ROWS, made.wanted), made.distiller.losses["dskd_cma_ga"]
    layers = [(layer.weight.tolist(), layer.bias.tolist()) for layer in m.discriminator.children()]

    found = one.terms_of(made.distiller, batch)

    documents = [one.Alone(made, row) for row in ROWS]
    keys = [[x / m.embedding_std for x in (*a, *b)] for d in documents for a, b in zip(d.t_in, d.t_out, strict=True)]
    embedded = [[*a, *b] for d in documents for a, b in zip(d.s_in, d.s_out, strict=True)]
    queries = through(m.query, embedded)
    one.assert_term(found["keys"], slow.surprise(slow.discriminated(keys, layers), 1), len(keys))
    one.assert_term(found["queries"], slow.surprise(slow.discriminated(queries, layers), 0), len(queries))


def test_a_step_on_the_adversary_tells_better_apart_with_the_discriminator_and_worse_with_the_queries() -> None:
    made, batch = one.ready("dskd_cma_ga", table=one.OTHER)
    m = made.distiller.losses["dskd_cma_ga"]

    def adversary() -> torch.Tensor:
        terms = one.terms_of(made.distiller, batch)
        return terms["keys"].total + terms["queries"].total

    before = adversary()
    before.backward()
    for part, sign in ((m.discriminator, -1), (m.query, 1)):
        rows = [(p, p.grad) for p in part.parameters()]
        with torch.no_grad():
            for p, slope in rows:
                p -= 1e-5 * slope
            after = float(adversary())
            for p, slope in rows:
                p += 1e-5 * slope
        assert sign * (after - float(before.detach())) > 1e-4


def test_the_projection_starts_at_the_students_own_head_and_exact_shares_fewer_classes() -> None:
    made, _ = one.ready("dskd_v2", table=one.OTHER)
    module, head = made.distiller.losses["dskd_v2"], made.distiller.student.get_output_embeddings().weight.detach()
    teacher_ids = [int((module.labels_V == v).nonzero()) for v in module.student_ids_K]

    expected = torch.linalg.pinv(head[module.student_ids_K].double()) @ module.head.weight_VD[teacher_ids].double()

    torch.testing.assert_close(module.t2s.weight.detach(), expected.float(), rtol=1e-4, atol=1e-5)
    exact = one.ready("dskd_v2", table=one.OTHER, shared_vocab="exact")[0].distiller.losses["dskd_v2"]
    assert len(exact.student_ids_K) < len(module.student_ids_K)


def test_the_way_back_follows_the_students_head_as_it_is_now() -> None:
    made, batch = one.ready("dskd_v2", table=one.OTHER)

    def teacher_space_now() -> float:
        return float(one.terms_of(made.distiller, batch)["teacher_space"].total.detach())

    before = teacher_space_now()
    with torch.no_grad():
        made.distiller.student.get_output_embeddings().weight *= 0.0
    after = teacher_space_now()

    assert teacher_space_now() == after != before


def test_the_students_space_is_a_mean_over_the_pairs_that_agree_and_no_others_count(tmp_path: Path) -> None:
    wide = str(tiny.saved(tiny.llama("sentencepiece", width=128), "sentencepiece", tmp_path))  # its head can follow

    def student_space_of(**settings: Any) -> tuple[float, float]:
        made, batch = one.ready("dskd_v2", table=one.OTHER, model=wide, **settings)
        term = one.terms_of(made.distiller, batch)["student_space"]
        assert float(term.count) == float(made.distiller.counts(batch)["dskd_v2.student_space"])
        return float(term.total.detach()), float(term.count)

    agreeing, every, loose = (student_space_of(**s) for s in ({}, {"agreement": False}, {"t2s_agreement": 0.0}))

    assert every[0] > agreeing[0] > 0
    assert 0 < agreeing[1] < loose[1] <= every[1]


@pytest.mark.parametrize(
    ("spaces", "off"), [("student", {"teacher_space"}), ("teacher", {"projected_ce", "student_space"})]
)
def test_one_space_alone_leaves_the_terms_of_the_other_without_weight(spaces: str, off: set[str]) -> None:
    weights = one.ready("dskd_v2", table=one.OTHER, spaces=spaces)[0].distiller.loss("dskd_v2").weights(0)

    assert {name for name, weight in weights.items() if not weight} == off

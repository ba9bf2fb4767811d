"""DSKDv2: the projections that make two heads agree, and the labels that cross from one vocabulary to the other."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

import tiny_models as tiny
from slow_losses import ragged
from xkd_trainer.data.collate import batch_of
from xkd_trainer.losses.baselines.dskd_v2 import DskdV2Settings, equal_logits, label_table, pseudo_inverse
from xkd_trainer.losses.dual_space import teacher_states
from xkd_trainer.losses.ops.shared_pass import head_divergence
from xkd_trainer.training.prepare import set_up


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), rows=st.integers(1, 12), width=st.integers(1, 6), rank=st.integers(1, 6))
def test_the_inverse_is_the_one_by_singular_values_whatever_the_rank(
    seed: int, rows: int, width: int, rank: int
) -> None:
    left, right = ragged(seed, [rows], rank)[0], ragged(seed + 1, [rank], width)[0]
    matrix = left @ right

    torch.testing.assert_close(
        pseudo_inverse(matrix), torch.linalg.pinv(matrix, rtol=1e-6), rtol=1e-5, atol=1e-6 / float(matrix.norm())
    )


def test_the_inverse_of_nothing_is_nothing_and_half_precision_comes_out_in_float32() -> None:
    assert torch.equal(pseudo_inverse(torch.zeros(5, 3)), torch.zeros(3, 5))
    assert pseudo_inverse(torch.eye(3, dtype=torch.bfloat16)).dtype == torch.float32


def test_mapped_states_give_the_wanted_logits_where_the_head_can_say_them() -> None:
    (student,), (teacher,) = ragged(0, [9], 6), ragged(1, [9], 6)
    teacher = student @ ragged(2, [6], 4)[0]  # a head whose logits the student's head can give
    hidden = ragged(3, [5], 4)[0]

    mapped = hidden @ equal_logits(pseudo_inverse(student), teacher).T

    torch.testing.assert_close(mapped @ student.T, hidden @ teacher.T)


def test_mapped_states_are_the_least_squares_solution_elsewhere() -> None:
    (student,), (teacher,), (hidden,) = ragged(4, [9], 3), ragged(5, [9], 6), ragged(6, [2], 6)

    mapped = hidden @ equal_logits(pseudo_inverse(student), teacher).T

    best = torch.linalg.lstsq(student, (hidden @ teacher.T).T).solution.T
    torch.testing.assert_close(mapped, best)


def test_labels_of_classes_that_are_not_shared_are_minus_one() -> None:
    table = label_table(torch.tensor([0, 5]), torch.tensor([3, 1]), 4)

    assert table.tolist() == [-1, 5, -1, 0]


@pytest.mark.parametrize("wrong", [{"shared_vocab": "same"}, {"agreement": 2}, {"correct_only": True}])
def test_settings_refuse_what_is_not_theirs(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        DskdV2Settings.model_validate(wrong)


# Wired to a cache


def made(student: str = "", **settings: Any) -> Any:
    run = tiny.tiny_cache().run(
        loss="ce=0+dskd_v2", losses={"dskd_v2": settings}, student__model=student or str(tiny.tiny_cache().student)
    )
    ready = set_up(run, "")
    return ready, batch_of(ready.cache, (3, 19, 0, 11), ready.wanted)


def test_the_projection_starts_at_the_students_own_head() -> None:
    ready, _ = made()
    module, head = ready.distiller.losses["dskd_v2"], ready.distiller.student.get_output_embeddings().weight.detach()
    teacher_ids = [int((module.labels_V == v).nonzero()) for v in module.student_ids_K]

    expected = torch.linalg.pinv(head[module.student_ids_K].double()) @ module.head.weight_VD[teacher_ids].double()

    torch.testing.assert_close(module.t2s.weight.detach(), expected.float(), rtol=1e-4, atol=1e-5)
    assert [n for n, _ in module.named_parameters()] == ["t2s.weight"]


def test_the_way_back_follows_the_students_head_as_it_is_now(tmp_path: Path) -> None:
    untied = tiny.saved(tiny.llama("sentencepiece", seed=6, tied=False), "sentencepiece", tmp_path)
    ready, batch = made(str(untied))
    distiller = ready.distiller
    found: dict[str, Any] = {}
    distiller.losses["dskd_v2"].register_forward_hook(lambda _m, _i, out: found.update(out))

    def teacher_space_now() -> float:
        distiller(batch, distiller.counts(batch), 0)
        return float(found["teacher_space"].total.detach())

    before = teacher_space_now()
    with torch.no_grad():
        distiller.student.get_output_embeddings().weight *= 0.0
    after = teacher_space_now()

    assert teacher_space_now() == after != before
    module = distiller.losses["dskd_v2"]
    hidden_BMD = teacher_states(batch)
    uniform = torch.zeros_like(hidden_BMD[0, :1])
    expected = 0.0
    for b, e in batch.pair_valid_BE.nonzero().tolist():
        theirs = module.head(hidden_BMD[b, batch.pairs_BE2[b, e, 1]][None])
        expected += float(head_divergence(module.head(uniform), theirs, None, DskdV2Settings().teacher_space))
    assert after == pytest.approx(expected, rel=1e-5)


def test_exact_shares_fewer_classes() -> None:
    (mapped, _), (exact, _) = made(), made(shared_vocab="exact")

    assert len(exact.distiller.losses["dskd_v2"].student_ids_K) < len(mapped.distiller.losses["dskd_v2"].student_ids_K)


def student_space_of(**settings: Any) -> tuple[float, float, float]:
    """Total and count of the term, and the count that was said beforehand."""
    ready, batch = made(**settings)
    found: dict[str, Any] = {}
    ready.distiller.losses["dskd_v2"].register_forward_hook(lambda _m, _i, out: found.update(out))
    before = ready.distiller.counts(batch)
    ready.distiller(batch, before, 0)
    term = found["student_space"]
    return float(term.total.detach()), float(term.count), float(before["dskd_v2.student_space"])


def test_the_students_space_is_a_mean_over_the_pairs_that_agree_and_no_others_count(tmp_path: Path) -> None:
    wide = str(tiny.saved(tiny.llama("sentencepiece", width=128), "sentencepiece", tmp_path))  # its head can follow
    agreeing, every, loose = (
        student_space_of(student=wide, **settings) for settings in ({}, {"agreement": False}, {"t2s_agreement": 0.0})
    )

    assert agreeing[1] == agreeing[2] > 0
    assert every[1] == every[2] > agreeing[1]
    assert every[0] > agreeing[0] > 0
    assert agreeing[1] < loose[1] == loose[2] <= every[1]


@pytest.mark.parametrize(
    ("spaces", "off"), [("student", {"teacher_space"}), ("teacher", {"projected_ce", "student_space"})]
)
def test_one_space_alone_leaves_the_terms_of_the_other_without_weight(spaces: str, off: set[str]) -> None:
    ready, _ = made(spaces=spaces)

    weights = ready.distiller.loss("dskd_v2").weights(0)

    assert {name for name, weight in weights.items() if not weight} == off

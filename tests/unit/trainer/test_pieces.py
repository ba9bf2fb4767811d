"""The losses over pieces of text against loops over the tiny cache, gradients, chunks, and what takes part."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import one_tokenizer as one
import slow_pieces as slow
from slow_losses import generator
from xkd_schemas.errors import UsageError
from xkd_trainer.data.batch import Batch
from xkd_trainer.data.collate import batch_of
from xkd_trainer.losses import pieces as pieces_module
from xkd_trainer.losses.baselines.gold import GoldSettings
from xkd_trainer.losses.baselines.simct import SimctSettings
from xkd_trainer.losses.baselines.xtoken import XtokenHSettings, XtokenPSettings, XtokenSettings, project_vocabulary
from xkd_trainer.losses.ops import lazy_logits
from xkd_trainer.losses.ops.lazy_logits import LazyLogits
from xkd_trainer.losses.ops.vocabulary import ids_by_bytes, shared_vocabulary, token_bytes
from xkd_trainer.losses.pieces import Pieces, PieceSide
from xkd_trainer.losses.registry import loss_named
from xkd_trainer.models.architecture import Head
from xkd_trainer.training.prepare import Ready


def side(seed: int, sizes: list[int], classes: int) -> tuple[LazyLogits, PieceSide]:
    g, total = generator(seed), sum(sizes)
    hidden, weight = (torch.randn(n, 3, generator=g, dtype=torch.float64) for n in (total, classes))
    ends = [0, *torch.tensor(sizes).cumsum(0).tolist()]
    target = torch.randint(classes, (total,), generator=g)
    inside = torch.ones(2, total, dtype=torch.bool)
    made = PieceSide(inside_BN=inside, target_N=target, size_G=torch.tensor(sizes), ends=ends)
    return LazyLogits(hidden=hidden, weight=weight), made


def built(loss: str, **settings: Any) -> Any:
    """A loss of small vocabularies that share some classes."""
    student, teacher = 7, 5
    context: Any = SimpleNamespace(
        student_vocab={f"s{v}" if v % 3 else f"b{v}": v for v in range(student)},
        teacher_vocab={f"t{v}" if v % 3 else f"b{v}": v for v in range(teacher)},
        student_head=lambda: Head(weight_VD=torch.zeros(student, 3), bias_V=None),
        teacher_head=lambda: Head(weight_VD=torch.zeros(teacher, 3), bias_V=None),
    )
    return loss_named(loss).build(loss_named(loss).parse(settings), context)


SIZES = ([1, 3, 1, 2], [2, 1, 1, 3])


def summed(made: Any, own: LazyLogits) -> list[Tensor]:
    theirs, teacher = side(6, SIZES[1], 5)
    student = side(5, SIZES[0], 7)[1]
    pieces = Pieces(student=student, teacher=teacher, document_G=torch.tensor([0, 0, 1, 1]))
    return made.sums(own, theirs, pieces, torch.tensor([1.0, 0.5, 2.0, 1.0], dtype=torch.float64))


BUILT: tuple[tuple[str, dict[str, Any]], ...] = (
    ("gold", {}),
    ("gold", {"merge": "bayesian", "temperature": 2.0}),
    ("gold", {"divergence": "reverse_kl"}),
    ("simct", {}),
    ("simct", {"divergence": "js", "temperature": 2.0}),
    ("xtoken_p", {"teacher_classes": 3, "temperature": 2.0}),
    ("xtoken_p", {"divergence": "reverse_kl"}),
    ("xtoken_h", {"temperature": 2.0}),
)


@pytest.mark.parametrize(("loss", "settings"), BUILT)
def test_gradients_by_states_and_head_are_numerically_right(loss: str, settings: dict[str, Any]) -> None:
    own, made = side(5, SIZES[0], 7)[0], built(loss, **settings)

    def value(hidden: Tensor, weight: Tensor) -> Tensor:
        return summed(made, LazyLogits(hidden=hidden, weight=weight))[0]

    assert torch.autograd.gradcheck(value, (own.hidden.requires_grad_(), own.weight.requires_grad_()), fast_mode=True)


@pytest.mark.parametrize("rows", [1, 2, 4])
@pytest.mark.parametrize("loss", ["gold", "simct", "xtoken_p", "xtoken_h"])
def test_chunks_cut_no_piece_and_change_nothing(loss: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    own, made = side(5, SIZES[0], 7)[0], built(loss)
    whole = summed(made, own)

    monkeypatch.setattr(lazy_logits, "CHUNK_BYTES", rows * 7 * 8 // lazy_logits.WIDER + 1)

    for found, expected in zip(summed(made, own), whole, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("loss", ["gold", "simct", "xtoken_p", "xtoken_h"])
def test_teachers_to_whom_the_text_is_equally_likely_give_other_losses(loss: str) -> None:
    """So the signal target_logprob cannot stand in for the last states."""
    (own, student), teacher, made = side(5, SIZES[0], 7), side(6, SIZES[1], 5)[1], built(loss)
    teacher.target_N.fill_(4)
    pieces = Pieces(student=student, teacher=teacher, document_G=torch.tensor([0, 0, 1, 1]))
    logits = torch.randn(7, 5, generator=generator(7), dtype=torch.float64)
    found = []
    for one_of in (logits, logits[:, [1, 0, 2, 3, 4]]):
        theirs = LazyLogits(hidden=one_of, weight=torch.eye(5, dtype=torch.float64))
        likelihood = one_of.log_softmax(-1)[:, 4]
        found.append((likelihood, made.sums(own, theirs, pieces, torch.ones(4, dtype=torch.float64))[0]))

    torch.testing.assert_close(found[0][0], found[1][0])
    assert abs(float(found[0][1] - found[1][1])) > 1e-3


@pytest.mark.parametrize("rows", [1, 4, 100])
def test_a_chunk_holds_no_more_than_its_share_or_one_piece(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    (own, student), (theirs, teacher) = side(5, [1, 3, 1, 2] * 5, 7), side(6, [2, 1, 1, 3] * 5, 7)
    pieces = Pieces(student=student, teacher=teacher, document_G=torch.zeros(20, dtype=torch.int64))
    monkeypatch.setattr(lazy_logits, "CHUNK_BYTES", rows * 7 * 8 // lazy_logits.WIDER + 1)

    parts = pieces.parts(own, theirs)

    assert [k for _, some in parts for k in range(some.stop)[some]] == list(range(20))
    for taken, some in parts:
        held = [span.stop - span.start for span in (taken, teacher.rows(some))]
        assert max(held) <= rows or some.stop == some.start + 1
    assert len(parts) == {1: 20, 4: 15, 100: 2}[rows]


def ready(loss: str, **settings: Any) -> tuple[Ready, Batch]:
    """Two documents, one of which has no piece of text."""
    made, _ = one.ready(loss, table=one.OTHER, **settings)
    return made, batch_of(made.cache, one.ROWS[1:3], made.wanted)


CASES: tuple[dict[str, Any], ...] = (
    {},
    {"merge": "bayesian", "mean": "documents", "temperature": 2.0, "end_token": "include", "js_share": 0.9},
    {"classes": "sorted"},
    {"shared_vocab": "exact", "matched_weight": 2.0, "unmatched_weight": 0.5},
)


@pytest.mark.parametrize("settings", CASES)
@torch.no_grad()
def test_gold_is_the_loops_over_pieces_of_single_documents(settings: dict[str, Any]) -> None:
    made, batch = ready("gold", **settings)
    how = GoldSettings(**settings)
    documents = one.pieces_of(made, batch, end_token=how.end_token == "include")
    shared: dict[int, int] = {}
    if how.classes == "hybrid":
        ids = shared_vocabulary(*one.vocabularies(made), mode=how.shared_vocab)
        shared = dict(zip(*(side.tolist() for side in ids), strict=True))
    share = len(shared) / len(made.cache.head().weight_VD)
    parts = (share, 1 - share) if how.matched_weight is None else (how.matched_weight, how.unmatched_weight or 0.0)

    expected = slow.gold(
        documents, shared, parts, tau=how.temperature, merge=how.merge, mean=how.mean, beta=how.js_share
    )
    found = one.terms_of(made.distiller, batch)
    assert max(end - start for *_, ranges in documents for (start, end), _ in ranges) > 1
    for name in ("gold", "matched", "unmatched"):
        one.assert_term(found[name], expected[name], expected["count"])
    tokens = sum(end - start for *_, ranges in documents for (start, end), _ in ranges)
    one.assert_term(found["covered"], tokens, sum(len(d[0][1]) for d in documents))


def test_a_piece_of_too_many_tokens_is_left_out_and_seen_in_covered(monkeypatch: pytest.MonkeyPatch) -> None:
    made, batch = one.ready("gold", table=one.OTHER)
    before = one.terms_of(made.distiller, batch)

    monkeypatch.setattr(pieces_module, "LONGEST", 1)

    after = one.terms_of(made.distiller, batch)
    assert 0 < float(after["gold"].count) < float(before["gold"].count)
    assert float(after["covered"].total) == float(after["gold"].count) < float(before["covered"].total)


def test_one_weight_alone_is_refused() -> None:
    with pytest.raises(UsageError, match="matched_weight and unmatched_weight are set together"):
        loss_named("gold").parse({"matched_weight": 1.0})


SIMCT: list[dict[str, Any]] = [
    {},
    {"shared_vocab": "exact", "divergence": "forward_kl", "temperature": 2.0, "end_token": "exclude"},
]


@pytest.mark.parametrize("settings", SIMCT)
@torch.no_grad()
def test_simct_is_the_loops_over_pieces_of_single_documents(settings: dict[str, Any]) -> None:
    made, batch = ready("simct", **settings)
    how = SimctSettings(**settings)
    documents = one.pieces_of(made, batch, end_token=how.end_token == "include")
    ids = shared_vocabulary(*one.vocabularies(made), mode=how.shared_vocab)
    shared = dict(zip(*(side.tolist() for side in ids), strict=True))

    expected, extra = slow.simct(documents, shared, tau=how.temperature, reverse=how.divergence == "reverse_kl")

    assert 0 < extra < sum(len(d[2]) for d in documents)
    predictions = sum(len(d[0][1]) for d in documents)
    one.assert_term(one.terms_of(made.distiller, batch)["simct"], expected, predictions)


# X-Token


def projected(made: Any, targets: int = 4) -> dict[int, dict[int, float]]:
    student, teacher = one.vocabularies(made)
    same = dict(zip(*(ids.tolist() for ids in shared_vocabulary(student, teacher, "mapped")), strict=True))
    return slow.project(*((token_bytes(side), ids_by_bytes(side)) for side in (student, teacher)), same, targets)


@pytest.mark.parametrize("targets", [1, 4])
def test_the_projection_is_the_loops_over_both_vocabularies(targets: int) -> None:
    made, _ = one.ready("xtoken_p", table=one.OTHER)

    entries = project_vocabulary(*one.vocabularies(made), XtokenSettings(targets=targets))

    expected = [(s, t, w) for s, row in sorted(projected(made, targets).items()) for t, w in row.items()]
    assert [pair[:2] for pair in expected] == list(zip(*(ids.tolist() for ids in entries[:2]), strict=True))
    assert entries[2].tolist() == pytest.approx([w for *_, w in expected], rel=1e-6)
    assert sum(w < 1 for *_, w in expected) > 0 or targets == 1


@pytest.mark.parametrize("settings", [{}, {"teacher_classes": 40, "temperature": 2.0}])
@torch.no_grad()
def test_p_kl_is_the_loops_over_pieces_of_single_documents(settings: dict[str, Any]) -> None:
    made, batch = ready("xtoken_p", **settings)
    how, documents = XtokenPSettings(**settings), one.pieces_of(made, batch)

    expected = slow.p_kl(documents, projected(made), how.teacher_classes, how.temperature)

    one.assert_term(one.terms_of(made.distiller, batch)["xtoken_p"], expected, sum(len(d[2]) for d in documents))


@pytest.mark.parametrize("settings", [{}, {"threshold": 0.3, "ranks": 30, "temperature": 2.0}])
@torch.no_grad()
def test_h_kl_is_the_loops_over_pieces_of_single_documents(settings: dict[str, Any]) -> None:
    made, batch = ready("xtoken_h", **settings)
    how, documents = XtokenHSettings(**settings), one.pieces_of(made, batch)

    expected = slow.h_kl(documents, projected(made), how.threshold, how.ranks, how.temperature)

    found, count = one.terms_of(made.distiller, batch), sum(len(d[2]) for d in documents)
    for name, total in zip(("matched", "unmatched", "xtoken_h"), (*expected, sum(expected)), strict=True):
        one.assert_term(found[name], total, count)

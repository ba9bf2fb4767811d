import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import slow_losses as slow
import tiny_models as tiny
from slow_documents import Alone, alone, ready, terms_of
from slow_documents import assert_term as assert_wired
from xkd_schemas.errors import UsageError
from xkd_trainer.losses.ops.term import LossTerm
from xkd_trainer.losses.ops.vocabulary import shared_vocabulary
from xkd_trainer.losses.sra import (
    geometric,
    span_omega,
    weighted_cosine,
)
from xkd_trainer.training.prepare import Ready

SEEDS = st.integers(0, 2**31)
D = 4
VECTOR_LOSSES = [weighted_cosine, geometric]


def assert_term(found: LossTerm, expected: tuple[float, float]) -> None:
    assert float(found.total) == pytest.approx(expected[0], abs=1e-9)
    assert float(found.count) == expected[1]
    assert not found.count.requires_grad


def omegas(seed: int, sizes: list[int]) -> list[Tensor]:
    return [torch.tensor(slow.omega(m.tolist(), 1.0), dtype=m.dtype) for m in slow.masses(seed, sizes)]


# The two losses on vectors


@pytest.mark.parametrize("name", ["weighted_cosine", "geometric"])
@settings(max_examples=40, deadline=None)
@given(seed=SEEDS)
def test_vector_losses_equal_the_loops(name: str, seed: int) -> None:
    fast, loops = {
        "weighted_cosine": (weighted_cosine, slow.weighted_cosine),
        "geometric": (geometric, slow.geometric),
    }[name]
    sizes = slow.lengths(seed)
    student, teacher, omega = slow.ragged(seed, sizes, D), slow.ragged(seed + 1, sizes, D), omegas(seed + 2, sizes)

    found = fast(*(slow.padded(x, torch.nan) for x in (student, teacher, omega)), slow.mask(sizes))

    documents = zip(student, teacher, omega, strict=True)
    assert_term(found, loops([(s.tolist(), t.tolist(), w.tolist()) for s, t, w in documents]))


@pytest.mark.parametrize("loss", VECTOR_LOSSES)
def test_vector_losses_have_the_right_gradient_for_the_student_only(loss) -> None:
    student, teacher = slow.ragged(1, [3, 3], D)
    omega, valid = torch.tensor([[0.2, 0.5, 0.3]]).double(), torch.ones(1, 3, dtype=torch.bool)
    teacher.requires_grad_()

    assert torch.autograd.gradcheck(lambda s: loss(s, teacher, omega, valid).total, student[None].requires_grad_())

    loss(student[None].requires_grad_(), teacher[None], omega, valid).total.backward()
    assert teacher.grad is None


# Weights


@settings(max_examples=30, deadline=None)
@given(seed=SEEDS, p=st.sampled_from([0.0, 0.5, 1.0, 2.0]))
def test_omega_is_the_power_of_the_mass_over_its_sum(seed: int, p: float) -> None:
    sizes = slow.lengths(seed)
    mass = slow.masses(seed, sizes)

    found = span_omega(slow.padded(mass, fill=torch.nan).requires_grad_(), slow.mask(sizes), p, True)

    assert not found.requires_grad
    for row, m in enumerate(mass):
        torch.testing.assert_close(found[row, : len(m)], torch.tensor(slow.omega(m.tolist(), p), dtype=m.dtype))
        assert (found[row, len(m) :] == 0).all()


def test_unweighted_omega_is_one_over_the_number_of_spans() -> None:
    found = span_omega(torch.rand(2, 4, generator=slow.generator(1)), slow.mask([4, 2]), 1.0, False)

    assert found.tolist() == [[0.25] * 4, [0.5, 0.5, 0.0, 0.0]]


def test_omega_of_no_mass_is_zero_and_a_high_power_does_not_underflow() -> None:
    ones = torch.ones(1, 2, dtype=torch.bool)

    assert span_omega(torch.zeros(1, 2), ones, 1.0, True).tolist() == [[0.0, 0.0]]
    assert span_omega(torch.tensor([[1e-20, 1e-20]]), ones, 4.0, True).tolist() == [[0.5, 0.5]]
    assert span_omega(torch.zeros(3, 0), torch.zeros(3, 0, dtype=torch.bool), 1.0, True).shape == (3, 0)


# Shared vocabulary

BYTE_LEVEL = {
    token: number
    for number, token in enumerate(("Ġthe", "the", "ing", "Ċ", "æ", "Ġ", "é", "Ã©", "<0x41>", "A", "ĠĠ", "</s>"))
}
SENTENCEPIECE = {
    token: number
    for number, token in enumerate(
        ("▁the", "the", "ing", "<0x0A>", "<0xE6>", "▁", "é", "<0xE9>", "<0x41>", "A", "▁▁", "</s>", "▁new")
    )
}


def named(student: dict[str, int], teacher: dict[str, int], mode: str = "mapped") -> dict[str, str]:
    names = [{number: token for token, number in v.items()} for v in (student, teacher)]
    pairs = zip(*shared_vocabulary(student, teacher, mode), strict=True)
    return {names[0][int(s)]: names[1][int(t)] for s, t in pairs}


def test_byte_level_and_sentencepiece_meet_in_their_bytes() -> None:
    assert named(BYTE_LEVEL, SENTENCEPIECE) == {
        "Ġthe": "▁the",
        "the": "the",
        "ing": "ing",
        "Ċ": "<0x0A>",
        "æ": "<0xE6>",  # the character of the byte E6, not the letter
        "Ġ": "▁",
        "é": "<0xE9>",
        "Ã©": "é",  # its two bytes in UTF-8
        "A": "A",  # and not <0x41>, which text never reaches
        "ĠĠ": "▁▁",
        "</s>": "</s>",
    }


def test_the_map_is_the_same_from_the_other_side_and_in_any_order() -> None:
    there = named(BYTE_LEVEL, SENTENCEPIECE)

    assert named(SENTENCEPIECE, BYTE_LEVEL) == {t: s for s, t in there.items()}
    assert named(dict(reversed(BYTE_LEVEL.items())), dict(reversed(SENTENCEPIECE.items()))) == there


def test_a_byte_token_is_used_where_no_ordinary_token_is_that_byte() -> None:
    without = {token: number for token, number in SENTENCEPIECE.items() if token != "A"}

    assert named(BYTE_LEVEL, without)["A"] == "<0x41>"


def test_every_byte_of_the_byte_level_alphabet_meets_its_byte_token() -> None:
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = sorted(set(range(256)) - set(printable))  # written as U+0100, U+0101, ...
    character = {byte: chr(byte) for byte in printable} | {b: chr(256 + n) for n, b in enumerate(moved)}
    byte_level = {character[byte]: byte for byte in range(256)} | {"Ġa": 300}
    sentencepiece = {f"<0x{byte:02X}>": 500 + byte for byte in range(256)} | {"▁a": 900, "▁b": 901}

    student, teacher = shared_vocabulary(byte_level, sentencepiece, "mapped")

    assert student.tolist() == [*range(256), 300]
    assert teacher.tolist() == [*range(500, 756), 900]
    assert (character[0x0A], character[0x20], character[0xAD]) == ("Ċ", "Ġ", "Ń")


def test_two_sentencepiece_vocabularies_pair_byte_tokens_with_byte_tokens() -> None:
    other = {"▁the": 3, "<0x41>": 4, "A": 5, "<0x71>": 6}
    more = SENTENCEPIECE | {"q": 20}

    assert named(more, other) == {"▁the": "▁the", "<0x41>": "<0x41>", "A": "A", "q": "<0x71>"}
    assert named({"▁a": 0, "A": 1}, {"▁a": 0, "A": 1, "<0x41>": 2}) == {"▁a": "▁a", "A": "A"}
    assert named({"▁a": 0, "A": 1, "<0x41>": 2}, {"▁a": 0, "A": 1}) == {"▁a": "▁a", "A": "A"}


def test_exact_compares_strings_and_nothing_else() -> None:
    assert named(BYTE_LEVEL, SENTENCEPIECE, "exact") == {t: t for t in ("the", "ing", "é", "<0x41>", "A", "</s>")}


def test_a_wordpiece_continuation_is_never_the_start_of_a_word() -> None:
    wordpiece = {"the": 0, "##the": 1, "##ing": 2, "ing": 3, ",": 4, "[CLS]": 5, "##": 6}
    other = {"Ġthe": 0, "the": 1, "ing": 2, "Ġing": 3, ",": 4, "[CLS]": 5, "Ġ,": 6, "##": 7}

    assert named(wordpiece, other) == {
        "the": "Ġthe",
        "##the": "the",
        "##ing": "ing",
        "ing": "Ġing",
        ",": ",",
        "[CLS]": "[CLS]",
        "##": "##",
    }


def test_added_tokens_outside_the_byte_alphabet_are_their_own_text() -> None:
    assert named({"Ġa": 0, "你好": 1, "  ": 2}, {"▁a": 5, "你好": 6, "▁▁": 7}) == {
        "Ġa": "▁a",
        "你好": "你好",
        "  ": "▁▁",
    }


@settings(max_examples=30, deadline=None)
@given(seed=SEEDS)
def test_no_id_of_either_side_occurs_twice_and_equal_vocabularies_share_all_texts(seed: int) -> None:
    g = slow.generator(seed)
    alphabet = ["", "▁", "##", "a", "b", "<0x41>", "A", "é"]

    def vocabulary() -> dict[str, int]:
        pieces = torch.randint(0, len(alphabet), (12, 2), generator=g).tolist()
        tokens = sorted({"".join(alphabet[i] for i in piece) for piece in pieces} | {"a"})
        return dict(zip(tokens, torch.randperm(len(tokens), generator=g).tolist(), strict=True))

    student, teacher = vocabulary(), vocabulary()
    for mode in ("exact", "mapped"):
        same = shared_vocabulary(student, student, mode)
        assert same[0].tolist() == same[1].tolist() == list(range(len(student)))
    try:
        pair = shared_vocabulary(student, teacher, "mapped")
    except UsageError:
        return
    for ids in pair:
        assert len(set(ids.tolist())) == len(ids)
        assert ids.dtype == torch.int64
    assert pair[0].tolist() == sorted(pair[0].tolist())


def test_vocabularies_that_share_nothing_are_refused() -> None:
    with pytest.raises(UsageError, match=r"vocabularies of 1 and 2 tokens share none \(exact\)"):
        shared_vocabulary({"Ġa": 0}, {"▁a": 0, "▁b": 1}, "exact")


# Wired to the cache


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
    assert_wired(found["sra.cos"], *slow.weighted_cosine(projected))
    assert_wired(found["sra.geo"], *slow.geometric([(s, t, w) for _, s, t, w in parts]))
    vocabularies = [tiny.tokenizer_of(kind).get_vocab() for kind in ("sentencepiece", "byte_level")]
    own, theirs = shared_vocabulary(*vocabularies, shared)
    head = made.cache.head().weight_VD
    logits = [
        ((torch.tensor(s) @ d.head[own].T).tolist(), (torch.tensor(t) @ head[theirs].T).tolist())
        for d, s, t, _ in parts
    ]
    assert_wired(found["sra.kd"], *slow.span_logits(logits, tau, mean=kd == "mean"))
    assert_wired(found["sra.spans"], sum(len(s) for _, s, _, _ in parts), len(parts))


def test_the_projector_of_sra_starts_by_xaviers_uniform_rule() -> None:
    weight_Dd = ready("sra")[0].distiller.losses["sra"].projector.weight.detach()

    bound = math.sqrt(6 / (16 + 32))  # the widths of both models
    assert 0.95 * bound < float(weight_Dd.abs().max()) <= bound
    assert float(weight_Dd.std()) == pytest.approx(bound / math.sqrt(3), rel=0.1)

    weight_Dd = ready("sra", projector="orthogonal")[0].distiller.losses["sra"].projector.weight.detach()
    torch.testing.assert_close(weight_Dd.T @ weight_Dd, torch.eye(16))

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

import slow_losses as slow
from xkd_schemas.errors import UsageError
from xkd_trainer.losses.ops.term import LossTerm
from xkd_trainer.losses.ops.vocabulary import shared_vocabulary
from xkd_trainer.losses.sra import SraSettings, geometric, span_omega, weighted_cosine

SEEDS = st.integers(0, 2**31)
D, V = 4, 6
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

    found = fast(slow.padded(student), slow.padded(teacher), slow.padded(omega), slow.mask(sizes))

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


@pytest.mark.parametrize("loss", VECTOR_LOSSES)
def test_vector_losses_ignore_what_padding_holds_bit_for_bit(loss) -> None:
    sizes = [3, 1, 0, 2]
    student, teacher, omega = slow.ragged(2, sizes, D), slow.ragged(3, sizes, D), omegas(4, sizes)
    valid = slow.mask(sizes)

    def run(fill: float) -> tuple[Tensor, Tensor]:
        return slow.with_gradient(
            lambda s: loss(s, slow.padded(teacher, fill), slow.padded(omega, fill), valid).total,
            slow.padded(student, fill),
        )

    value, gradient = run(0.0)
    for fill in (1e9, torch.nan, torch.inf):
        slow.assert_same_bits(value, run(fill)[0])
        slow.assert_same_bits(gradient, run(fill)[1])
    assert (gradient[~valid] == 0).all()
    assert (gradient[0] != 0).any()


@pytest.mark.parametrize("loss", VECTOR_LOSSES)
def test_vector_losses_do_not_depend_on_how_the_batch_is_cut(loss) -> None:
    sizes = [3, 1, 0, 5, 2]
    batch = [
        slow.padded(slow.ragged(5, sizes, D)),
        slow.padded(slow.ragged(6, sizes, D)),
        slow.padded(omegas(7, sizes)),
        slow.mask(sizes),
    ]

    whole = loss(*batch)
    parts = [loss(*(x[r] for x in batch)) for r in (slice(0, 2), slice(2, 3), slice(3, 5))]

    torch.testing.assert_close(whole.total, sum(p.total for p in parts))
    assert whole.count == sum(p.count for p in parts) == 4


@pytest.mark.parametrize("loss", VECTOR_LOSSES)
@pytest.mark.parametrize("sizes", [[0], [1], [1, 0], [3]])
@pytest.mark.parametrize("vector", [0.0, 1.0])
def test_vector_losses_of_degenerate_documents_are_finite(loss, sizes: list[int], vector: float) -> None:
    vectors = torch.full((len(sizes), max(sizes), D), vector)

    value, gradient = slow.with_gradient(
        lambda s: loss(s, vectors, torch.zeros(vectors.shape[:2]), slow.mask(sizes)).total, vectors
    )

    assert value == 0
    assert gradient.isfinite().all()


@pytest.mark.parametrize("loss", VECTOR_LOSSES)
def test_a_teacher_that_is_its_own_student_costs_nothing(loss) -> None:
    sizes = [4, 1, 3]
    teacher, omega = slow.padded(slow.ragged(8, sizes, D)), slow.padded(omegas(9, sizes))

    assert float(loss(teacher, teacher, omega, slow.mask(sizes)).total) == pytest.approx(0.0, abs=1e-14)


def test_geometry_compares_models_of_different_width_and_does_not_see_a_rotation() -> None:
    (teacher,) = slow.ragged(10, [5], D)
    rotation = torch.linalg.qr(torch.randn(9, 9, generator=slow.generator(11), dtype=torch.float64)).Q[:D]
    omega = torch.full((1, 5), 0.2, dtype=torch.float64)

    found = geometric((teacher @ rotation)[None], teacher[None], omega, omega > 0)

    assert float(found.total) < 1e-24


def test_a_document_of_one_span_is_counted_in_the_geometry_and_one_of_none_is_not() -> None:
    sizes = [3, 1, 0]
    args = [slow.padded(x) for x in (slow.ragged(12, sizes, D), slow.ragged(13, sizes, D), omegas(14, sizes))]

    found, alone = geometric(*args, slow.mask(sizes)), geometric(*(x[:1] for x in args), slow.mask(sizes)[:1])

    assert found.count == 2
    slow.assert_same_bits(found.total, alone.total)


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


def test_settings_refuse_unknown_keys_and_values() -> None:
    with pytest.raises(ValidationError):
        SraSettings(lambda_geo=50)  # type: ignore[call-arg]
    with pytest.raises(ValidationError):
        SraSettings(tau=0)


# Shared vocabulary

BYTE_LEVEL = {
    "Ġthe": 0,
    "the": 1,
    "ing": 2,
    "Ċ": 3,
    "æ": 4,
    "Ġ": 5,
    "é": 6,
    "Ã©": 7,
    "<0x41>": 8,
    "A": 9,
    "ĠĠ": 10,
    "</s>": 11,
}
SENTENCEPIECE = {
    "▁the": 0,
    "the": 1,
    "ing": 2,
    "<0x0A>": 3,
    "<0xE6>": 4,
    "▁": 5,
    "é": 6,
    "<0xE9>": 7,
    "<0x41>": 8,
    "A": 9,
    "▁▁": 10,
    "</s>": 11,
    "▁new": 12,
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

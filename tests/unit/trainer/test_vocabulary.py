"""Which classes two vocabularies share."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import slow_losses as slow
from xkd_schemas.errors import UsageError
from xkd_trainer.losses.ops.vocabulary import shared_vocabulary


def numbered(tokens: str) -> dict[str, int]:
    return {token: number for number, token in enumerate(tokens.split())}


BYTE_LEVEL = numbered("Ġthe the ing Ċ æ Ġ é Ã© <0x41> A ĠĠ </s>")
SENTENCEPIECE = numbered("▁the the ing <0x0A> <0xE6> ▁ é <0xE9> <0x41> A ▁▁ </s> ▁new")


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

    same = {text: text for text in (",", "[CLS]", "##")}
    assert named(wordpiece, other) == {"the": "Ġthe", "##the": "the", "##ing": "ing", "ing": "Ġing"} | same


def test_added_tokens_outside_the_byte_alphabet_are_their_own_text() -> None:
    added = named({"Ġa": 0, "你好": 1, "  ": 2}, {"▁a": 5, "你好": 6, "▁▁": 7})

    assert added == {"Ġa": "▁a", "你好": "你好", "  ": "▁▁"}


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31))
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

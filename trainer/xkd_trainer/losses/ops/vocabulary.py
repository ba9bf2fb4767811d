"""Which classes of two vocabularies are the same text, so that two heads can be compared on them.

A token string is written in one of four styles, found from the vocabulary as a whole: the style
whose mark starts most tokens, plain if no token has one.

    style          mark  what a token string means as bytes
    byte-level     Ġ     each character is one byte by GPT-2's table (Ġ is the blank, Ċ the line end);
                         a string with a character outside that table (an added token) is its UTF-8
    SentencePiece  ▁     ▁ is the blank, <0x41> is the byte 41, the rest is its UTF-8
    WordPiece      ##    ##x is x; x that starts with a letter or digit starts a word: a blank and x;
                         anything else ([CLS], a comma) is its UTF-8
    plain                its UTF-8

Special tokens are compared like all others: </s> is shared if both vocabularies have it.
"""

import re
from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor
from transformers.convert_slow_tokenizer import bytes_to_unicode

from xkd_schemas.errors import UsageError

BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


BYTES_OF_CHARACTERS = {character: byte for byte, character in bytes_to_unicode().items()}
"""GPT-2's character for each byte, inverted: a printable Latin-1 byte is itself, the others follow from U+0100."""


def _byte_level(token: str) -> bytes:
    if all(character in BYTES_OF_CHARACTERS for character in token):
        return bytes(BYTES_OF_CHARACTERS[character] for character in token)
    return _plain(token)


def _sentencepiece(token: str) -> bytes:
    byte = BYTE_TOKEN.fullmatch(token)
    return bytes([int(byte[1], 16)]) if byte else _plain(token.replace("▁", " "))


def _wordpiece(token: str) -> bytes:
    if token.startswith("##") and len(token) > 2:
        return _plain(token[2:])
    return _plain(" " + token if token[:1].isalnum() else token)


def _plain(token: str) -> bytes:
    return token.encode("utf-8", "surrogatepass")


MARKS: Mapping[str, Callable[[str], bytes]] = {"Ġ": _byte_level, "▁": _sentencepiece, "##": _wordpiece}
"""Mark of a style -> the bytes of a token in it; on equal counts the first listed wins."""


def _reading(vocabulary: Mapping[str, int]) -> Callable[[str], bytes]:
    marked = {mark: sum(token.startswith(mark) for token in vocabulary) for mark in MARKS}
    mark = max(marked, key=marked.__getitem__)
    return MARKS[mark] if marked[mark] else _plain


def token_bytes(vocabulary: Mapping[str, int]) -> dict[int, bytes]:
    """What each token is as bytes, by id.

    >>> token_bytes({"Ġthe": 0, "Ċ": 1})
    {0: b' the', 1: b'\\n'}
    """
    read = _reading(vocabulary)
    return {number: read(token) for token, number in vocabulary.items()}


def ids_by_bytes(
    vocabulary: Mapping[str, int], read: Callable[[str], bytes] | None = None, *, blanks: bool = True
) -> dict[bytes, int]:
    """One id for each byte string, or for those without their `blanks`: of several, a token of ordinary text before a
    byte token, then the lowest id."""
    read = read or _reading(vocabulary)
    found: dict[bytes, tuple[bool, int]] = {}
    for token, number in vocabulary.items():
        candidate = (read is _sentencepiece and BYTE_TOKEN.fullmatch(token) is not None, number)
        text = read(token) if blanks else read(token).replace(b" ", b"")
        found[text] = min(candidate, found.get(text, candidate))
    return {text: number for text, (_, number) in found.items()}


def cut_greedily(text: bytes, ids: Mapping[bytes, int], most: int) -> list[int]:
    """The first tokens of a text, each the longest that fits; none where it cannot be cut that way.

    >>> cut_greedily(b"201", {b"2": 0, b"20": 1, b"1": 2}, 4), cut_greedily(b"2?", {b"2": 0}, 4)
    ([1, 2], [])
    """
    found: list[int] = []
    at, size = 0, len(text)
    while at < size and len(found) < most:
        end = next((end for end in range(size, at, -1) if text[at:end] in ids), at)
        if end == at:
            return []
        found.append(ids[text[at:end]])
        at = end
    return found


def _same_bytes(student_vocab: Mapping[str, int], teacher_vocab: Mapping[str, int]) -> list[tuple[int, int]]:
    """Pairs of ids of equal bytes; in one style equal strings first, so that a vocabulary shares all with itself."""
    read_student, read_teacher = _reading(student_vocab), _reading(teacher_vocab)
    pairs: list[tuple[int, int]] = []
    if read_student is read_teacher:
        pairs = _same_strings(student_vocab, teacher_vocab)
        equal = student_vocab.keys() & teacher_vocab.keys()
        student_vocab = {token: number for token, number in student_vocab.items() if token not in equal}
        teacher_vocab = {token: number for token, number in teacher_vocab.items() if token not in equal}
    student = ids_by_bytes(student_vocab, read_student)
    teacher = ids_by_bytes(teacher_vocab, read_teacher)
    return pairs + [(number, teacher[text]) for text, number in student.items() if text in teacher]


def _same_strings(student_vocab: Mapping[str, int], teacher_vocab: Mapping[str, int]) -> list[tuple[int, int]]:
    return [(number, teacher_vocab[token]) for token, number in student_vocab.items() if token in teacher_vocab]


def shared_vocabulary(
    student_vocab: Mapping[str, int], teacher_vocab: Mapping[str, int], mode: Literal["mapped", "exact"]
) -> tuple[Tensor, Tensor]:
    """Pairs of ids that are the same text: student ids [V] ascending, and the teacher id of each [V], int64.

    No id of either side occurs twice, and the pairs do not depend on the order of the mappings, which are as
    `tokenizer.get_vocab()` gives them. UsageError where they share nothing.

    >>> student, teacher = {"a": 0, "Ġthe": 1, "Ċ": 2}, {"<0x0A>": 7, "▁the": 8, "a": 9}
    >>> shared_vocabulary(student, teacher, "mapped")
    (tensor([0, 1, 2]), tensor([9, 8, 7]))
    >>> shared_vocabulary(student, teacher, "exact")
    (tensor([0]), tensor([9]))

    mapped: equal bytes, as the module says; two vocabularies of one style pair equal strings first. exact: equal token
    strings, as SRA's code does (arXiv 2605.01205): a byte-level and a SentencePiece vocabulary then share no token
    that starts a word.
    """
    pairs = sorted((_same_bytes if mode == "mapped" else _same_strings)(student_vocab, teacher_vocab))
    if not pairs:
        raise UsageError(
            f"vocabularies of {len(student_vocab)} and {len(teacher_vocab)} tokens share none ({mode})",
            fix="set shared_vocab of the loss to the other value, or use a loss that needs no shared classes",
        )
    ids_V2 = torch.tensor(pairs, dtype=torch.int64)
    return ids_V2[:, 0].contiguous(), ids_V2[:, 1].contiguous()

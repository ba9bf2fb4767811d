"""MinED's two alignments (FuseLLM, arXiv 2401.10491): vocabulary to vocabulary, and token to token in each document.

Both compare token strings without blanks by edit distance, in bytes; how a token is read as bytes is in `vocabulary`.

Shape legend for this file
    B documents    N student tokens    M teacher tokens    V classes of one vocabulary
"""

from collections.abc import Mapping
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from xkd_schemas.progress import Progress, tick
from xkd_trainer.losses.mined_numba import nearest, partners_of_batch
from xkd_trainer.losses.vocabulary import BYTE_TOKEN, shared_vocabulary, token_bytes

SEARCHED: Final = 512
"""Classes whose nearest are searched between two ticks."""

Array = npt.NDArray[Any]
Texts = tuple[Array, Array]
"""Bytes of all strings (uint8), and offsets (int64): string k is between the offsets k and k + 1."""


def packed(strings: list[bytes]) -> Texts:
    """The strings one after the other.

    >>> packed([b"ab", b"", b"c"])
    (array([97, 98, 99], dtype=uint8), array([0, 2, 2, 3]))
    """
    sizes = np.fromiter((len(s) for s in strings), np.int64, len(strings))
    return np.frombuffer(b"".join(strings), np.uint8), np.concatenate([[0], sizes.cumsum()]).astype(np.int64)


def token_texts(vocabulary: Mapping[str, int]) -> Texts:
    """The strings of the ids 0, 1, ... without blanks; empty where no token has the id."""
    strings = [b""] * (max(vocabulary.values(), default=-1) + 1)
    for number, text in token_bytes(vocabulary).items():
        strings[number] = _bare(text)
    return packed(strings)


def _bare(text: bytes) -> bytes:
    return text.replace(b" ", b"")


def vocabulary_map(source: Mapping[str, int], target: Mapping[str, int], mode: Literal["nearest", "exact"]) -> Tensor:
    """For each id of `source` the id of the target token nearest to it, [V] int64; -1 where there is none.

    First tokens of equal text, then those of equal text without blanks, then, in mode "nearest", the token of least
    edit distance without blanks. A word's start counts only in the first step.

    >>> vocabulary_map({"Ġthe": 0, "cats": 1, "Ġ": 2}, {"cat": 5, "▁the": 6, "the": 7, "▁": 8}, "nearest")
    tensor([6, 5, 8])
    >>> vocabulary_map({"Ġthe": 0, "cats": 1, "Ġ": 2}, {"cat": 5, "▁the": 6, "the": 7, "▁": 8}, "exact")
    tensor([ 6, -1,  8])

    Args:
        source: Token string -> id.
        target: The same.
        mode: Whether tokens without an equal get the nearest one. Ties go to the token whose length is nearest, the
            shorter first, then to the lower id.

    Raises:
        UsageError: No token of one is a token of the other.
    """
    found_V = np.full(max(source.values(), default=-1) + 1, -1, np.int64)
    bare = {number: _bare(text) for number, text in token_bytes(source).items()}
    to_bare = {number: _bare(text) for number, text in token_bytes(target).items()}
    bytes_last = {number: BYTE_TOKEN.fullmatch(token) is not None for token, number in target.items()}
    first: dict[bytes, int] = {}
    for number in sorted(to_bare, key=lambda n: (bytes_last[n], n)):
        first.setdefault(to_bare[number], number)
    for number, text in bare.items():
        found_V[number] = first.get(text, -1)
    equal_from, equal_to = shared_vocabulary(source, target, "mapped")
    found_V[equal_from.numpy()] = equal_to.numpy()
    if mode == "nearest":
        missing = np.array(sorted(n for n in bare if found_V[n] < 0), np.int64)
        found_V[missing] = _nearest([bare[int(n)] for n in missing], to_bare)
    return torch.from_numpy(found_V)


def _nearest(queries: list[bytes], targets: Mapping[int, bytes]) -> Array:
    """Ids of the nearest targets, by searching all of them."""
    ids = sorted(targets, key=lambda n: (len(targets[n]), n))
    sizes = np.fromiter((len(targets[n]) for n in ids), np.int64, len(ids))
    first_of = np.searchsorted(sizes, np.arange(int(sizes[-1]) + 2)).astype(np.int64)
    out, texts = np.zeros(len(queries), np.int64), packed([targets[n] for n in ids])
    with Progress("mined: nearest classes", len(queries), of="classes"):
        for first in range(0, len(queries), SEARCHED):
            part = queries[first : first + SEARCHED]
            nearest(packed(part), texts, first_of, out[first : first + SEARCHED])
            tick(len(part))
    return np.asarray(ids, np.int64)[out]


Tokens = tuple[Texts, Tensor, Tensor]
"""`token_texts` of a model, ids int64 [B, N] on any device, and which are valid, bool [B, N], valid ones first."""


def partners(student: Tokens, teacher: Tokens) -> Tensor:
    """Index (of M) of the teacher token that is the only one time warping puts beside a student token, else -1.

    The path has the least sum of edit distances; on equal sums it steps in both first, then in the teacher.

    >>> student, teacher = packed([b"the", b"cats"]), packed([b"the", b"cat", b"s"])
    >>> yes, ids = torch.ones(1, 3) > 0, torch.tensor([[0, 1, 2]])
    >>> partners((student, ids[:, :2], yes[:, :2]), (teacher, ids, yes))
    tensor([[ 0, -1]])

    Args:
        student: Token strings, ids and mask [B, N].
        teacher: The same [B, M].

    Returns:
        int64 [B, N] on the device of the student's ids, -1 where not valid.
    """
    match = np.full(tuple(student[1].shape), -1, np.int64)
    sides = [
        (texts, ids.cpu().contiguous().numpy(), valid.sum(-1).cpu().numpy())
        for texts, ids, valid in (student, teacher)
    ]
    partners_of_batch(*sides, match)
    return torch.from_numpy(match).to(student[1].device)

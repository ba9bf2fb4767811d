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
from rapidfuzz.distance import Levenshtein
from rapidfuzz.process import cdist
from torch import Tensor

from xkd_schemas.progress import Progress, tick
from xkd_trainer.losses.ops.vocabulary import BYTE_TOKEN, shared_vocabulary, token_bytes

SEARCHED: Final = 512
"""Classes whose nearest are searched between two ticks."""

Array = npt.NDArray[Any]


def token_texts(vocabulary: Mapping[str, int]) -> list[bytes]:
    """The strings of the ids 0, 1, ... without blanks; empty where no token has the id."""
    strings = [b""] * (max(vocabulary.values(), default=-1) + 1)
    for number, text in token_bytes(vocabulary).items():
        strings[number] = _bare(text)
    return strings


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
    """Ids of the nearest targets, by the distances to all of them; ties as `vocabulary_map` says."""
    found = np.zeros(len(queries), np.int64)
    ids = np.array(sorted(targets), np.int64)
    query_sizes, sizes = (np.array([len(text) for text in texts]) for texts in (queries, [targets[n] for n in ids]))
    with Progress("mined: nearest classes", len(queries), of="classes"):
        for size in np.unique(query_sizes):
            # of equal distances argmin takes the first, so the targets stand in the order of the ties
            ranked = ids[np.lexsort((sizes, abs(sizes - size)))]
            texts = [targets[n] for n in ranked]
            same_size = np.nonzero(query_sizes == size)[0]
            for part in np.split(same_size, range(SEARCHED, len(same_size), SEARCHED)):
                distances = cdist([queries[k] for k in part], texts, scorer=Levenshtein.distance, dtype=np.int32)
                found[part] = ranked[distances.argmin(1)]
                tick(len(part))
    return found


Tokens = tuple[list[bytes], Tensor, Tensor]
"""`token_texts` of a model, ids int64 [B, N] on any device, and which are valid, bool [B, N], valid ones first."""


def partners(student: Tokens, teacher: Tokens) -> Tensor:
    """Index (of M) of the teacher token that is the only one time warping puts beside a student token, else -1.

    The path has the least sum of edit distances; on equal sums it steps in both first, then in the teacher.

    >>> student, teacher = [b"the", b"cats"], [b"the", b"cat", b"s"]
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
    for row, (own, theirs) in enumerate(zip(_valid_texts(student), _valid_texts(teacher), strict=True)):
        if own and theirs:
            cost_MN = cdist(theirs, own, scorer=Levenshtein.distance, dtype=np.int32)
            match[row, : len(own)] = _only_partners(_path_sums(cost_MN))
    return torch.from_numpy(match).to(student[1].device)


def _valid_texts(tokens: Tokens) -> list[list[bytes]]:
    """The token strings of each document."""
    texts, ids_BN, valid_BN = tokens
    sizes = valid_BN.sum(-1).tolist()
    return [[texts[n] for n in ids[:size]] for ids, size in zip(ids_BN.tolist(), sizes, strict=True)]


def _path_sums(cost_MN: Array) -> Array:
    """In each cell the least sum of a path from the first cell.

    >>> _path_sums(np.array([[0, 3], [4, 1]]))
    array([[0, 3],
           [4, 1]])
    """
    sums_MN = cost_MN.cumsum(1, dtype=cost_MN.dtype)  # row i: what a path along it from its first cell costs
    before_MN = sums_MN - cost_MN
    for i in range(1, len(cost_MN)):
        # a path enters row i at some column from the cheaper of the two cells above, and then goes along the row
        entry_N = sums_MN[i - 1].copy()
        np.minimum(entry_N[1:], sums_MN[i - 1, :-1], out=entry_N[1:])
        entry_N -= before_MN[i]
        sums_MN[i] += np.minimum.accumulate(entry_N)
    return sums_MN


def _only_partners(sums_MN: Array) -> Array:
    """Walk the cheapest path back: the row of each column that has exactly one, -1 for the others, [N]."""
    padded = np.pad(sums_MN, ((1, 0), (1, 0)), constant_values=np.iinfo(sums_MN.dtype).max)
    match, several = np.full(sums_MN.shape[1], -1), np.zeros(sums_MN.shape[1], bool)
    i, j = padded.shape[0] - 1, padded.shape[1] - 1
    while i and j:
        several[j - 1] |= match[j - 1] >= 0
        match[j - 1] = i - 1
        both, teacher, student = padded.item(i - 1, j - 1), padded.item(i - 1, j), padded.item(i, j - 1)
        best = min(both, teacher, student)
        i, j = (i - (both == best or teacher == best), j - (both == best or teacher > best))
    match[several] = -1
    return match

"""MinED (FuseLLM, arXiv 2401.10491): the teacher's logits in the student's vocabulary, where their tokens match.

Tokens are matched in each document by time warping over edit distances, classes by least edit distance. Both compare
token strings without blanks, in bytes; how a token is read as bytes is in `vocabulary`. Where a student position has
one partner and both read the same token there, the student learns the partner's distribution, elsewhere the token that
follows:
    L = sum_n usable_n KL(P_n || Q_n) + (1 - usable_n) (-log Q_n(gold)),    P, Q at temperature tau
The paper adds cross-entropy, half and half: `--loss mined`.

Shape legend: see batch.py; V classes of a vocabulary, D the teacher's width.
"""

import contextlib
import hashlib
import importlib.util
import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from xkd_schemas.console import note, warn
from xkd_schemas.durable_files import canonical, digest
from xkd_schemas.durable_files import replace as replace_file
from xkd_schemas.errors import DiskFailed, UsageError
from xkd_schemas.progress import Progress, tick
from xkd_trainer.data.batch import Batch, gather_rows, unwrap
from xkd_trainer.losses.declaration import Context, Declaration, Loss, Positive, Settings, StudentPass, constant_head
from xkd_trainer.losses.ops.divergence import Comparison
from xkd_trainer.losses.ops.lazy_logits import LazyLogits
from xkd_trainer.losses.ops.shared_pass import head_cross_entropy, head_divergence
from xkd_trainer.losses.ops.term import LossTerm, term
from xkd_trainer.losses.ops.vocabulary import ids_by_bytes, shared_vocabulary, token_bytes

UNMAPPED: Final = -1e5
"""Logit of a student class that no teacher class stands for, as in DSKD's code; its exponential is exactly 0."""

SEARCHED: Final = 512  # classes whose nearest are searched between two ticks
BLOCK_CELLS: Final = 1 << 20  # of the table of a path's sums that are held at a time, 4 MB
LONG_SEARCH: Final = 10**8  # pairs of classes, some seconds of a core: the result is kept for the next run

Array = npt.NDArray[Any]

Tokens = tuple[Mapping[int, bytes], Tensor, Tensor]
"""`read_bare` of a model, ids int64 [B, N] on any device, and which are valid, bool [B, N], valid ones first."""


class MinedSettings(Settings):
    """Options of MinED."""

    temperature: Positive = 2.0
    """tau, for the one-hot positions too. DSKD's code: 2. No tau squared in front, as in that code."""
    vocabulary: Literal["inverse", "nearest", "exact"] = "inverse"
    """Which teacher class stands for a student class; a class without one gets probability 0.

    inverse (DSKD's code): every teacher class goes to its nearest student class by edit distance, and a student class
    takes the first (lowest id) of those that come to it, so no teacher class is used twice. nearest: the student
    class's own nearest teacher class, so every class has one, and one teacher class may stand for hundreds. exact: a
    token of equal text, blanks aside.
    """


def edit_distances(queries: list[bytes], targets: list[bytes], dtype: Any = np.int32, threads: int = 1) -> Array:
    """Levenshtein distances [Q, T] in bytes; `dtype` must hold the longest of all."""
    from rapidfuzz.distance import Levenshtein
    from rapidfuzz.process import cdist

    found: Array = cdist(queries, targets, scorer=Levenshtein.distance, dtype=dtype, workers=threads)
    return found


def read_bare(vocabulary: Mapping[str, int]) -> dict[int, bytes]:
    """The bytes of each id's token without blanks."""
    return {number: text.replace(b" ", b"") for number, text in token_bytes(vocabulary).items()}


def vocabulary_map(source: Mapping[str, int], target: Mapping[str, int], mode: Literal["nearest", "exact"]) -> Tensor:
    """For each id of `source` the id of the target token nearest to it, [V] int64; -1 where there is none.

    First tokens of equal text, then those of equal text without blanks, then, in mode "nearest", the token of least
    edit distance without blanks; ties go to the nearest length, the shorter first, then to the lower id. A word's
    start counts only in the first step. UsageError where no token of one is a token of the other.

    >>> vocabulary_map({"Ġthe": 0, "cats": 1, "Ġ": 2}, {"cat": 5, "▁the": 6, "the": 7, "▁": 8}, "nearest")
    tensor([6, 5, 8])
    """
    found_V = np.full(max(source.values(), default=-1) + 1, -1, np.int64)
    bare, to_bare = read_bare(source), read_bare(target)
    first = ids_by_bytes(target, blanks=False)
    for number, text in bare.items():
        found_V[number] = first.get(text, -1)
    equal_from, equal_to = shared_vocabulary(source, target, "mapped")
    found_V[equal_from.numpy()] = equal_to.numpy()
    if mode == "nearest":
        missing = np.array(sorted(n for n in bare if found_V[n] < 0), np.int64)
        found_V[missing] = _find_nearest([bare[int(n)] for n in missing], to_bare)
    return torch.from_numpy(found_V)


def _find_nearest(queries: list[bytes], targets: Mapping[int, bytes]) -> Array:
    """`_search`; a long one is made once, and kept with its digest in this user's cache folder."""
    if len(queries) * len(targets) < LONG_SEARCH:
        return _search(queries, targets)
    asked = hashlib.sha256(repr((queries, sorted(targets.items()))).encode()).hexdigest()
    path = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "xkd" / f"mined-{asked}.json"
    with contextlib.suppress(OSError, ValueError, TypeError):  # not there, or damaged
        own, ids = json.loads(path.read_bytes())
        if own == digest(ids):
            return np.array(ids, np.int64)
    found = _search(queries, targets)
    try:
        replace_file(path, canonical([digest(found.tolist()), found.tolist()]))
        note(f"mined: the nearest classes are kept in {path}")
    except DiskFailed as error:
        warn(f"mined: the nearest classes are not kept, the next run searches again: {error.what}")
    return found


def _search(queries: list[bytes], targets: Mapping[int, bytes]) -> Array:
    """Ids of the nearest targets, by the distances to all of them; ties as `vocabulary_map` says."""
    found = np.zeros(len(queries), np.int64)
    ids = np.array(sorted(targets), np.int64)
    query_sizes, sizes = (np.array([len(text) for text in texts]) for texts in (queries, [targets[n] for n in ids]))
    dtype, threads = np.min_scalar_type(max([*query_sizes, *sizes])), torch.get_num_threads()
    with Progress("mined: nearest classes", len(queries), of="classes"):
        for size in np.unique(query_sizes):
            # of equal distances argmin takes the first, so the targets stand in the order of the ties
            ranked = ids[np.lexsort((sizes, abs(sizes - size)))]
            texts = [targets[n] for n in ranked]
            same_size = np.nonzero(query_sizes == size)[0]
            for part in np.split(same_size, range(SEARCHED, len(same_size), SEARCHED)):
                distances = edit_distances([queries[k] for k in part], texts, dtype, threads)
                found[part] = ranked[distances.argmin(1)]
                tick(len(part))
    return found


def partners(student: Tokens, teacher: Tokens) -> Tensor:
    """Index (of M) of the teacher token that is the only one time warping puts beside a student token, else -1.

    int64 [B, N]. The path has the least sum of edit distances; on equal sums it steps in both first, then in the
    teacher.

    >>> student, teacher = {0: b"the", 1: b"cats"}, {0: b"the", 1: b"cat", 2: b"s"}
    >>> yes, ids = torch.ones(1, 3) > 0, torch.tensor([[0, 1, 2]])
    >>> partners((student, ids[:, :2], yes[:, :2]), (teacher, ids, yes))
    tensor([[ 0, -1]])
    """
    match = np.full(tuple(student[1].shape), -1, np.int64)
    for row, (own, theirs) in enumerate(zip(_valid_texts(student), _valid_texts(teacher), strict=True)):
        if own and theirs:
            match[row, : len(own)] = _only_partners(own, theirs)
    return torch.from_numpy(match).to(student[1].device)


def _valid_texts(tokens: Tokens) -> list[list[bytes]]:
    texts, ids_BN, valid_BN = tokens
    sizes = valid_BN.sum(-1).tolist()
    return [[texts.get(n, b"") for n in ids[:size]] for ids, size in zip(ids_BN.tolist(), sizes, strict=True)]


def _only_partners(own: list[bytes], theirs: list[bytes]) -> Array:
    """The row (of `theirs`) of each column that has exactly one on the cheapest path, -1 for the others, [N].

    The path's sums are made some rows at a time. Of each block the last row is kept, and the others are made again
    when the path is walked back, so that nothing has the size of both.
    """
    step = max(1, BLOCK_CELLS // len(own))
    blocks = [slice(first, first + step) for first in range(0, len(theirs), step)]
    above_N = np.full(len(own), np.iinfo(np.int32).max, np.int32)
    before, sums_RN = [], np.empty((0, len(own)), np.int32)
    for block in blocks:
        before.append(above_N)
        sums_RN = _path_sums(edit_distances(theirs[block], own), above_N, block.start > 0)
        above_N = sums_RN[-1].copy()  # a view would keep the block
    match, several = np.full(len(own), -1), np.zeros(len(own), bool)
    i, j = len(theirs), len(own)
    for block, above_N in reversed(list(zip(blocks, before, strict=True))):
        if block != blocks[-1]:
            sums_RN = _path_sums(edit_distances(theirs[block], own), above_N, block.start > 0)
        padded = np.pad(np.vstack([above_N, sums_RN]), ((0, 0), (1, 0)), constant_values=np.iinfo(np.int32).max)
        while i > block.start and j:
            several[j - 1] |= match[j - 1] >= 0
            match[j - 1] = i - 1
            row = i - block.start
            both, teacher, student = padded.item(row - 1, j - 1), padded.item(row - 1, j), padded.item(row, j - 1)
            best = min(both, teacher, student)
            i, j = (i - (both == best or teacher == best), j - (both == best or teacher > best))
    match[several] = -1
    return match


def _path_sums(cost_RN: Array, above_N: Array, goes_on: bool) -> Array:
    """Least sums of a path to each cell of some rows; `above` has those of the row before, where it `goes_on`."""
    sums_RN = cost_RN.cumsum(1, dtype=cost_RN.dtype)  # row i: what a path along it from its first cell costs
    before_RN = sums_RN - cost_RN
    for i in range(0 if goes_on else 1, len(cost_RN)):
        # a path enters row i at some column from the cheaper of the two cells above, and then goes along the row
        above_N = sums_RN[i - 1] if i else above_N
        entry_N = above_N.copy()
        np.minimum(entry_N[1:], above_N[:-1], out=entry_N[1:])
        entry_N -= before_RN[i]
        sums_RN[i] += np.minimum.accumulate(entry_N)
    return sums_RN


def invert(to_student_V: Tensor, size: int) -> Tensor:
    """For each of the student's `size` classes the lowest teacher id that maps to it, [size] int64, or -1."""
    known = torch.nonzero(to_student_V >= 0)[:, 0]
    none = len(to_student_V)
    lowest = known.new_full((size,), none).scatter_reduce_(0, to_student_V[known], known, "amin")
    return torch.where(lowest == none, -1, lowest)


def mined_divergence(
    student: LazyLogits, teacher: LazyLogits, target_BN: Tensor, usable_BN: Tensor, valid_BN: Tensor, tau: float
) -> LossTerm:
    """L of the module, summed; the count is the number of predictions.

    The student's states [B, N, .] learn; the partners' states [B, N, D], with a head over the student's classes, are a
    constant. A usable position, where P = (3/4, 1/4) and Q is uniform, and one that only has its gold token: 0.1308 +
    log 2.

    >>> student = LazyLogits(hidden=torch.zeros(1, 2, 1), weight=torch.ones(2, 1))
    >>> teacher = LazyLogits(hidden=torch.ones(1, 2, 1), weight=torch.tensor([[1.0986123], [0.0]]))
    >>> yes, target = torch.tensor([[True, True]]), torch.tensor([[0, 1]])
    >>> mined_divergence(student, teacher, target, torch.tensor([[True, False]]), yes, 1.0)
    LossTerm(total=tensor(0.8240), count=tensor(2.))
    """
    usable_BN, gold_BN = usable_BN & valid_BN, valid_BN & ~usable_BN
    how = Comparison(kind="forward_kl", temperature=tau)
    matched = head_divergence(student.at(usable_BN), teacher.at(usable_BN), None, how)
    bias = None if student.bias is None else student.bias / tau
    softened = replace(student, hidden=student.hidden / tau, bias=bias)
    return term(matched + head_cross_entropy(softened.at(gold_BN), target_BN[gold_BN]), valid_BN.sum())


# -- wiring to the cache


class Mined(Loss):
    """Term `mined`, a mean over the student's predictions, and `matched`, which only shows how many have a partner.

    `matched` has weight 0: the other positions learn their gold token, and how many they are should be seen.
    """

    terms: Mapping[str, float] = {"mined": 1.0, "matched": 0.0}

    def __init__(self, settings: MinedSettings, context: Context) -> None:
        super().__init__()
        if importlib.util.find_spec("rapidfuzz") is None:
            raise UsageError("mined needs rapidfuzz, which is not installed", fix="pip install rapidfuzz")
        self.settings = settings
        student, teacher = context.student_vocab, context.teacher_vocab
        self._student_texts, self._teacher_texts = read_bare(student), read_bare(teacher)
        mode: Literal["nearest", "exact"] = "exact" if settings.vocabulary == "exact" else "nearest"
        to_student_V = vocabulary_map(teacher, student, mode)
        if settings.vocabulary == "inverse":
            to_teacher_V = invert(to_student_V, max(student.values()) + 1)
        else:
            to_teacher_V = vocabulary_map(student, teacher, mode)
        head, size = constant_head(context.teacher_head(), "mined"), context.student_head().weight_VD.shape[0]
        known_V = torch.nonzero(to_teacher_V[:size] >= 0)[:, 0]
        rows_V = to_teacher_V[known_V].to(head.weight_VD.device)
        head_VD = head.weight_VD.new_zeros(size, head.weight_VD.shape[1])
        logit_V = head.weight_VD.new_full((size,), UNMAPPED)
        head_VD[known_V] = head.weight_VD[rows_V]
        logit_V[known_V] = 0.0 if head.bias_V is None else head.bias_V[rows_V]
        self.to_student_V = nn.Buffer(to_student_V, persistent=False)
        self.head_VD, self.logit_V = nn.Buffer(head_VD, persistent=False), nn.Buffer(logit_V, persistent=False)
        """The teacher's head with one row for each of the student's classes, and its bias."""

    def forward(self, batch: Batch, student: StudentPass, step: int) -> Mapping[str, LossTerm]:
        """Align by the tokens that both models read at their predictions, carry over, compare."""
        valid_BN, input_BN = batch.predict_valid_BN, batch.student_ids_BS.gather(1, batch.predict_BN)
        partner_BN = partners(
            (self._student_texts, input_BN, valid_BN),
            (self._teacher_texts, batch.teacher_input_BM, batch.teacher_predict_valid_BM),
        )
        known_BN = partner_BN.clamp_min(0)
        same_BN = self.to_student_V[batch.teacher_input_BM.gather(1, known_BN)] == input_BN
        usable_BN, index_BN = (partner_BN >= 0) & same_BN, batch.teacher_predict_BM.gather(1, known_BN)
        hidden_BND = gather_rows(unwrap(batch.teacher_hidden_BRD), index_BN)
        teacher = LazyLogits(hidden=hidden_BND, weight=self.head_VD, bias=self.logit_V)
        tau = self.settings.temperature
        return {
            "mined": mined_divergence(student.logits, teacher, batch.target_BN, usable_BN, valid_BN, tau),
            "matched": term(usable_BN.sum().float(), valid_BN.sum()),
        }


MINED = Declaration(
    name="mined", source="MinED of FuseLLM, arXiv 2401.10491, as a baseline of DSKD, arXiv 2406.17328",
    settings=MinedSettings, build=Mined, default_weight=0.5, ce_weight=0.5,
)  # fmt: skip

"""Character intervals of a block, those that a normaliser spoilt put right where it can be told how.

Documents whose intervals the library gets right are passed through as they are. Of all others the offsets are taken
through the normaliser, and judged as any are: what then leaves no hole is used, everything else is as it was.

Shape legend for this file
    R documents    G encoded segments    C content tokens
"""

import itertools
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from xkd_schemas.ragged import row_offsets
from xkd_schemas.text.normalizer.offsets import Normalised
from xkd_schemas.text.offsets import EncodedText, content_intervals
from xkd_schemas.text.tokenizers import Encoded
from xkd_schemas.tokens import OK, Bools, Int32s


class Intervals(NamedTuple):
    """Where the tokens of a block stand."""

    spans_C2: Int32s
    """[C, 2] characters of each token's document."""
    statuses: list[str]
    """[R] "ok" or what is wrong with each document's."""
    extended_R: Int32s
    """[R] tokens that have other characters than the library's offsets say."""


def explained(read: EncodedText, ids_C: Int32s, normalised: Normalised) -> Intervals:
    """`content_intervals`, of what was merged, swapped or deleted too.

    Args:
        read: What the tokenizer was given, and its offsets.
        ids_C: The tokens.
        normalised: Of the tokenizer.
    """
    spans_C2, statuses = content_intervals(read)
    found = Intervals(spans_C2, statuses, np.zeros(len(statuses), np.int32))
    if not normalised.changes:
        return found
    bad_R = normalised.doubtful(read.texts) | np.array([status != OK for status in statuses], np.bool_)
    if not bad_R.any():
        return found
    bad_C = np.repeat(bad_R[read.document_G], np.diff(read.first))
    part = _part(read, bad_R, bad_C)
    places = zip(part.document_G.tolist(), part.segments_G2.tolist(), strict=True)
    texts = [part.texts[d][start:end] for d, (start, end) in places]
    offsets_C2 = normalised.offsets(texts, Encoded(ids_C[bad_C], part.offsets_C2, part.first))
    better_C2, better = content_intervals(replace(part, offsets_C2=offsets_C2))
    good_R = bad_R.copy()
    good_R[bad_R] = [status == OK for status in better]
    document_C = np.repeat(read.document_G, np.diff(read.first))
    good_C = good_R[document_C]
    better_C2 = better_C2[good_C[bad_C]]
    other_C = (spans_C2[good_C] != better_C2).any(axis=1)
    found.extended_R[:] = np.bincount(document_C[good_C][other_C], minlength=len(statuses))
    spans_C2[good_C] = better_C2
    return found._replace(statuses=[OK if good else s for good, s in zip(good_R.tolist(), statuses, strict=True)])


def _part(read: EncodedText, wanted_R: Bools, wanted_C: Bools) -> EncodedText:
    """The wanted documents alone."""
    wanted_G = wanted_R[read.document_G]
    return replace(
        read, texts=list(itertools.compress(read.texts, wanted_R.tolist())),
        document_G=(np.cumsum(wanted_R) - 1)[read.document_G[wanted_G]], segments_G2=read.segments_G2[wanted_G],
        offsets_C2=read.offsets_C2[wanted_C], first=row_offsets(np.diff(read.first)[wanted_G]),
    )  # fmt: skip

"""Rows put together from encoded segments and what the template puts round them, for a block of documents at once.

Shape legend for this file
    R documents    G segments that are read    P pieces: three of each segment    T tokens of all rows
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from xkd_schemas.ragged import row_offsets
from xkd_schemas.text.batches import DocumentBatch, Int64s, TokenBatch
from xkd_schemas.text.normalizer import Normalised, explained
from xkd_schemas.text.offsets import EncodedText
from xkd_schemas.text.tokenizers import Encoded
from xkd_schemas.tokens import CONTENT, END, TEMPLATE, Bools, Int32s


@dataclass(frozen=True, kw_only=True, slots=True)
class Frame:
    """What stands round one segment."""

    before: Int32s
    """Ids of the template tokens in front of it."""
    end: int
    """Id of the end token behind it, -1 for a segment that is not a target."""


def assembled(
    block: DocumentBatch,
    num_chars: Int32s,
    encode: Callable[[Sequence[str]], Encoded],
    normalised: Normalised,
    frames: Sequence[Sequence[Frame]],
    start_id: int,
) -> TokenBatch:
    """The rows of the texts up to `num_chars`; `statuses` are the faults of their intervals, or "ok".

    A start token is put in front where nothing else stands before the first target token to predict it from.

    Args:
        block: Documents whose texts, up to `num_chars`, are valid Unicode.
        num_chars: [R] int32
        encode: Ids and offsets of texts.
        normalised: Of the tokenizer that encodes.
        frames: One for each segment of each document.
        start_id: The start token.
    """
    document_G, segment_G = _read_segments(block, num_chars)
    start_G, stop_G = block.segments.values[segment_G].T
    ends_G = np.minimum(stop_G, num_chars[document_G])
    places = zip(document_G.tolist(), start_G.tolist(), ends_G.tolist(), strict=True)
    encoded = encode([block.texts[d][start:end] for d, start, end in places])
    read = EncodedText(
        texts=[text[:n] for text, n in zip(block.texts, num_chars.tolist(), strict=True)], document_G=document_G,
        segments_G2=np.stack([start_G, ends_G], axis=1), offsets_C2=encoded.offsets, first=encoded.first,
    )  # fmt: skip
    intervals = explained(read, encoded.ids, normalised)
    numbers = np.bincount(document_G, minlength=len(block)).tolist()
    framed = [frame for own, n in zip(frames, numbers, strict=True) for frame in own[:n]]
    before = [frame.before for frame in framed]
    end_G = np.array([frame.end for frame in framed], np.int32)
    target_G = block.targets_G[segment_G]
    counts_G3 = np.empty((len(framed), 3), np.int64)
    counts_G3[:, 0] = [len(ids) for ids in before]
    counts_G3[:, 1] = np.diff(encoded.first)
    counts_G3[:, 2] = (end_G >= 0) & (stop_G <= num_chars[document_G])
    for g in _without_start(document_G, counts_G3, target_G):
        before[g] = np.array([start_id], np.int32)
        counts_G3[g, 0] = 1
    counts_P = counts_G3.reshape(-1)
    kinds_T = np.repeat(np.tile(np.array([TEMPLATE, CONTENT, END], np.uint8), len(before)), counts_P)
    has_end_G = counts_G3[:, 2] > 0
    ids_T = np.empty(len(kinds_T), np.int32)
    ids_T[kinds_T == TEMPLATE] = np.concatenate([np.zeros(0, np.int32), *before])
    ids_T[kinds_T == CONTENT] = encoded.ids
    ids_T[kinds_T == END] = end_G[has_end_G]
    spans_T2 = np.full((len(kinds_T), 2), -1, np.int32)
    spans_T2[kinds_T == CONTENT] = intervals.spans_C2
    spans_T2[kinds_T == END] = stop_G[has_end_G, None]
    targets_P = np.stack([np.zeros_like(target_G), target_G, target_G], axis=1).reshape(-1)
    return TokenBatch(
        statuses=intervals.statuses, extended=intervals.extended_R, num_chars=num_chars, ids=ids_T, spans=spans_T2,
        first=row_offsets(_sums(counts_G3.sum(axis=1), document_G, len(block))), kinds=kinds_T,
        targets=np.repeat(targets_P, counts_P),
    )  # fmt: skip


def _read_segments(block: DocumentBatch, num_chars: Int32s) -> tuple[Int64s, Int64s]:
    """The segments that begin before their document's cut: (document [G], segment of the block [G])."""
    document = np.repeat(np.arange(len(block)), block.segments.counts)
    segment_G = np.flatnonzero(block.segments.values[:, 0] < num_chars[document])
    return document[segment_G], segment_G


def _sums(values_G: Int64s, document_G: Int64s, size: int) -> Int64s:
    """Sum over the segments of each document [R]."""
    return np.bincount(document_G, weights=values_G, minlength=size).astype(np.int64)


def _without_start(document_G: Int64s, counts_G3: Int64s, target_G: Bools) -> list[int]:
    """The first segment of each document whose first token, of whichever segment, is a target."""
    first_G = np.flatnonzero(np.diff(document_G, prepend=-1) > 0)
    filled = np.flatnonzero(counts_G3.sum(axis=1))
    at = np.searchsorted(filled, first_G)  # the first segment with tokens, of this document or of a later one
    first_G, at = first_G[at < len(filled)], at[at < len(filled)]
    begun = filled[at]
    alone = (document_G[begun] == document_G[first_G]) & (counts_G3[begun, 0] == 0) & target_G[begun]
    found: list[int] = first_G[alone].tolist()
    return found

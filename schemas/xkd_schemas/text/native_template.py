"""The tokens of a chat template's renderings, and which characters of the documents they have.

A rendering is encoded as a whole, as `apply_chat_template` does it, so the ids are the model's own, also where a token
goes over the border of a content. What stands between two added tokens is a stretch of its own, since there the
tokenizer starts anew. A token is CONTENT where it has a character of the document that is not blank, or nothing but
characters of the document; its interval is theirs, and ends where the segment of its first one does.

Shape legend for this file
    R documents    G stretches    C tokens of all documents    L characters of all renderings
"""

import dataclasses
import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from xkd_schemas.ragged import row_offsets
from xkd_schemas.text.batches import DocumentBatch, Int64s, TokenBatch
from xkd_schemas.text.normalizer import Normalised, repair_intervals
from xkd_schemas.text.offsets import EncodedText, blanks
from xkd_schemas.text.rendering import Rendered, Turn
from xkd_schemas.text.tokenizers import Encoded, FastTokenizer, encode_with, set_plain
from xkd_schemas.tokens import CONTENT, END, OK, TEMPLATE, Bools, Int32s, Tokens

NOTHING: Rendered = Rendered("", np.zeros(0, np.int32), ())
"""Of a document that is not rendered."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reader:
    """What is asked of a tokenizer to read renderings."""

    tokenizer: FastTokenizer
    normalised: Normalised
    added: Int64s
    """Ids of added tokens."""
    enders: Collection[int]
    """Ids of special tokens that may end a turn."""
    usual: Collection[int]
    """Those of them that end a turn of text."""
    eos: int


class _Own(NamedTuple):
    """What of the documents each token has."""

    content_C: Bools
    spans_C2: Int32s
    targets_C: Bools


def read_renderings(block: DocumentBatch, rendered: Sequence[Rendered], reader: Reader) -> TokenBatch:
    """The documents' whole rows; `statuses` are the faults of their intervals, or "ok".

    A row ends behind its last token of the text, or behind the end token of that turn: the one that the template
    puts there, else the tokenizer's own.
    """
    backend = set_plain(reader.tokenizer.backend_tokenizer, specials=True)
    encoded = encode_with(backend, [r.text for r in rendered])
    read = _stretches([r.text for r in rendered], encoded, reader.added)
    found = repair_intervals(read, encoded.ids, reader.normalised)
    own = _own(block, rendered, encoded.first, found.spans_C2)
    backward_C = own.content_C[1:] & own.content_C[:-1] & (np.diff(own.spans_C2, axis=0) < 0).any(axis=1)
    bad_R = np.diff(row_offsets(np.append(backward_C, False))[encoded.first]) > 0
    statuses = ["offsets_not_monotone" if b and s == OK else s for b, s in zip(bad_R, found.statuses, strict=True)]
    rows = [
        _row(block, rendered, n, _Row(
            ids=encoded.ids[start:end], places=found.spans_C2[start:end],
            kinds=np.where(own.content_C[start:end], CONTENT, TEMPLATE).astype(np.uint8),
            spans=own.spans_C2[start:end], targets=own.targets_C[start:end],
        ), reader)
        for n, (start, end) in enumerate(itertools.pairwise(encoded.first.tolist()))
    ]  # fmt: skip
    return TokenBatch.of(
        dataclasses.replace(row, status=status, extended=extended)
        for row, status, extended in zip(rows, statuses, found.extended_R.tolist(), strict=True)
    )


def _stretches(texts: Sequence[str], encoded: Encoded, added: Int64s) -> EncodedText:
    """The renderings, cut before and behind every added token."""
    added_C = np.isin(encoded.ids, added)
    filled_R = np.diff(encoded.first) > 0
    starts_C = np.zeros(len(added_C), np.bool_)  # of a document
    starts_C[encoded.first[:-1][filled_R]] = True
    begins_C = starts_C | added_C  # tokens that begin a stretch
    begins_C[1:] |= added_C[:-1]
    first_G = np.flatnonzero(begins_C)
    document_G = np.searchsorted(encoded.first, first_G, side="right") - 1
    low_G = encoded.offsets[first_G, 0].copy()  # where each stretch begins in its rendering
    loose_G = ~added_C[first_G]  # blanks in front of such a stretch may be in no token's offsets
    low_G[loose_G] = np.where(starts_C[first_G], 0, encoded.offsets[first_G - 1, 1])[loose_G]
    high_G = np.append(low_G[1:], np.int32(0))[: len(low_G)]  # where it ends: at the next one, or with its rendering
    last_G = np.append(starts_C[first_G][1:], True)[: len(first_G)]
    high_G[last_G] = np.array([len(text) for text in texts], np.int32)[document_G[last_G]]
    behind_G = np.append(first_G, len(encoded.ids))
    return EncodedText(
        texts=texts, document_G=document_G, segments_G2=np.stack([low_G, high_G], axis=1),
        offsets_C2=(encoded.offsets - np.repeat(low_G, np.diff(behind_G))[:, None]).astype(np.int32), first=behind_G,
    )  # fmt: skip


def _own(block: DocumentBatch, rendered: Sequence[Rendered], first: Int64s, places_C2: Int32s) -> _Own:
    """Of each token the characters of its document."""
    line = " ".join([*(r.text for r in rendered), ""])
    base_R = row_offsets([len(r.text) + 1 for r in rendered])
    chars_R = row_offsets([len(text) for text in block.texts])
    source_L = np.full(len(line), -1, np.int64)  # of all renderings, the character of all documents that each one is
    for at, chars, one in zip(base_R.tolist(), chars_R.tolist(), rendered, strict=False):
        part = source_L[at : at + len(one.source_L)]
        part[:] = np.where(one.source_L < 0, -1, one.source_L + chars)
    own_L, blank_L = source_L >= 0, blanks(line)
    core_L = own_L & ~blank_L
    own_at, core_at = np.flatnonzero(own_L), np.flatnonzero(core_L)
    # characters in front of each place: of documents, not blank ones of documents, not blank ones of templates
    num_own, num_core, num_other = row_offsets(own_L), row_offsets(core_L), row_offsets(~own_L & ~blank_L)
    document_C = np.repeat(np.arange(len(rendered)), np.diff(first))
    start_C, end_C = (places_C2 + base_R[document_C][:, None]).T
    has_core_C, has_own_C = num_core[end_C] > num_core[start_C], num_own[end_C] > num_own[start_C]
    alone_C = has_own_C & (num_other[end_C] == num_other[start_C])
    before_C = (start_C == end_C) & np.append(own_L, False)[start_C]
    content_C = has_core_C | alone_C | before_C
    spans_C2 = np.full((len(document_C), 2), -1, np.int32)
    targets_C = np.zeros(len(document_C), np.bool_)
    at = np.flatnonzero(content_C)
    if len(at):
        from_at = np.where(
            has_core_C[at], np.append(core_at, 0)[num_core[start_C[at]]], np.append(own_at, 0)[num_own[start_C[at]]]
        )
        low = source_L[from_at]  # the first character that is the document's
        high = np.where(before_C[at], low, source_L[own_at[num_own[end_C[at]] - 1]] + 1)
        ends_G = block.segments.values[:, 1] + np.repeat(chars_R[:-1], block.segments.counts)
        segment = np.searchsorted(ends_G, low, side="right")
        high = np.minimum(high, ends_G[segment])  # no token goes over the end of its first segment
        spans_C2[at] = np.stack([low, high], axis=1) - chars_R[document_C[at]][:, None]
        targets_C[at] = block.targets_G[segment]
    return _Own(content_C, spans_C2, targets_C)


class _Row(NamedTuple):
    """The tokens of one document, and where they stand in its rendering."""

    ids: Int32s
    places: Int32s
    kinds: Any
    spans: Int32s
    targets: Bools


def _row(block: DocumentBatch, rendered: Sequence[Rendered], number: int, row: _Row, reader: Reader) -> Tokens:
    """The row with its end tokens and what else a model writes itself marked, cut behind the last of these."""
    text = rendered[number].text
    closed = True
    for turn in rendered[number].turns:
        closed = _close(row, text, turn, reader)
    used = np.flatnonzero((row.kinds != TEMPLATE) | row.targets)
    size = int(used[-1]) + 1 if len(used) else 0
    num_chars = len(block.texts[number])
    ids, spans, kinds, targets = row.ids[:size], row.spans[:size], row.kinds[:size], row.targets[:size]
    if size and targets[-1] and not closed:
        ids = np.append(ids, np.int32(reader.eos))
        spans = np.append(spans, np.full((1, 2), rendered[number].turns[-1].char, np.int32), axis=0)
        kinds, targets = np.append(kinds, np.uint8(END)), np.append(targets, True)
    if size and targets[0]:
        targets = targets.copy()
        targets[0] = False  # nothing stands before it
    return Tokens(
        status=OK, num_chars=num_chars, ids=ids.astype(np.int32), spans=spans, kinds=kinds, targets=targets
    )  # fmt: skip


def _close(row: _Row, text: str, turn: Turn, reader: Reader) -> bool:
    """Mark what a model writes round and between the segments of its turn, and the end token; is there one?"""
    first, behind = np.searchsorted(row.places[:, 0], [turn.start, turn.end]).tolist()
    inside = slice(first, behind)
    row.targets[inside] |= (row.kinds[inside] == TEMPLATE) & (row.places[inside, 1] <= turn.end)
    size = int(np.append(row.kinds[behind:], CONTENT).argmax())  # CONTENT is 1, TEMPLATE 0; no END is there yet
    ids = row.ids[behind : behind + size].tolist()
    found = next((n for n, i in enumerate(ids) if turn.closes and i in reader.usual), None)
    if found is None:
        found = next((n for n, i in enumerate(ids) if i in reader.enders), None)
    if found is None:
        return False
    end = behind + found
    if not turn.closes and text[turn.end : int(row.places[end, 0])].strip():
        return False
    row.kinds[end], row.spans[end], row.targets[behind : end + 1] = END, turn.char, turn.closes
    row.targets[end] = True
    return True


def cut_row(text: str, row: Tokens, num_chars: int) -> Tokens:
    """The row's tokens up to a character of the text; a token that goes on behind it in blanks ends there."""
    inside = row.kinds != TEMPLATE
    late = inside & (row.spans[:, 1] > num_chars)
    size = len(row.ids)
    spans = row.spans.copy()
    for at in np.flatnonzero(late).tolist():
        start, end = spans[at].tolist()
        if start >= num_chars or text[num_chars:end].strip():
            size = at
            break
        spans[at, 1] = num_chars
    used = np.flatnonzero(inside[:size])
    size = int(used[-1]) + 1 if len(used) else 0
    return dataclasses.replace(
        row, num_chars=num_chars, ids=row.ids[:size], spans=spans[:size], kinds=row.kinds[:size],
        targets=row.targets[:size],
    )  # fmt: skip

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
from typing import Any

import numpy as np

from xkd_schemas.documents import DocumentBatch
from xkd_schemas.ragged import row_offsets
from xkd_schemas.text.normalizer import Normalised, repair_intervals
from xkd_schemas.text.rendering import Rendered, Turn
from xkd_schemas.text.tokenizers import Encoded, EncodedText, blanks, encode_with, set_plain
from xkd_schemas.tokens import CONTENT, END, OK, TEMPLATE, Bools, Int32s, Int64s, TokenBatch, Tokens

NOTHING: Rendered = Rendered("", np.zeros(0, np.int32), ())  # of a document that is not rendered


@dataclass(frozen=True, kw_only=True, slots=True)
class Reader:
    """What is asked of a tokenizer to read renderings."""

    tokenizer: Any
    normalised: Normalised
    added: Int64s  # ids of added tokens
    enders: Collection[int]  # ids of special tokens that may end a turn
    usual: Collection[int]  # those of them that end a turn of text
    eos: int


def read_renderings(block: DocumentBatch, rendered: Sequence[Rendered], reader: Reader) -> TokenBatch:
    """The documents' whole rows; `statuses` are the faults of their intervals, or "ok".

    A row ends behind its last token of the text, or behind the end token of that turn: the one that the template
    puts there, else the tokenizer's own.
    """
    backend = set_plain(reader.tokenizer.backend_tokenizer, specials=True)
    encoded = encode_with(backend, [r.text for r in rendered])
    places_C2, statuses, extended_R = repair_intervals(
        _stretches([r.text for r in rendered], encoded, reader.added), reader.normalised
    )
    content_C, spans_C2, targets_C = _own(block, rendered, encoded.first, places_C2)
    kinds_C = np.where(content_C, CONTENT, TEMPLATE).astype(np.uint8)
    backward_C = content_C[1:] & content_C[:-1] & (np.diff(spans_C2, axis=0) < 0).any(axis=1)
    bad_R = np.diff(row_offsets(np.append(backward_C, False))[encoded.first]) > 0
    rows = TokenBatch(
        statuses=["offsets_not_monotone" if b and s == OK else s for b, s in zip(bad_R, statuses, strict=True)],
        num_chars=np.array([len(text) for text in block.texts], np.int32), first=encoded.first, ids=encoded.ids,
        spans=spans_C2, kinds=kinds_C, targets=targets_C, extended=extended_R,
    )  # fmt: skip
    places = (places_C2[start:end] for start, end in itertools.pairwise(encoded.first.tolist()))
    return TokenBatch.of(_finish(*one, reader) for one in zip(rows, places, rendered, strict=True))


def _stretches(texts: Sequence[str], encoded: Encoded, added: Int64s) -> EncodedText:
    document_C = np.repeat(np.arange(len(texts)), np.diff(encoded.first))
    added_C, starts_C = np.isin(encoded.ids, added), np.diff(document_C, prepend=-1) > 0
    first_G = np.flatnonzero(starts_C | added_C | np.append(False, added_C)[:-1])  # tokens that begin a stretch
    document_G = document_C[first_G]
    # where each begins: blanks in front of one without an added token may be in no token's offsets
    before_C = np.where(starts_C, 0, np.append(0, encoded.offsets[:, 1])[:-1])
    low_G = np.where(added_C, encoded.offsets[:, 0], before_C)[first_G].astype(np.int32)
    high_G = np.append(low_G, np.int32(0))[1:]  # where it ends: at the next one, or with its rendering
    last_G = np.diff(document_G, append=-1) != 0
    high_G[last_G] = [len(texts[n]) for n in document_G[last_G]]
    behind_G = np.append(first_G, len(encoded.ids))
    return EncodedText(
        texts=texts, document_G=document_G, segments_G2=np.stack([low_G, high_G], axis=1),
        encoded=Encoded(encoded.ids, encoded.offsets - np.repeat(low_G, np.diff(behind_G))[:, None], behind_G),
    )  # fmt: skip


def _own(
    block: DocumentBatch, rendered: Sequence[Rendered], first: Int64s, places_C2: Int32s
) -> tuple[Bools, Int32s, Bools]:
    """Of tokens at these places whether they are the document's, [C], characters there, [C, 2], and targets, [C]."""
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
    return content_C, spans_C2, targets_C


def _finish(row: Tokens, places_T2: Int32s, rendered: Rendered, reader: Reader) -> Tokens:
    """The row with its end tokens and what else a model writes itself marked, cut behind the last of these."""
    closed = True
    for turn in rendered.turns:
        closed = _close(row, places_T2, rendered.text, turn, reader)
    row = _until(row, (row.kinds != TEMPLATE) | row.targets)
    if len(row.ids) and row.targets[-1] and not closed:
        row = dataclasses.replace(
            row, ids=np.append(row.ids, np.int32(reader.eos)), kinds=np.append(row.kinds, np.uint8(END)),
            spans=np.append(row.spans, np.full((1, 2), rendered.turns[-1].char, np.int32), axis=0),
            targets=np.append(row.targets, True),
        )  # fmt: skip
    row.targets[:1] = False  # nothing stands before it
    return row


def _until(row: Tokens, marked_T: Bools) -> Tokens:
    size = int(np.flatnonzero(marked_T)[-1]) + 1 if marked_T.any() else 0
    return dataclasses.replace(
        row, ids=row.ids[:size], spans=row.spans[:size], kinds=row.kinds[:size], targets=row.targets[:size]
    )


def _close(row: Tokens, places_T2: Int32s, text: str, turn: Turn, reader: Reader) -> bool:
    """Mark what a model writes round and between the segments of its turn, and the end token; is there one?"""
    first, behind = np.searchsorted(places_T2[:, 0], [turn.start, turn.end]).tolist()
    inside = slice(first, behind)
    row.targets[inside] |= (row.kinds[inside] == TEMPLATE) & (places_T2[inside, 1] <= turn.end)
    size = int(np.append(row.kinds[behind:], CONTENT).argmax())  # CONTENT is 1, TEMPLATE 0; no END is there yet
    ids = row.ids[behind : behind + size].tolist()
    usual = reader.usual if turn.closes else ()
    found = [n for n, i in enumerate(ids) if i in usual] or [n for n, i in enumerate(ids) if i in reader.enders]
    if not found:
        return False
    end = behind + found[0]
    if not turn.closes and text[turn.end : int(places_T2[end, 0])].strip():
        return False
    row.kinds[end], row.spans[end], row.targets[behind : end + 1] = END, turn.char, turn.closes
    row.targets[end] = True
    return True


def cut_row(text: str, row: Tokens, num_chars: int) -> Tokens:
    """The row's tokens up to a character of the text; a token that goes on behind it in blanks ends there."""
    inside_T = row.kinds != TEMPLATE
    spans = row.spans.copy()
    for at in np.flatnonzero(inside_T & (row.spans[:, 1] > num_chars)).tolist():
        start, end = spans[at].tolist()
        if start >= num_chars or text[num_chars:end].strip():
            inside_T[at:] = False
            break
        spans[at, 1] = num_chars
    return _until(dataclasses.replace(row, num_chars=num_chars, spans=spans), inside_T)

"""What a model sees around the text: the glue of a template before, between and behind a document's segments.

A template is per model; its text is outside the canonical text and has no interval. A layout is a function from a
document's roles to pieces: glue, or one segment. It never sees the text of a segment.

    none     nothing but the segments
    alpaca   the prompt of Stanford Alpaca, as MiniLLM and DSKD (arXiv 2406.17328) train with
    chat     the tokenizer's own chat template, which sees the row's messages and is no layout (rendering.py)
    auto     chat where the tokenizer has one, none elsewhere

Shape legend for this file
    R documents    G segments that are read    P pieces: three of each segment    T tokens of all rows
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np

from xkd_schemas.documents import Document, DocumentBatch
from xkd_schemas.errors import UsageError
from xkd_schemas.ragged import row_offsets
from xkd_schemas.text.normalizer import Normalised, repair_intervals
from xkd_schemas.text.tokenizers import EncodedText, encode_texts
from xkd_schemas.tokens import CONTENT, END, TEMPLATE, Int32s, TokenBatch

ALPACA: Final = (
    "Below is an instruction that describes a task{}. Write a response that appropriately completes the request."
    "\n\n### Instruction:\n"
)
ALPACA_INPUT_TOO: Final = ", paired with an input that provides further context"
ALPACA_INPUT: Final = "\n\n### Input:\n"
ALPACA_RESPONSE: Final = "\n\n### Response:\n"

CHAT: Final = "chat"
AUTO: Final = "auto"

Layout = tuple[str | int, ...]  # glue, special tokens written out ("<|im_end|>"), and indices of the segments


def check_template(name: str) -> None:
    """Raise UsageError that lists the known templates where it is none of them."""
    if name not in TEMPLATES:
        known = ", ".join((AUTO, *TEMPLATES))
        raise UsageError(f"template {name!r} is not known", fix=f"--template with one of {known}")


def chosen_template(name: str, tokenizer: Any) -> str:
    """The template that a name stands for with this tokenizer."""
    return name if name != AUTO else CHAT if tokenizer.chat_template else "none"


def _alpaca(document: Document) -> Layout:
    roles = tuple(segment.role for segment in document.segments)
    asked, answered = (roles[:-1], True) if roles[-1:] == ("response",) else (roles, False)
    if asked not in {(), ("prompt",), ("instruction",), ("instruction", "input"), ("input",)}:
        refuse_text(document, "alpaca")
        raise UsageError(
            f"{where(document)}: the alpaca template takes instruction, input and response, found {', '.join(roles)}",
            fix="--template chat or --template none",
        )
    pieces: list[str | int] = [ALPACA.format(ALPACA_INPUT_TOO if "input" in asked else "")]
    for index, role in enumerate(asked):
        if role == "input":
            pieces.append(ALPACA_INPUT)
        pieces.append(index)
    return (*pieces, ALPACA_RESPONSE, len(asked)) if answered else (*pieces, ALPACA_RESPONSE)


def refuse_text(document: Document, template: str) -> None:
    """Raise UsageError where the document has no turns."""
    if any(segment.role == "text" for segment in document.segments):
        raise UsageError(
            f"{where(document)}: plain text has no turns, the {template} template does not apply",
            fix="--template none",
        )


def where(document: Document) -> str:
    """The row of a document, for messages."""
    return f"{document.source}:{document.line}"


LAYOUTS: Final[Mapping[str, Callable[[Document], Layout]]] = {
    "none": lambda document: tuple(range(len(document.segments))),
    "alpaca": _alpaca,
}
"""The pieces of a document, by its roles alone: each segment once, in order; UsageError where there is no place."""
TEMPLATES: Final = (*LAYOUTS, CHAT)  # by the name that `--template` takes


class Frame(NamedTuple):
    """What stands round one segment."""

    before: Int32s  # ids of the template tokens in front of it
    end: int  # id of the end token behind it, -1 for a segment that is not a target


def assemble_rows(
    block: DocumentBatch, num_chars: Int32s, tokenizer: Any, normalised: Normalised, frames: Sequence[Sequence[Frame]]
) -> TokenBatch:
    """The rows of the texts up to `num_chars` [R]; `statuses` are the faults of their intervals, or "ok".

    A start token, or an end token where there is none, is put in front where nothing else stands before the first
    target token to predict it from. The texts up to there must be valid Unicode. `frames` has one for each segment of
    each document.
    """
    document_G = np.repeat(np.arange(len(block)), block.segments.counts)
    segment_G = np.flatnonzero(block.segments.values[:, 0] < num_chars[document_G])  # those that begin before the cut
    document_G = document_G[segment_G]
    start_G, stop_G = block.segments.values[segment_G].T
    ends_G = np.minimum(stop_G, num_chars[document_G])
    places = zip(document_G.tolist(), start_G.tolist(), ends_G.tolist(), strict=True)
    encoded = encode_texts(tokenizer, [block.texts[d][start:end] for d, start, end in places])
    read = EncodedText(
        texts=[text[:n] for text, n in zip(block.texts, num_chars.tolist(), strict=True)], document_G=document_G,
        segments_G2=np.stack([start_G, ends_G], axis=1), encoded=encoded,
    )  # fmt: skip
    intervals = repair_intervals(read, normalised)
    numbers = np.bincount(document_G, minlength=len(block)).tolist()
    framed = [frame for own, n in zip(frames, numbers, strict=True) for frame in own[:n]]
    end_G = np.array([frame.end for frame in framed], np.int32)
    target_G = block.targets_G[segment_G]
    has_end_G = (end_G >= 0) & (stop_G <= num_chars[document_G])  # none behind a segment that is cut
    counts_G3 = np.empty((len(framed), 3), np.int64)  # tokens of each piece: template, content, end
    counts_G3.T[:] = [len(frame.before) for frame in framed], np.diff(encoded.first), has_end_G
    counts_P = counts_G3.reshape(-1)  # pieces in the order in which they are read
    kinds_T = np.repeat(np.tile(np.array([TEMPLATE, CONTENT, END], np.uint8), len(framed)), counts_P)
    ids_T = np.empty(len(kinds_T), np.int32)  # each kind is filled in its own order
    ids_T[kinds_T == TEMPLATE] = np.concatenate([np.zeros(0, np.int32), *(frame.before for frame in framed)])
    ids_T[kinds_T == CONTENT] = encoded.ids
    ids_T[kinds_T == END] = end_G[has_end_G]
    spans_T2 = np.full((len(kinds_T), 2), -1, np.int32)  # template tokens keep (-1, -1)
    spans_T2[kinds_T == CONTENT] = intervals.spans_C2
    spans_T2[kinds_T == END] = stop_G[has_end_G, None]
    targets_T = np.repeat(np.stack([np.zeros_like(target_G), target_G, target_G], axis=1).reshape(-1), counts_P)
    counts_R = np.bincount(document_G, weights=counts_G3.sum(axis=1), minlength=len(block)).astype(np.int64)
    first = row_offsets(counts_R)
    at = first[:-1][counts_R > 0]
    at = at[targets_T[at]]  # rows that begin with a target get a start token
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    return TokenBatch(
        statuses=intervals.statuses, extended=intervals.extended_R, num_chars=num_chars,
        first=first + np.searchsorted(at, first), ids=np.insert(ids_T, at, start),
        spans=np.insert(spans_T2, at, -1, axis=0), kinds=np.insert(kinds_T, at, TEMPLATE),
        targets=np.insert(targets_T, at, False),
    )  # fmt: skip

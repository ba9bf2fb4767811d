"""One document as one model reads it: token ids, character intervals, kinds and targets, cut to the model's length.

Segments are encoded one by one, so segment borders are token borders in every model; so is the template's glue. An
interval leaves out the blanks glued to a token's front ("Ġw", "▁w"); a token of blanks only keeps them. Pieces of one
character share its interval, and so does a lone "▁" that a tokenizer puts before a first character.

What a tokenizer does to a text may be beyond repair (a normaliser that drops characters, offsets that go back). Such
a document gets no tokens and a reason from REASONS; it is never half used and never raises.

Shape legend for this file
    T tokens of the row
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from xkd_schemas.documents import Document
from xkd_schemas.errors import UsageError
from xkd_schemas.intervals import Encoding, content_intervals, cut_point
from xkd_schemas.rows import WORKER_KILLED
from xkd_schemas.templates import Layout, layout, template_named
from xkd_schemas.tokenizers import encode_texts, identity, name_of
from xkd_schemas.tokens import CONTENT, END, OK, TEMPLATE, Int32s, Tokens

REASONS: Final = {
    "lone_surrogate": "the text holds half of a surrogate pair, which no tokenizer takes",
    "outside_text": "a token's interval leaves its segment or is turned round",
    "offsets_not_monotone": "a token starts or ends before the one in front of it",
    "uncovered_characters": "the tokenizer drops characters that are not blank",
    "no_target": "no segment of the document is a target, or the targets give no token",
    WORKER_KILLED: "a process that worked on the document died, every time",
    "no_target_after_cut": "cut to the longest length, the text has no target left",
}
"""Every `status` but "ok", with what it means."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Frame:
    """What stands round one segment."""

    before: Int32s
    """Ids of the template tokens in front of it."""
    end: int
    """Id of the end token behind it, -1 for a segment that is not a target."""


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """Documents in, Tokens out, for one tokenizer, template and length.

    Raises:
        UsageError: Unknown template, a slow tokenizer, no end token, or max_tokens < 2.
    """

    tokenizer: Any
    """A transformers fast tokenizer."""
    template: str
    """none, alpaca or chat."""
    max_tokens: int
    """Longest T, template and end tokens included."""
    _frames: dict[tuple[tuple[str, bool], ...], tuple[Frame, ...]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        template_named(self.template)
        encode_texts(self.tokenizer, [""])
        if self.max_tokens < 2:
            raise UsageError(f"max_tokens is {self.max_tokens}, at least 2 are needed", next="--max-tokens 1024")
        if self.tokenizer.eos_token_id is None:
            raise UsageError(
                f"{name_of(self.tokenizer)}: this tokenizer has no end token (eos)",
                next="name eos_token in its config",
            )

    def identity(self) -> dict[str, Any]:
        """What the tokens depend on, for a plan: the tokenizer's identity, the template's name, the length."""
        return {"tokenizer": identity(self.tokenizer), "template": self.template, "max_tokens": self.max_tokens}

    def encode(self, document: Document, num_chars: int | None = None) -> Tokens:
        """Tokens of the text up to `num_chars` characters, or of the whole text.

        The tokens are a function of the document and of the returned `num_chars` alone: encoding the document again
        up to that character gives the same row.

        Args:
            document: Segments must cover the text.
            num_chars: Where the other model cut the text. A target that goes on behind it has no end token.

        Raises:
            UsageError: The template has no place for the document's roles.
        """
        return self.encode_batch([document], None if num_chars is None else [num_chars])[0]

    def encode_batch(self, documents: Sequence[Document], limits: Sequence[int | None] | None = None) -> list[Tokens]:
        """`encode` of many documents with one call of the tokenizer; `limits` are their `num_chars`."""
        wanted = [len(document.text) for document in documents]
        if limits is not None:
            wanted = [n if limit is None else min(n, limit) for n, limit in zip(wanted, limits, strict=True)]
        usable = [_is_unicode(document.text) for document in documents]
        encoded = iter(self._segments(documents, [n if ok else 0 for n, ok in zip(wanted, usable, strict=True)]))
        rows = []
        for document, num_chars, ok in zip(documents, wanted, usable, strict=True):
            encodings = list(itertools.islice(encoded, _num_segments(document, num_chars) if ok else 0))
            rows.append(self._row(document, num_chars, encodings) if ok else unusable("lone_surrogate", num_chars))
        return rows

    def _segments(self, documents: Sequence[Document], limits: Sequence[int]) -> list[Encoding]:
        """Ids and offsets of all segments of all documents, each read up to its document's limit."""
        texts = [
            document.text[segment.start : min(segment.end, limit)]
            for document, limit in zip(documents, limits, strict=True)
            for segment in document.segments[: _num_segments(document, limit)]
        ]
        return encode_texts(self.tokenizer, texts)

    def _row(self, document: Document, num_chars: int, encodings: Sequence[Encoding]) -> Tokens:
        """Put the row together; while it is too long, cut the text and encode it again."""
        frames = self._framed(document)
        start = self._start_id()
        first_target = min((s.start for s in document.segments if s.target), default=len(document.text))
        tokens = _assemble(document, num_chars, encodings, frames, start)
        while len(tokens.ids) > self.max_tokens:
            num_chars = cut_point(document.text, tokens, self.max_tokens)
            if num_chars <= first_target:
                break
            tokens = _assemble(document, num_chars, self._segments([document], [num_chars]), frames, start)
        if tokens.status != OK:
            return unusable(tokens.status, num_chars)
        if num_chars <= first_target or not tokens.targets.any():
            return unusable("no_target_after_cut" if num_chars < len(document.text) else "no_target", num_chars)
        return tokens

    def _framed(self, document: Document) -> tuple[Frame, ...]:
        """The frame of every segment; the same for all documents with the same roles."""
        key = tuple((segment.role, segment.target) for segment in document.segments)
        if key not in self._frames:
            self._frames[key] = self._new_frames(document, layout(self.template, document, self.tokenizer))
        return self._frames[key]

    def _new_frames(self, document: Document, pieces: Layout) -> tuple[Frame, ...]:
        """Glue behind a target gives its first token, if it can end a turn, as the end token; else that is eos."""
        frames: list[Frame] = []
        before = self._start()
        for piece in pieces:
            if piece.segment < 0:
                ids = self._glue(piece.glue)
                if frames and frames[-1].end >= 0 and ids and ids[0] in self._enders():
                    frames[-1] = Frame(before=frames[-1].before, end=ids.pop(0))
                before += ids
                continue
            target = document.segments[piece.segment].target
            end = int(self.tokenizer.eos_token_id) if target else -1
            frames.append(Frame(before=np.array(before, dtype=np.int32), end=end))
            before = []
        return tuple(frames)

    def _start(self) -> list[int]:
        """The start token that the tokenizer puts before every text by itself; a chat template brings its own."""
        bos = self.tokenizer.bos_token_id
        by_itself = self.tokenizer("x", verbose=False)["input_ids"]
        return [int(bos)] if self.template != "chat" and bos is not None and by_itself[:1] == [bos] else []

    def _start_id(self) -> int:
        """What the first target token is predicted from where nothing else stands before it."""
        bos = self.tokenizer.bos_token_id
        return int(self.tokenizer.eos_token_id if bos is None else bos)

    def _enders(self) -> set[int]:
        """Special tokens that may end a turn: all but the start and the unknown token."""
        added = {int(i) for i, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        no_end = {self.tokenizer.bos_token_id, self.tokenizer.unk_token_id} - {self.tokenizer.eos_token_id}
        return (added | {int(i) for i in self.tokenizer.all_special_ids}) - no_end

    def _glue(self, text: str) -> list[int]:
        encoded = self.tokenizer(text, add_special_tokens=False, padding=False, truncation=False, verbose=False)
        return [int(token_id) for token_id in encoded["input_ids"]]


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _num_segments(document: Document, num_chars: int) -> int:
    """Segments that begin before that character: a prefix."""
    return sum(segment.start < num_chars for segment in document.segments)


def unusable(status: str, num_chars: int) -> Tokens:
    """A row without tokens; `status` says why."""
    return Tokens(
        status=status, num_chars=num_chars, ids=np.zeros(0, np.int32), spans=np.zeros((0, 2), np.int32),
        kinds=np.zeros(0, np.uint8), targets=np.zeros(0, np.bool_),
    )  # fmt: skip


def _assemble(
    document: Document, num_chars: int, encodings: Sequence[Encoding], frames: Sequence[Frame], start_id: int
) -> Tokens:
    """The row of the text up to `num_chars`; `status` is the fault of its intervals, if there is one.

    A start token is put in front where nothing else stands before the first target token to predict it from.
    """
    ids, counts, kinds, targets, ends = [np.zeros(0, np.int32)], [0], [TEMPLATE], [False], []
    for segment, frame, encoding in zip(document.segments, frames, encodings, strict=False):
        has_end = frame.end >= 0 and segment.end <= num_chars
        ids += [frame.before, encoding[0], np.full(int(has_end), frame.end, np.int32)]
        counts += [len(frame.before), len(encoding[0]), int(has_end)]
        kinds += [TEMPLATE, CONTENT, END]
        targets += [False, segment.target, segment.target]
        ends += [segment.end] * has_end
    if next((target for count, target in zip(counts, targets, strict=True) if count), False):
        ids[0], counts[0] = np.full(1, start_id, np.int32), 1
    kinds_T = np.repeat(np.array(kinds, np.uint8), counts)
    spans_T2 = np.full((len(kinds_T), 2), -1, np.int32)
    spans_T2[kinds_T == CONTENT], status = content_intervals(document, num_chars, encodings)
    spans_T2[kinds_T == END] = np.array(ends, np.int32)[:, None]
    targets_T = np.repeat(np.array(targets, np.bool_), counts)
    return Tokens(
        status=status, num_chars=num_chars, ids=np.concatenate(ids), spans=spans_T2, kinds=kinds_T, targets=targets_T
    )

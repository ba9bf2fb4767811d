"""One document as one model reads it: token ids, character intervals, kinds and targets, cut to the model's length.

Under none and alpaca segments are encoded one by one, so segment borders are token borders in every model; so is the
template's glue. Under chat the template writes the row and the tokenizer reads it whole (native_template.py). An
interval leaves out the blanks glued to a token's front ("Ġw", "▁w"); a token of blanks only keeps them. Pieces of one
character share its interval, and so does a lone "▁" that a tokenizer puts before a first character.

Characters that a normaliser merges, swaps or deletes are given to the tokens they became part of or stood beside
(`repair_intervals`), and such tokens are counted. Some offsets stay beyond repair (a segment without tokens, offsets
that go back). Such a document gets no tokens and a reason from REASONS; it is never half used and never raises.

Shape legend for this file
    R documents    G segments of all documents    T tokens of a row
"""

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np

from xkd_schemas.documents import Document, DocumentBatch, document_of
from xkd_schemas.errors import UsageError
from xkd_schemas.ragged import pieces_of, row_offsets
from xkd_schemas.text.native_template import NOTHING, Reader, cut_row, read_renderings
from xkd_schemas.text.normalizer import Normalised
from xkd_schemas.text.rendering import CHANGED, PROBE, REFUSED, REORDERED, ChatTemplate, Rendered
from xkd_schemas.text.templates import CHAT, LAYOUTS, Frame, Layout, assemble_rows, check_template, refuse_text, where
from xkd_schemas.text.tokenizers import encode_texts, identity, name_of
from xkd_schemas.tokens import CONTENT, END, OK, WORKER_KILLED, Bools, Int32s, Int64s, NotUsable, TokenBatch, Tokens

MOST_CHARS: Final = 2**20  # encoded at once, of more than one document; results do not depend on it
BORDER_REACH: Final = 200  # characters a cut goes back to the end of a word; else it is behind the last whole token
TRIED: Final = 16  # documents of which a chat template must take one, before anything is begun
CHAT_VERSION: Final = 2  # bump it where a row's tokens change under chat; 1 encoded each content on its own
INTERVALS_VERSION: Final = 2  # bump it where `repair_intervals` changes; without it (1) they were the library's
REASONS: Final = {
    "lone_surrogate": "the text holds half of a surrogate pair, which no tokenizer takes",
    "outside_text": "a token's interval leaves its segment or ends before it starts",
    "offsets_not_monotone": "a token starts or ends before the one in front of it",
    "uncovered_characters": "characters that are not blank are in no token",
    "no_target": "no segment of the document is a target, or the targets give no token",
    REFUSED: "the chat template raises an error at the row's turns",
    CHANGED: "the chat template changes the text, and its characters cannot be found in the result",
    REORDERED: "the chat template writes the targets in another order",
    WORKER_KILLED: "a process that worked on the document died, every time",
    "not_imported": "nothing that was imported is of the document",
    "other_tokens": "what was imported is of other token ids than the tokenizer gives",
    "bad_values": "what was imported has another number of values than tokens, or values that are no numbers",
    "no_target_after_cut": "cut to the longest length, the text has no target left",
}
"""Every `status` but "ok", with what it means."""
_SURROGATE: Final = re.compile("[\ud800-\udfff]")  # half of a pair: text with one is no valid Unicode


def reading_of(identity: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of an encoder with this identity, but for its tokenizer."""
    thinking = identity.get("chat", {}).get("enable_thinking")
    return {"template": identity["template"], "max_tokens": identity["max_tokens"], "enable_thinking": thinking}


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """Documents in, Tokens out, for one tokenizer, template and length.

    UsageError: unknown template, a slow tokenizer, no end token, or max_tokens < 2.
    """

    tokenizer: Any  # a transformers fast tokenizer
    template: str  # none, alpaca or chat
    max_tokens: int  # longest T, template and end tokens included
    enable_thinking: bool | None = None  # handed to the chat template; None leaves it to the template
    _frames: dict[Any, tuple[Frame, ...]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_template(self.template)
        encode_texts(self.tokenizer, [""])
        if self.max_tokens < 2:
            raise UsageError(f"max_tokens is {self.max_tokens}, at least 2 are needed", fix="--max-tokens 1024")
        if self.tokenizer.eos_token_id is None:
            raise UsageError(
                f"{name_of(self.tokenizer)}: this tokenizer has no end token (eos)", fix="name eos_token in its config"
            )
        if self.template == CHAT:
            self._chat.check()
        elif self.enable_thinking is not None:
            raise UsageError(
                f"enable_thinking is for chat templates, the template is {self.template}", fix="--template chat"
            )

    @functools.cached_property
    def _chat(self) -> ChatTemplate:
        return ChatTemplate(self.tokenizer, self.enable_thinking)

    @functools.cached_property
    def _normaliser(self) -> Normalised:
        return Normalised(self.tokenizer)

    def identity(self) -> dict[str, Any]:
        """What the tokens depend on, for a plan, and the versions of what is done for this tokenizer and template."""
        found = {"tokenizer": identity(self.tokenizer), "template": self.template, "max_tokens": self.max_tokens}
        if self.template == CHAT:
            found["chat"] = {"version": CHAT_VERSION, "enable_thinking": self.enable_thinking}
        return found | ({"intervals": INTERVALS_VERSION} if self._normaliser.changes else {})

    def encode(self, document: Document, num_chars: int | None = None) -> Tokens:
        """One row of `encode_batch`: the tokens of the text up to `num_chars` characters, or of the whole text."""
        return self.encode_batch([document], None if num_chars is None else [num_chars])[0]

    def encode_batch(
        self, documents: Sequence[Document] | DocumentBatch, limits: Sequence[int | None] | None = None
    ) -> TokenBatch:
        """Tokens of documents, some thousand at once; `limits` are the characters at which the other model cut them.

        A row is a function of its document and of the returned `num_chars` alone: encoding the document again up to
        that character gives the same row. A target that goes on behind the limit has no end token. UsageError where
        the template has no place for a document's roles; a chat template's refusal is a status.
        """
        block = documents if isinstance(documents, DocumentBatch) else DocumentBatch.of(documents)
        wanted = [len(text) for text in block.texts]
        if limits is not None:
            both = enumerate(zip(wanted, limits, strict=True))
            wanted = [n if limit is None or at in block.killers else min(n, limit) for at, (n, limit) in both]
        pieces = pieces_of(wanted, MOST_CHARS)
        if len(pieces) == 1:
            return self._encode(block, np.array(wanted, np.int32))
        parts = (self._encode(block.take(range(*own)), np.array(wanted[slice(*own)], np.int32)) for own in pieces)
        return TokenBatch.of(row for part in parts for row in part)

    def _encode(self, block: DocumentBatch, num_chars: Int32s) -> TokenBatch:
        """One stretch of documents, cut where they are too long; rows that cannot be used have a reason, no tokens."""
        shown_R = np.array([_SURROGATE.search(text) is None for text in block.texts], np.bool_)  # to the tokenizer
        shown_R[list(block.killers)] = False
        first_target_R = _first_targets(block)
        if self.template == CHAT:
            rows = self._encode_chat(block, num_chars, shown_R)
        else:
            rows = self._encode_segments(block, num_chars, shown_R, first_target_R)
        return _judge(block, rows, shown_R, first_target_R)

    def _encode_chat(self, block: DocumentBatch, num_chars: Int32s, shown_R: Bools) -> TokenBatch:
        written = iter(self._render([block.document(n) for n in np.flatnonzero(shown_R).tolist()]))
        found = [next(written) if shown else NOTHING for shown in shown_R]
        rendered = [NOTHING if isinstance(one, NotUsable) else one for one in found]
        rows = []
        for n, row in enumerate(read_renderings(block, rendered, self._reader)):
            text, limit, why = block.texts[n], int(num_chars[n]), found[n]
            row = replace(row, status=why.reason if isinstance(why, NotUsable) else row.status, num_chars=limit)
            if limit < len(text):
                row = cut_row(text, row, limit)
            while len(row.ids) > self.max_tokens:
                row = cut_row(text, row, cut_point(text, row, self.max_tokens))
            rows.append(row)
        return TokenBatch.of(rows)

    def _render(self, documents: Sequence[Document]) -> list[Rendered | NotUsable]:
        """What the chat template makes of documents, or why it makes nothing of them."""
        for document in documents:
            refuse_text(document, CHAT)
        return self._chat.render(documents)

    def check(self, documents: Sequence[Document]) -> None:
        """UsageError where a layout does not take each of the first documents, or a chat template not one of them."""
        found = self._render(documents) if self.template == CHAT else [self._frame(d) for d in documents]
        faults = [f"{where(d)}: {w}" for d, w in zip(documents, found, strict=True) if isinstance(w, NotUsable)]
        if found and len(faults) == len(found):
            raise UsageError(f"{name_of(self.tokenizer)}: {faults[0]}", fix="fix the turns, or --template none")

    @functools.cached_property
    def _reader(self) -> Reader:
        reader = Reader(
            tokenizer=self.tokenizer, normalised=self._normaliser, enders=self._enders(), usual=(),
            added=np.array(sorted(int(i) for i in self.tokenizer.added_tokens_decoder), np.int64),
            eos=int(self.tokenizer.eos_token_id),
        )  # fmt: skip
        question = document_of(PROBE, source="a question", line=1)
        rendered = [found for found in self._render([question]) if isinstance(found, Rendered)]
        row = read_renderings(DocumentBatch.of([question]), rendered, reader)[0]
        return replace(reader, usual=frozenset(row.ids[row.kinds == END].tolist()))

    def _encode_segments(
        self, block: DocumentBatch, num_chars: Int32s, shown_R: Bools, first_target_R: Int64s
    ) -> TokenBatch:
        """Documents segment by segment; those that are too long are cut and encoded again until they fit."""
        rows = self._assemble(block, np.where(shown_R, num_chars, 0))
        rows = replace(rows, num_chars=num_chars.copy())
        again: dict[int, Tokens] = {}
        long = np.flatnonzero(np.diff(rows.first) > self.max_tokens).tolist()
        while long:
            for n in long:
                rows.num_chars[n] = cut_point(block.texts[n], again.get(n, rows[n]), self.max_tokens)
            long = [n for n in long if rows.num_chars[n] > first_target_R[n]]
            cut = self._assemble(block.take(long), rows.num_chars[long])
            again |= zip(long, cut, strict=True)
            long = [n for n, row in zip(long, cut, strict=True) if len(row.ids) > self.max_tokens]
        if not again:
            return rows
        return TokenBatch.of(replace(again.get(n, row), num_chars=row.num_chars) for n, row in enumerate(rows))

    def _assemble(self, block: DocumentBatch, num_chars: Int32s) -> TokenBatch:
        """The texts up to `num_chars` in their frames; `statuses` are the faults of the intervals."""
        frames = [self._frame(block.document(n)) for n in range(len(block))]
        return assemble_rows(block, num_chars, self.tokenizer, self._normaliser, frames)

    def _frame(self, document: Document) -> tuple[Frame, ...]:
        """The frame of every segment; the same for all documents with the same roles."""
        key = tuple((segment.role, segment.target) for segment in document.segments)
        if key not in self._frames:
            self._frames[key] = self._make_frames(document, LAYOUTS[self.template](document))
        return self._frames[key]

    def _make_frames(self, document: Document, pieces: Layout) -> tuple[Frame, ...]:
        """Glue behind a target gives its first token, if it can end a turn, as the end token; else that is eos."""
        frames: list[Frame] = []
        bos, by_itself = self.tokenizer.bos_token_id, self._ids("x")  # a start token that it puts before every text
        before = by_itself[:1] if bos is not None and by_itself[:1] == [bos] else []
        for piece in pieces:
            if isinstance(piece, str):
                ids = self._ids(piece, add_special_tokens=False)
                if frames and frames[-1].end >= 0 and ids and ids[0] in self._enders():
                    frames[-1] = frames[-1]._replace(end=ids.pop(0))
                before += ids
                continue
            end = int(self.tokenizer.eos_token_id) if document.segments[piece].target else -1
            frames.append(Frame(np.array(before, np.int32), end))
            before = []
        return tuple(frames)

    def _enders(self) -> set[int]:
        """Special tokens that may end a turn: all but the start and the unknown token."""
        added = {int(i) for i, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        no_end = {self.tokenizer.bos_token_id, self.tokenizer.unk_token_id} - {self.tokenizer.eos_token_id}
        return (added | {int(i) for i in self.tokenizer.all_special_ids}) - no_end

    def _ids(self, text: str, **options: bool) -> list[int]:
        encoded = self.tokenizer(text, padding=False, truncation=False, verbose=False, **options)
        return [int(token_id) for token_id in encoded["input_ids"]]


def _first_targets(block: DocumentBatch) -> Int64s:
    """Where the first target of each document begins; its length if it has none."""
    first_R = np.array([len(text) for text in block.texts], np.int64)
    targets = np.flatnonzero(block.targets_G)[::-1]  # backwards, so that the first of a document stays
    documents = np.searchsorted(block.segments.first, targets, side="right") - 1
    first_R[documents] = block.segments.values[targets, 0]
    return first_R


def _judge(block: DocumentBatch, rows: TokenBatch, shown_R: Bools, first_target_R: Int64s) -> TokenBatch:
    """Rows that cannot be used lose their tokens and get their reason."""
    idle_R = (rows.num_chars <= first_target_R) | (np.diff(row_offsets(rows.targets)[rows.first]) == 0)
    statuses = [
        WORKER_KILLED if row in block.killers
        else "lone_surrogate" if not shown
        else status if status != OK
        else OK if not idle
        else "no_target_after_cut" if num_chars < len(text)
        else "no_target"
        for row, (shown, status, idle, num_chars, text) in enumerate(
            zip(shown_R.tolist(), rows.statuses, idle_R.tolist(), rows.num_chars.tolist(), block.texts, strict=True)
        )
    ]  # fmt: skip
    return rows.with_statuses(statuses)


def cut_point(text: str, tokens: Tokens, max_tokens: int) -> int:
    """Where to cut a text whose row is too long: a character before `tokens.num_chars`, 0 if nothing fits.

    Behind the last word of which all tokens are among the first `max_tokens`; where no word ends within
    BORDER_REACH characters before the last whole token's end (Chinese, a long number), right there.
    """
    spans_C2 = tokens.spans[tokens.kinds == CONTENT]
    fitting = int((tokens.kinds[:max_tokens] == CONTENT).sum())
    end_C = spans_C2[:, 1]
    later_C = np.append(spans_C2[1:, 0], tokens.num_chars)
    whole = np.flatnonzero((end_C <= later_C)[:fitting] & (end_C[:fitting] < tokens.num_chars))
    if not len(whole):
        return 0
    last = int(end_C[whole[-1]])
    for at in range(last, max(last - BORDER_REACH, 0), -1):
        if text[at].isspace() and not text[at - 1].isspace():
            return at
    return last

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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np

from xkd_schemas.corpus.rows import WORKER_KILLED
from xkd_schemas.documents import Document, document_of
from xkd_schemas.errors import UsageError
from xkd_schemas.text.batches import DocumentBatch, Int64s, TokenBatch, pieces_of
from xkd_schemas.text.native_template import NOTHING, Reader, cut_row, read_renderings
from xkd_schemas.text.normalizer import Normalised
from xkd_schemas.text.offsets import cut_point
from xkd_schemas.text.rendering import CHANGED, PROBE, REFUSED, REORDERED, ChatTemplate, NotRendered, Rendered
from xkd_schemas.text.templates import CHAT, LAYOUTS, Frame, Layout, assemble_rows, check_template, refuse_text, where
from xkd_schemas.text.tokenizers import encode_texts, identity, name_of
from xkd_schemas.tokens import END, OK, Bools, Int32s, Tokens

MOST_CHARS: Final = 2**20
"""Characters that are encoded at once, of more than one document; results do not depend on it."""

CHAT_VERSION: Final = 2
"""Of `read_renderings` and `ChatTemplate`; bump it where a row's tokens change. 1 encoded each content on its own."""

TRIED: Final = 16
"""Documents of which a chat template must take one, before anything is begun."""

INTERVALS_VERSION: Final = 2
"""Of `repair_intervals`; bump it where a token's characters change. Without it (1) intervals were the library's."""

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
    "no_target_after_cut": "cut to the longest length, the text has no target left",
}
"""Every `status` but "ok", with what it means."""


def reading_of(identity: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of an encoder with this identity, but for its tokenizer."""
    thinking = identity.get("chat", {}).get("enable_thinking")
    return {"template": identity["template"], "max_tokens": identity["max_tokens"], "enable_thinking": thinking}


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
    enable_thinking: bool | None = None
    """Handed to the chat template; None leaves it to the template."""
    _frames: dict[tuple[tuple[str, bool], ...], tuple[Frame, ...]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

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
        """What the tokens depend on, for a plan: the tokenizer's identity, the template's name, the length.

        And, of a tokenizer that normalises, how its intervals are taken through the normaliser; of a chat template,
        how it is read.
        """
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
        that character gives the same row. A target that goes on behind the limit has no end token.

        Raises:
            UsageError: The template has no place for a document's roles; a chat template's refusal is a status.
        """
        block = documents if isinstance(documents, DocumentBatch) else DocumentBatch.of(documents)
        wanted = [len(text) for text in block.texts]
        if limits is not None:
            wanted = [n if limit is None else min(n, limit) for n, limit in zip(wanted, limits, strict=True)]
        encoded = self._encode_chat if self.template == CHAT else self._encode_segments
        parts = [
            encoded(block.part(first, end), np.array(wanted[first:end], np.int32))
            for first, end in pieces_of(wanted, MOST_CHARS)
        ]
        return parts[0] if len(parts) == 1 else TokenBatch.of(row for part in parts for row in part)

    def _encode_chat(self, block: DocumentBatch, num_chars: Int32s) -> TokenBatch:
        """One stretch of documents as the chat template writes them; rows that are too long are cut."""
        unicode_R = np.array([_is_unicode(text) for text in block.texts], np.bool_)
        first_target_R = _first_targets(block)
        rendered, faults = self._render_all(block, unicode_R)
        whole = read_renderings(block, rendered, self._reader)
        rows = []
        for n, (text, limit) in enumerate(zip(block.texts, num_chars.tolist(), strict=True)):
            row = replace(whole[n], status=faults.get(n, whole.statuses[n]), num_chars=limit)
            if limit < len(text):
                row = cut_row(text, row, limit)
            while len(row.ids) > self.max_tokens:
                row = cut_row(text, row, cut_point(text, row, self.max_tokens))
            rows.append(row)
        return _judge(block, TokenBatch.of(rows), unicode_R, first_target_R)

    def _render_all(self, block: DocumentBatch, unicode_R: Bools) -> tuple[list[Rendered], dict[int, str]]:
        """What the chat template makes of each document, and why it makes nothing of some."""
        rendered, faults = [], {}
        for n, readable in enumerate(unicode_R.tolist()):
            document = block.document(n)
            refuse_text(document, CHAT)
            try:
                rendered.append(self._chat.render(document) if readable else NOTHING)
            except NotRendered as why:
                rendered.append(NOTHING)
                faults[n] = why.reason
        return rendered, faults

    def check(self, documents: Iterable[Document]) -> None:
        """UsageError where a layout does not take each of the first documents, or a chat template not one of them."""
        faults = [self._fault(document) for document in documents]
        if faults and all(faults):
            raise UsageError(f"{name_of(self.tokenizer)}: {faults[0]}", fix="fix the turns, or --template none")

    def _fault(self, document: Document) -> str:
        """Why the chat template does not take a document; empty if it does."""
        if self.template != CHAT:
            self._frame(document)
            return ""
        refuse_text(document, CHAT)
        try:
            self._chat.render(document)
        except NotRendered as why:
            return f"{where(document)}: {why}"
        return ""

    @functools.cached_property
    def _reader(self) -> Reader:
        reader = Reader(
            tokenizer=self.tokenizer, normalised=self._normaliser, enders=self._enders(), usual=(),
            added=np.array(sorted(int(i) for i in self.tokenizer.added_tokens_decoder), np.int64),
            eos=int(self.tokenizer.eos_token_id),
        )  # fmt: skip
        question = document_of(PROBE, source="a question", line=1)
        row = read_renderings(DocumentBatch.of([question]), [self._chat.render(question)], reader)[0]
        return replace(reader, usual=frozenset(row.ids[row.kinds == END].tolist()))

    def _encode_segments(self, block: DocumentBatch, num_chars: Int32s) -> TokenBatch:
        """One stretch of documents; rows that are too long are cut and encoded again until they fit."""
        unicode_R = np.array([_is_unicode(text) for text in block.texts], np.bool_)
        first_target_R = _first_targets(block)
        rows = self._assemble(block, np.where(unicode_R, num_chars, 0))
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
        if again:
            rows = TokenBatch.of(
                replace(again.get(n, row), num_chars=int(rows.num_chars[n])) for n, row in enumerate(rows)
            )
        return _judge(block, rows, unicode_R, first_target_R)

    def _assemble(self, block: DocumentBatch, num_chars: Int32s) -> TokenBatch:
        """The texts up to `num_chars` in their frames; `statuses` are the faults of the intervals."""
        encode = functools.partial(encode_texts, self.tokenizer)
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        start = eos if bos is None else bos  # what a first target token is predicted from
        frames = [self._frame(block.document(n)) for n in range(len(block))]
        return assemble_rows(block, num_chars, encode, self._normaliser, frames, int(start))

    def _frame(self, document: Document) -> tuple[Frame, ...]:
        """The frame of every segment; the same for all documents with the same roles."""
        key = tuple((segment.role, segment.target) for segment in document.segments)
        if key not in self._frames:
            self._frames[key] = self._make_frames(document, LAYOUTS[self.template](document))
        return self._frames[key]

    def _make_frames(self, document: Document, pieces: Layout) -> tuple[Frame, ...]:
        """Glue behind a target gives its first token, if it can end a turn, as the end token; else that is eos."""
        frames: list[Frame] = []
        before = self._start()
        for piece in pieces:
            if isinstance(piece, str):
                ids = self._glue(piece)
                if frames and frames[-1].end >= 0 and ids and ids[0] in self._enders():
                    frames[-1] = Frame(before=frames[-1].before, end=ids.pop(0))
                before += ids
                continue
            target = document.segments[piece].target
            end = int(self.tokenizer.eos_token_id) if target else -1
            frames.append(Frame(before=np.array(before, dtype=np.int32), end=end))
            before = []
        return tuple(frames)

    def _start(self) -> list[int]:
        """The start token that the tokenizer puts before every text by itself."""
        bos = self.tokenizer.bos_token_id
        by_itself = self.tokenizer("x", verbose=False)["input_ids"]
        return [int(bos)] if bos is not None and by_itself[:1] == [bos] else []

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


def _first_targets(block: DocumentBatch) -> Int64s:
    """Where the first target of each document begins; its length if it has none."""
    first_R = np.array([len(text) for text in block.texts], np.int64)
    targets = np.flatnonzero(block.targets_G)[::-1]  # backwards, so that the first of a document stays
    documents = np.searchsorted(block.segments.first, targets, side="right") - 1
    first_R[documents] = block.segments.values[targets, 0]
    return first_R


def _judge(block: DocumentBatch, rows: TokenBatch, unicode_R: Bools, first_target_R: Int64s) -> TokenBatch:
    """Rows that cannot be used lose their tokens and get their reason."""
    idle_R = (rows.num_chars <= first_target_R) | (rows.count_flags(rows.targets) == 0)
    statuses = [
        "lone_surrogate" if not unicode
        else status if status != OK
        else OK if not idle
        else "no_target_after_cut" if num_chars < len(text)
        else "no_target"
        for unicode, status, idle, num_chars, text in zip(
            unicode_R.tolist(), rows.statuses, idle_R.tolist(), rows.num_chars.tolist(), block.texts, strict=True
        )
    ]  # fmt: skip
    return rows.with_statuses(statuses, np.array([status == OK for status in statuses], np.bool_))


def unusable(status: str, num_chars: int) -> Tokens:
    """A row without tokens; `status` says why."""
    return Tokens(
        status=status, num_chars=num_chars, ids=np.zeros(0, np.int32), spans=np.zeros((0, 2), np.int32),
        kinds=np.zeros(0, np.uint8), targets=np.zeros(0, np.bool_),
    )  # fmt: skip

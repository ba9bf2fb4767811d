"""A document as its model's chat template writes it, and which of the characters written are the document's own.

The template gets the row's own messages, so what it makes of them is what the model was trained on, whatever it does
to a content. Where each character comes from is found by rendering once more with a character of its own in place of
every one of the text (`_Trace`): the copy is followed through trimming, splitting and reordering. It must give the
real rendering again, character for character, or the row is not used. Blanks and what the template looks for in a
content (`</think>`) have to stay what they are; they are found between their neighbours.

Most templates only put something round each content. Once that is seen for some roles (`_frames`), the glue is
remembered, and a row whose texts and glue join to its rendering needs no copy.

Shape legend for this file
    L characters of the rendering    G segments
"""

import ast
import contextlib
import datetime
import difflib
import functools
import itertools
import re
from collections.abc import Iterator, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from xkd_schemas.corpus.conversation import CALL, REASONING, Conversation, Message, call_strings, conversation
from xkd_schemas.documents import Document, document_of
from xkd_schemas.errors import Refused, UsageError
from xkd_schemas.text.limited import Limited, LimitExceededError
from xkd_schemas.text.tokenizers import blanks, name_of
from xkd_schemas.tokens import Int32s, NotUsable

TEMPLATE_DAY: Final = datetime.datetime(2025, 1, 1)  # today for a chat template, whatever day a cache is made on
REFUSED: Final = "template_refuses"
CHANGED: Final = "template_changes_text"
REORDERED: Final = "template_reorders"
Codes = npt.NDArray[np.uint32]

_FIRST: Final = 0x40000  # characters from here on stand for those of the text; none is a letter, a blank or a sign
_MOST: Final = 0x110000 - _FIRST
_OUTER: Final = "\u2000"  # a blank that stands for those at the ends of a segment
_LONGEST_GAP: Final = 4_000
_NO_TOOLS: Final[Sequence[list[Any] | None]] = (None, [])
_CONSTANT: Final = re.compile(r"'(?:[^'\\\n]|\\.)*'|\"(?:[^\"\\\n]|\\.)*\"")
PROBE: Final = (("user", "Who lit it?", False), ("assistant", "Nobody.", True))  # every chat template takes it


class Turn(NamedTuple):
    """What a model writes in one go."""

    start: int  # first character of the rendering that it writes
    end: int  # behind the last one of the document's text; an end token may follow
    char: int  # where its last segment ends in the document
    closes: bool  # the template closes it with more than an end token


class Rendered(NamedTuple):
    """A document as its chat template writes it."""

    text: str
    source_L: Int32s  # the document's character that each one is, -1 for the template's own
    turns: Sequence[Turn]  # of targets


class ChatTemplate:
    """One tokenizer's chat template, or UsageError; `enable_thinking` is handed to it if it is not None."""

    def __init__(self, tokenizer: Any, enable_thinking: bool | None = None) -> None:
        if not tokenizer.chat_template:
            raise UsageError(
                f"{name_of(tokenizer)}: this tokenizer has no chat template",
                fix="--template none or --template alpaca",
            )
        options = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
        # without and with tools: some tokenizers have two
        templates = [with_frozen_day(str(tokenizer.get_chat_template(tools=tools))) for tools in _NO_TOOLS]

        def answer(messages: list[Message] | None, tools: list[Any] | None, prompt: bool) -> str | list[str]:
            """What the template makes of messages; without any, the constants that it looks for."""
            if messages is None:
                return _find_constants("".join(templates))
            own = {"tools": tools, "chat_template": templates[tools is not None], "add_generation_prompt": prompt}
            return str(tokenizer.apply_chat_template(messages, tokenize=False, **own, **options))

        self._name, self._child = name_of(tokenizer), Limited(answer)
        self._parts = False  # contents are lists of parts
        self._frames: dict[tuple[tuple[str, bool], ...], list[str]] = {}

    def check(self) -> None:
        """Find out how the template wants its contents; UsageError if it takes not even a question and its answer."""
        question = document_of(PROBE, source="a question", line=1)
        faults = []
        for self._parts in (False, True):
            found = self.render([question])[0]
            if not isinstance(found, NotUsable) and found.turns:
                return
            faults.append(str(found) if isinstance(found, NotUsable) else "the chat template leaves the text out")
        raise UsageError(f"{self._name}: {faults[0]}", fix="--template none or --template alpaca")

    def render(self, documents: Sequence[Document]) -> list[Rendered | NotUsable]:
        """Documents as the template writes them; NotUsable where it refuses, or characters are not found again.

        Refused where the template takes more time or memory than it may.
        """
        written = self._write([conversation(document, document.text) for document in documents])
        return [self._follow(document, real) for document, real in zip(documents, written, strict=True)]

    def _follow(self, document: Document, real: str | NotUsable) -> Rendered | NotUsable:
        if isinstance(real, NotUsable):
            return real
        key = tuple((s.role, s.target) for s in document.segments)
        source_L = None if document.messages else self._reuse_glue(document, real, self._frames.get(key))
        if source_L is None:
            try:
                source_L = self._trace(document, real)
            except NotUsable as why:
                return why
            glue = None if document.messages else _glue_of(document, real, source_L)
            if glue is not None:
                self._frames[key] = glue
        return Rendered(real, source_L, self._turns(document, real, source_L))

    def _reuse_glue(self, document: Document, real: str, glue: list[str] | None) -> Int32s | None:
        texts = [document.text[s.start : s.end] for s in document.segments]
        if glue is None or real != "".join(itertools.chain(*itertools.zip_longest(glue, texts, fillvalue=""))):
            return None
        shift_G = np.cumsum([len(before) for before in glue[:-1]])
        own_N = np.arange(len(document.text))
        source_L = np.full(len(real), -1, np.int32)
        source_L[own_N + np.repeat(shift_G, [len(text) for text in texts])] = own_N
        return source_L

    def _trace(self, document: Document, real: str) -> Int32s:
        """Where every character comes from, found with as few characters left as they are as will do."""
        markers = [m for m in self._markers if m in document.text]
        for trace in (
            _Trace(document, (), outer=True), _Trace(document, markers, outer=True),
            _Trace(document, markers, outer=False),
        ):  # fmt: skip
            traced = self._write([conversation(document, trace.text)])[0]
            if isinstance(traced, NotUsable):
                raise traced
            source_L = trace.found(traced, real)
            if source_L is not None:
                return source_L
        raise NotUsable(CHANGED, "its characters are not found again in what the chat template writes")

    def _write(self, rows: Sequence[Conversation], *, prompt: bool = False) -> list[str | NotUsable]:
        contents = [[_in_parts(message) for message in row.messages] if self._parts else row.messages for row in rows]
        written = self._ask([(own, row.tools, prompt) for own, row in zip(contents, rows, strict=True)])
        refusal = "the chat template refuses the turns {}: {}"
        return [
            NotUsable(REFUSED, refusal.format(", ".join(str(m["role"]) for m in row.messages), why)) if why else text
            for (text, why), row in zip(written, rows, strict=True)
        ]

    def _ask(self, calls: Sequence[Sequence[Any]]) -> list[tuple[Any, str]]:
        try:
            return self._child.map(calls)
        except LimitExceededError as error:
            raise Refused(
                f"{self._name}: its chat template takes more than {error} for one row",
                fix="--template none or --template alpaca, or a tokenizer with another chat template",
            ) from error

    @functools.cached_property
    def _markers(self) -> list[str]:
        """What the template may look for in a content: its constants, and what JSON escapes; the longest first."""
        found = {'"', "\\", *self._ask([(None, None, False)])[0][0]}
        return sorted((m.strip() for m in found if m.strip()), key=lambda m: (-len(m), m))

    @functools.cached_property
    def _prompt(self) -> str:
        """What the template puts behind the messages for a model to go on."""
        row = Conversation([{"role": "user", "content": "x"}], None, [])
        match [self._write([row], prompt=prompt)[0] for prompt in (False, True)]:
            case [str(without), str(asked)] if asked.startswith(without):
                return asked.removeprefix(without)
        return ""

    def _turns(self, document: Document, real: str, source_L: Int32s) -> list[Turn]:
        """The targets of each message, with what the model writes round them."""
        at = np.flatnonzero(source_L >= 0)
        source = source_L[at]
        borders = np.searchsorted(source, [[s.start, s.end] for s in document.segments]).reshape(-1, 2).tolist()
        message_of = conversation(document, document.text).message_of if document.messages else range(len(borders))
        found: list[Turn] = []
        last = -1
        for segment, (first, end), message in zip(document.segments, borders, message_of, strict=True):
            if not segment.target or first == end:
                continue
            if message == last:
                begin = found.pop().start
            else:
                start, before = int(at[first]), int(at[first - 1]) + 1 if first else 0
                place = real.rfind(self._prompt, before, start) if self._prompt else -1
                begin = start if place < 0 else place + len(self._prompt)
            last = message
            found.append(Turn(begin, int(at[end - 1]) + 1, segment.end, segment.role in (CALL, REASONING)))
        return found


class _Trace:
    """The text with other characters in place of its own, which are found again wherever a template puts them."""

    def __init__(self, document: Document, markers: Sequence[str], *, outer: bool) -> None:
        text = document.text
        if len(text) > _MOST:
            raise NotUsable(CHANGED, f"more than {_MOST} characters cannot be followed through a chat template")
        self._document = document
        self._codes_N = _codes(text)
        traced_N = self._codes_N.copy()
        self._marked_N = np.zeros(len(text), np.bool_)
        self._borders = {0, len(text)}
        for found in re.finditer("|".join(map(re.escape, markers)), text) if markers else ():
            self._marked_N[found.start() : found.end()] = True
            self._borders |= set(found.span())
        coded_N = ~blanks(text) & ~self._marked_N
        for segment in document.segments:
            own = slice(segment.start, segment.end)
            if segment.role == CALL:
                inside_N = np.zeros(segment.end - segment.start, np.bool_)
                for start, end in call_strings(text[own]):
                    inside_N[start:end] = True
                coded_N[own] &= inside_N
            elif outer:
                solid = np.flatnonzero(~blanks(text[own]))
                if len(solid):
                    traced_N[segment.start : segment.start + solid[0]] = ord(_OUTER)
                    traced_N[segment.start + solid[-1] + 1 : segment.end] = ord(_OUTER)
        traced_N[coded_N] = _FIRST + np.flatnonzero(coded_N)
        self._traced_N = traced_N
        self.text = traced_N.tobytes().decode("utf-32-le")

    def found(self, rendered: str, real: str) -> Int32s | None:
        """Which character of the text each one of the real rendering is; None if this is not its trace."""
        if len(rendered) != len(real):
            return None
        traced_L, real_L = _codes(rendered), _codes(real)
        source_L = np.where(traced_L >= _FIRST, traced_L.astype(np.int64) - _FIRST, -1).astype(np.int32)
        known_L = source_L >= 0
        if not np.array_equal(self._codes_N[source_L[known_L]], real_L[known_L]):
            return None
        other_L = ~known_L & (traced_L != real_L)
        _drop_disordered(self._document, source_L)
        self._fill(source_L, traced_L, real_L)
        return None if (other_L & (traced_L != ord(_OUTER))).any() else source_L

    def _fill(self, source_L: Int32s, traced_L: Codes, real_L: Codes) -> None:
        """Find the characters that were left as they are, between their neighbours."""
        at = np.flatnonzero(source_L >= 0)
        starts = np.array([s.start for s in self._document.segments])
        segment = np.searchsorted(starts, source_L[at], side="right") - 1
        same = np.diff(segment) == 0
        own, room = np.diff(source_L[at]), np.diff(at)
        for n in np.flatnonzero(same & (own > 1) & (room > 1)).tolist():
            i, j, a, b = int(source_L[at[n]]) + 1, int(source_L[at[n + 1]]), int(at[n]) + 1, int(at[n + 1])
            if own[n] == room[n] and np.array_equal(self._codes_N[i:j], real_L[a:b]):
                source_L[a:b] = np.arange(i, j)
            else:
                left_N = np.where(self._traced_N[i:j] < _FIRST, self._codes_N[i:j], 0)
                for k, m, size in _blocks(left_N, real_L[a:b]):
                    source_L[a + m : a + m + size] = np.arange(i + k, i + k + size)
        for number in np.unique(segment).tolist():
            own_segment = self._document.segments[number]
            first, last = np.searchsorted(segment, [number, number + 1]) - [0, 1]
            before = int(at[first - 1]) + 1 if first else 0
            behind = int(at[last + 1]) if last + 1 < len(at) else len(source_L)
            low, high = int(source_L[at[first]]), int(source_L[at[last]]) + 1
            self._edge(source_L, traced_L, (own_segment.start, low), (before, int(at[first])), -1)
            self._edge(source_L, traced_L, (high, own_segment.end), (int(at[last]) + 1, behind), 1)

    def _edge(self, source_L: Int32s, traced_L: Codes, own: tuple[int, int], room: tuple[int, int], step: int) -> None:
        """What is left of a segment in front of its first (-1) or behind its last (1) character that was found."""
        number_E = np.arange(*own)[::step]  # from the found character outwards
        there = slice(*room)
        wanted_E, written_E, found_E = self._traced_N[number_E], traced_L[there][::step], source_L[there][::step]
        size = min(len(wanted_E), len(written_E))
        same_E = np.append((wanted_E[:size] == written_E[:size]) & (found_E[:size] < 0), False)
        size = int(same_E.argmin())
        borders = [0, *(number_E + (step > 0)).tolist()]
        while size and self._marked_N[number_E[size - 1]] and borders[size] not in self._borders:
            size -= 1  # no marker is there in part
        blank = (wanted_E[:size] == ord(_OUTER)).all()
        if size == len(number_E) or blank or borders[size] in self._borders:
            found_E[:size] = number_E[:size]


def _find_constants(template: str) -> list[str]:
    found = []
    for constant in _CONSTANT.findall(template):
        with contextlib.suppress(SyntaxError, ValueError):
            found.append(str(ast.literal_eval(constant)))
    return found


def _in_parts(message: Message) -> Message:
    content = message.get("content")
    return {**message, "content": [{"type": "text", "text": content}]} if isinstance(content, str) else message


def _codes(text: str) -> Codes:
    return np.frombuffer(text.encode("utf-32-le"), np.uint32)


def _blocks(own: Codes, written: Codes) -> Iterator[tuple[int, int, int]]:
    """Equal stretches of two short pieces, in order: blanks alone, or ones with a letter or digit."""
    if len(own) * len(written) <= _LONGEST_GAP**2:
        matcher = difflib.SequenceMatcher(None, own.tolist(), written.tolist(), autojunk=False)
        for at, place, size in matcher.get_matching_blocks():
            said = "".join(map(chr, own[at : at + size].tolist()))
            if size and (said.isspace() or any(c.isalnum() for c in said)):
                yield at, place, size


def _drop_disordered(document: Document, source_L: Int32s) -> None:
    """Make what is written twice, or in another order than the row has it, the template's own, in place.

    NotUsable where that would be part of a target.
    """
    at = np.flatnonzero(source_L >= 0)
    if (np.diff(source_L[at]) > 0).all():
        return
    at = at[np.sort(np.unique(source_L[at], return_index=True)[1])]  # of what is written twice the first
    found = source_L[at]
    source_L[:] = -1
    starts = [s.start for s in document.segments]
    segment = np.searchsorted(starts, found, side="right") - 1
    kept: dict[int, tuple[int, int]] = {}
    for n in sorted(np.unique(segment).tolist(), key=lambda n: (not document.segments[n].target, n)):
        own, chars = at[segment == n], found[segment == n]
        low = max((end for m, (_, end) in kept.items() if m < n), default=-1)
        high = min((start for m, (start, _) in kept.items() if m > n), default=len(source_L))
        if own[0] > low and own[-1] < high and (np.diff(chars) > 0).all():
            kept[n] = (int(own[0]), int(own[-1]))
            source_L[own] = chars
        elif document.segments[n].target:
            raise NotUsable(REORDERED, "the chat template writes its targets in another order")


def _glue_of(document: Document, real: str, source_L: Int32s) -> list[str] | None:
    """What stands before, between and behind the segments where each is written whole; else None."""
    at = np.flatnonzero(source_L >= 0)
    if not np.array_equal(source_L[at], np.arange(len(document.text))):
        return None
    glue, end = [], 0
    for segment in document.segments:
        first = int(at[segment.start])
        glue.append(real[end:first])
        end = first + segment.end - segment.start
        if at[segment.end - 1] != end - 1:
            return None
    return [*glue, real[end:]]


def with_frozen_day(chat_template: str) -> str:
    """The chat template with TEMPLATE_DAY for today; transformers passes no function into a template, so a macro."""
    if "strftime_now" not in chat_template:
        return chat_template
    steps = "".join(f"|replace('%{c}', '{TEMPLATE_DAY.strftime('%' + c)}')" for c in "YymdBbAaejHIMSp")
    return "{% macro strftime_now(form) %}{{ form" + steps + " }}{% endmacro %}" + chat_template

"""The messages of a chat row: taken apart into a document's segments, and put together again for a chat template.

Roles alone tell the messages of most rows. `Document.messages` holds what they do not: which texts are one message,
empty ones, the keys they stood under, tools. It is the row's own JSON in which a number stands for the segment that
has the text; a call is `[segment, the call without its name and arguments]`.

A call's text is `{"name": ..., "arguments": ...}` with the row's own arguments, whatever stands round them in the row
or in a template.
"""

import json
import re
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from xkd_schemas.documents import Document

USER_ROLES: Final = frozenset({"prompt", "instruction", "input"})  # those that stand together are one user message
TURN_BREAK: Final = "\n\n"  # between instruction and input in one user message
CHAT_ROLES: Final[Mapping[str, str]] = {"response": "assistant"} | dict.fromkeys(USER_ROLES, "user")
"""Roles of segments that chat templates call otherwise."""
REASONING_KEYS: Final = ("reasoning_content", "reasoning", "thinking")  # what an assistant thinks before it answers
TEXT_KEYS: Final = (*REASONING_KEYS, "content")
CALL: Final = "tool_call"
REASONING: Final = "reasoning"
_NAME, _ARGUMENTS = '{"name": ', ', "arguments": '
_LITERAL: Final = re.compile(r'"((?:[^"\\]|\\.)*)"', re.DOTALL)
_ESCAPE: Final = re.compile(r"\\u[0-9a-fA-F]{4}|\\.", re.DOTALL)

Message = dict[str, Any]


class Conversation(NamedTuple):
    """What a chat template is given."""

    messages: list[Message]
    tools: list[Any] | None
    message_of: list[int]  # [G] the message that has the segment


def conversation(document: Document, text: str) -> Conversation:
    """The document's messages, with `text`, which is as long as its own, in place of its own text."""
    pieces = [text[s.start : s.end] for s in document.segments]
    if not document.messages:
        return _by_roles(document, pieces)
    row = json.loads(document.messages)
    message_of = [0] * len(pieces)
    messages = []
    for number, stored in enumerate(row["messages"]):
        message = dict(stored)
        for key in TEXT_KEYS:
            if isinstance(stored.get(key), int):
                message_of[stored[key]] = number
                message[key] = pieces[stored[key]]
        if "tool_calls" in stored:
            for segment, _ in stored["tool_calls"]:
                message_of[segment] = number
            message["tool_calls"] = [_call(call, pieces[segment]) for segment, call in stored["tool_calls"]]
        messages.append(message)
    return Conversation(messages, row.get("tools"), message_of)


def _by_roles(document: Document, pieces: list[str]) -> Conversation:
    messages: list[Message] = []
    message_of = []
    before = ""
    for segment, piece in zip(document.segments, pieces, strict=True):
        if segment.role in USER_ROLES and before in USER_ROLES:
            messages[-1]["content"] += TURN_BREAK + piece
        else:
            messages.append({"role": CHAT_ROLES.get(segment.role, segment.role), "content": piece})
        message_of.append(len(messages) - 1)
        before = segment.role
    return Conversation(messages, None, message_of)


def call_text(call: Mapping[str, Any]) -> tuple[str, Message]:
    """A call's text, and what else it holds; KeyError, TypeError or ValueError where it has no name or arguments.

    >>> call_text({"id": "a", "function": {"name": "add", "arguments": {"x": 1}}})
    ('{"name": "add", "arguments": {"x": 1}}', {'id': 'a', 'function': {'name': '', 'arguments': {}}})
    """
    function = call.get("function", call)
    name, arguments = function["name"], function["arguments"]
    if not isinstance(name, str) or not isinstance(arguments, str | dict):
        raise TypeError("a name and arguments are strings, or the arguments an object")
    own = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    rest = {**function, "name": "", "arguments": type(arguments)()}
    text = _NAME + json.dumps(name, ensure_ascii=False) + _ARGUMENTS + own + "}"
    return text, {**call, "function": rest} if "function" in call else rest


def _call(stored: Message, text: str) -> Message:
    name, end = json.JSONDecoder(strict=False).raw_decode(text, len(_NAME))
    arguments = text[end + len(_ARGUMENTS) : -1]
    function = stored.get("function", stored)
    given = arguments if isinstance(function["arguments"], str) else json.loads(arguments, strict=False)
    filled = {**function, "name": name, "arguments": given}
    return {**stored, "function": filled} if "function" in stored else filled


def call_strings(text: str) -> list[tuple[int, int]]:
    """Stretches of a call's text that may hold any characters without it being another call: inside its strings."""
    found = []
    for literal in _LITERAL.finditer(text, len(_NAME)):
        at, end = literal.span(1)
        for escape in _ESCAPE.finditer(text, at, end):
            found.append((at, escape.start()))
            at = escape.end()
        found.append((at, end))
    return [(start, end) for start, end in found if start < end]

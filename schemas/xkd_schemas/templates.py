"""What a model sees around the text: the glue of a template before, between and behind a document's segments.

A template is per model; its text is outside the canonical text, has no interval and enters no loss. A template here
is a function from a document's roles to pieces: glue, or one segment. It never sees the text of a segment.

    none     nothing but the segments
    alpaca   the prompt of Stanford Alpaca, as MiniLLM and DSKD (arXiv 2406.17328) train with
    chat     the tokenizer's own chat template
"""

import datetime
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from jinja2.exceptions import TemplateError

from xkd_schemas.documents import Document
from xkd_schemas.errors import UsageError
from xkd_schemas.tokenizers import name_of

USER_ROLES: Final = frozenset({"prompt", "instruction", "input"})
"""Segments of these roles that stand together are one user message."""

TURN_BREAK: Final = "\n\n"
"""Between instruction and input in one user message."""

ALPACA: Final = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    "\n\n### Instruction:\n"
)
ALPACA_WITH_INPUT: Final = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n### Instruction:\n"
)
ALPACA_INPUT: Final = "\n\n### Input:\n"
ALPACA_RESPONSE: Final = "\n\n### Response:\n"

TEMPLATE_DAY: Final = datetime.datetime(2025, 1, 1)
"""What a chat template gets when it asks for today's date, so that a cache does not depend on the day it was made."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """Either glue, or a reference to one segment."""

    glue: str = ""
    """Template text; special tokens are written out ("<|im_end|>")."""
    segment: int = -1
    """Index into the document's segments; -1 for glue."""


Layout = tuple[Piece, ...]


def layout(template: str, document: Document, tokenizer: Any) -> Layout:
    """The pieces of this document under a template: each segment once, in order, with glue where there is some.

    The result depends on the tokenizer and the document's roles only.

    Args:
        template: A key of TEMPLATES.
        document: Text is not looked at; source and line are for messages.
        tokenizer: A transformers tokenizer; only `chat` asks it for anything.

    Raises:
        UsageError: No such template, or it has no place for these roles.
    """
    return template_named(template)(document, tokenizer)


def template_named(name: str) -> Callable[[Document, Any], Layout]:
    """The template, or UsageError that lists the known ones."""
    try:
        return TEMPLATES[name]
    except KeyError:
        known = ", ".join(TEMPLATES)
        raise UsageError(f"template {name!r} is not known", next=f"--template with one of {known}") from None


def _none(document: Document, tokenizer: Any) -> Layout:
    return tuple(Piece(segment=index) for index in range(len(document.segments)))


def _alpaca(document: Document, tokenizer: Any) -> Layout:
    roles = tuple(segment.role for segment in document.segments)
    asked, answered = (roles[:-1], True) if roles[-1:] == ("response",) else (roles, False)
    if asked not in {(), ("prompt",), ("instruction",), ("instruction", "input"), ("input",)}:
        _refuse_text(document, "alpaca")
        raise UsageError(
            f"{_where(document)}: the alpaca template takes instruction, input and response, found {', '.join(roles)}",
            next="--template chat or --template none",
        )
    pieces = [Piece(glue=ALPACA_WITH_INPUT if "input" in asked else ALPACA)]
    for index, role in enumerate(asked):
        if role == "input":
            pieces.append(Piece(glue=ALPACA_INPUT))
        pieces.append(Piece(segment=index))
    pieces.append(Piece(glue=ALPACA_RESPONSE))
    return (*pieces, Piece(segment=len(asked))) if answered else tuple(pieces)


def _chat(document: Document, tokenizer: Any) -> Layout:
    _refuse_text(document, "chat")
    if not tokenizer.chat_template:
        raise UsageError(
            f"{name_of(tokenizer)}: this tokenizer has no chat template", next="--template none or --template alpaca"
        )
    messages = _messages(document)
    try:
        chat_template = _with_frozen_day(str(tokenizer.get_chat_template()))
        rendered = tokenizer.apply_chat_template(messages, chat_template=chat_template, tokenize=False)
    except (TemplateError, ValueError, TypeError) as error:
        raise UsageError(
            f"{_where(document)}: the chat template of {name_of(tokenizer)} refuses the turns "
            f"{', '.join(message['role'] for message in messages)}: {error}",
            next="mend the turns, or --template none",
        ) from error
    cut = _SENTINEL.split(str(rendered))  # glue, index, glue, index, ..., glue
    if [int(index) for index in cut[1::2]] != list(range(len(document.segments))):
        raise UsageError(
            f"{_where(document)}: the chat template of {name_of(tokenizer)} does not show each turn once and in order",
            next="--template none",
        )
    pieces: list[Piece] = []
    for index, glue in enumerate(cut[::2]):
        pieces += [Piece(glue=glue)] if glue else []
        pieces += [Piece(segment=index)] if index < len(document.segments) else []
    return tuple(pieces)


def _with_frozen_day(chat_template: str) -> str:
    """The chat template with TEMPLATE_DAY for today; transformers passes no function into a template, so a macro."""
    if "strftime_now" not in chat_template:
        return chat_template
    steps = "".join(f"|replace('%{c}', '{TEMPLATE_DAY.strftime('%' + c)}')" for c in "YymdBbAaejHIMSp")
    return "{% macro strftime_now(form) %}{{ form" + steps + " }}{% endmacro %}" + chat_template


_SENTINEL: Final = re.compile(r"xkdsegment(\d{6})sentinel")


def _messages(document: Document) -> list[dict[str, str]]:
    """Messages whose contents are sentinels that name the segments."""
    messages: list[dict[str, str]] = []
    before = ""
    for index, segment in enumerate(document.segments):
        sentinel = f"xkdsegment{index:06d}sentinel"
        if segment.role in USER_ROLES and before in USER_ROLES:
            messages[-1]["content"] += TURN_BREAK + sentinel
        else:
            role = "user" if segment.role in USER_ROLES else _CHAT_ROLES.get(segment.role, segment.role)
            messages.append({"role": role, "content": sentinel})
        before = segment.role
    return messages


_CHAT_ROLES: Final[Mapping[str, str]] = {"response": "assistant"}


def _refuse_text(document: Document, template: str) -> None:
    if any(segment.role == "text" for segment in document.segments):
        raise UsageError(
            f"{_where(document)}: plain text has no turns, the {template} template cannot be put round it",
            next="--template none",
        )


def _where(document: Document) -> str:
    return f"{document.source}:{document.line}"


TEMPLATES: Final[Mapping[str, Callable[[Document, Any], Layout]]] = {"none": _none, "alpaca": _alpaca, "chat": _chat}
"""Every template by the name that `--template` takes."""

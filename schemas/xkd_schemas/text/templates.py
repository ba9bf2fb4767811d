"""What a model sees around the text: the glue of a template before, between and behind a document's segments.

A template is per model; its text is outside the canonical text and has no interval. A layout is a function from a
document's roles to pieces: glue, or one segment. It never sees the text of a segment.

    none     nothing but the segments
    alpaca   the prompt of Stanford Alpaca, as MiniLLM and DSKD (arXiv 2406.17328) train with
    chat     the tokenizer's own chat template, which sees the row's messages and is no layout (rendered.py)
    auto     chat where the tokenizer has one, none elsewhere
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from xkd_schemas.documents import Document
from xkd_schemas.errors import UsageError

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

CHAT: Final = "chat"
AUTO: Final = "auto"
"""chat where the tokenizer has a chat template, none elsewhere."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """Either glue, or a reference to one segment."""

    glue: str = ""
    """Template text; special tokens are written out ("<|im_end|>")."""
    segment: int = -1
    """Index into the document's segments; -1 for glue."""


Layout = tuple[Piece, ...]


def layout(template: str, document: Document) -> Layout:
    """The pieces of this document under a template: each segment once, in order, with glue where there is some.

    The result depends on the document's roles only.

    Args:
        template: A key of LAYOUTS.
        document: Text is not looked at; source and line are for messages.

    Raises:
        UsageError: It has no place for these roles.
    """
    return LAYOUTS[template](document)


def check_template(name: str) -> None:
    """Raise UsageError that lists the known templates where it is none of them."""
    if name not in TEMPLATES:
        known = ", ".join((AUTO, *TEMPLATES))
        raise UsageError(f"template {name!r} is not known", fix=f"--template with one of {known}")


def chosen_template(name: str, tokenizer: Any) -> str:
    """The template that a name stands for with this tokenizer."""
    return name if name != AUTO else CHAT if tokenizer.chat_template else "none"


def _none(document: Document) -> Layout:
    return tuple(Piece(segment=index) for index in range(len(document.segments)))


def _alpaca(document: Document) -> Layout:
    roles = tuple(segment.role for segment in document.segments)
    asked, answered = (roles[:-1], True) if roles[-1:] == ("response",) else (roles, False)
    if asked not in {(), ("prompt",), ("instruction",), ("instruction", "input"), ("input",)}:
        refuse_text(document, "alpaca")
        raise UsageError(
            f"{where(document)}: the alpaca template takes instruction, input and response, found {', '.join(roles)}",
            fix="--template chat or --template none",
        )
    pieces = [Piece(glue=ALPACA_WITH_INPUT if "input" in asked else ALPACA)]
    for index, role in enumerate(asked):
        if role == "input":
            pieces.append(Piece(glue=ALPACA_INPUT))
        pieces.append(Piece(segment=index))
    pieces.append(Piece(glue=ALPACA_RESPONSE))
    return (*pieces, Piece(segment=len(asked))) if answered else tuple(pieces)


def refuse_text(document: Document, template: str) -> None:
    """Raise UsageError where the document has no turns."""
    if any(segment.role == "text" for segment in document.segments):
        raise UsageError(
            f"{where(document)}: plain text has no turns, the {template} template cannot be put round it",
            fix="--template none",
        )


def where(document: Document) -> str:
    """The row of a document, for messages."""
    return f"{document.source}:{document.line}"


LAYOUTS: Final[Mapping[str, Callable[[Document], Layout]]] = {"none": _none, "alpaca": _alpaca}
TEMPLATES: Final = (*LAYOUTS, CHAT)
"""Every template by the name that `--template` takes."""

"""Long prompts are cut before anything is parsed: their text from the end, by the tokens of one model.

The cut is a part of the documents, so that teacher and student read the same text. Template tokens count, and stay.
"""

from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from xkd_schemas.config import DocumentsSection
from xkd_schemas.documents import Document, document_of
from xkd_schemas.errors import UsageError
from xkd_schemas.text.encode import Encoder
from xkd_schemas.tokens import CONTENT, OK, Tokens

LONG_PROMPT: Final = "long_prompt"
"""Reason of a row whose prompt is too long and cannot be cut."""
PROMPTS_CUT: Final = "prompts_cut"
"""Count of documents whose prompt was cut."""
_NO_END: Final = 2**31 - 1


def prompt_encoder(documents: DocumentsSection) -> Encoder | None:
    """What counts the tokens of prompts; None without a limit."""
    if not documents.max_prompt_tokens:
        return None
    if not documents.prompt_tokenizer:
        raise UsageError(
            "documents.max_prompt_tokens is set, and no tokenizer counts them", fix="--prompt-tokenizer STUDENT"
        )
    from xkd_trainer.models.loading import load_tokenizer  # torch, for those alone who set a limit

    tokenizer = load_tokenizer(documents.prompt_tokenizer)
    return Encoder(tokenizer=tokenizer, template=documents.prompt_template, max_tokens=_NO_END)


def prompt_spec(documents: DocumentsSection) -> dict[str, Any]:
    """What a plan says of the limit of prompts: nothing without one."""
    encoder = prompt_encoder(documents)
    if encoder is None:
        return {}
    identity = {key: value for key, value in encoder.identity().items() if key != "max_tokens"}
    return {"prompts": {"tokens": documents.max_prompt_tokens, "name": documents.prompt_tokenizer, **identity}}


def cut_prompts(documents: Sequence[Document], encoder: Encoder | None, most: int) -> list[Document | None]:
    """The documents with prompts of at most `most` tokens, None for one that cannot be cut.

    That is one whose template alone is as long, and a chat row with reasoning, tools or calls. A document that the
    tokenizer cannot take stays as it is: the stages that read it say why.
    """
    if encoder is None:
        return list(documents)
    rows = encoder.encode_batch(documents)
    return [_cut(document, row, most) for document, row in zip(documents, rows, strict=True)]


def _cut(document: Document, row: Tokens, most: int) -> Document | None:
    excess = int(np.argmax(row.targets)) - most if row.status == OK else 0
    if excess <= 0:
        return document
    text_T = np.flatnonzero(row.kinds[: most + excess] == CONTENT)
    keep = len(text_T) - excess
    while keep > 0 and row.spans[text_T[keep], 0] < row.spans[text_T[keep - 1], 1]:
        keep -= 1  # pieces of one character stay together
    if document.messages or keep < 1:
        return None
    end = int(row.spans[text_T[keep - 1], 1])
    first = next(segment.start for segment in document.segments if segment.target)
    parts = [
        (s.role, document.text[s.start : s.end if s.start >= first else min(s.end, end)], s.target)
        for s in document.segments
    ]
    return document_of(parts, source=document.source, line=document.line)

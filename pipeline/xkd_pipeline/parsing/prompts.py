"""Long prompts are cut before anything is parsed: their text from the end, by the tokens of one model.

The cut is a part of the documents, so that teacher and student read the same text. Template tokens count, and stay.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

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


class PromptLimit(BaseModel):
    """The longest prompt in tokens, and whose tokens."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tokens: int = Field(default=0, ge=0)
    """Template included, up to the first target; 0: no limit."""
    tokenizer: str = ""
    """Folder or hub name."""
    template: Literal["none", "alpaca", "chat"] = "none"

    def encoder(self) -> Encoder | None:
        """What counts the tokens; None without a limit."""
        if not self.tokens:
            return None
        if not self.tokenizer:
            raise UsageError(
                "documents.max_prompt_tokens is set, and no tokenizer counts them", fix="--prompt-tokenizer STUDENT"
            )
        from xkd_trainer.models.loading import (
            load_tokenizer,  # torch and transformers, for those alone who set a limit
        )

        return Encoder(tokenizer=load_tokenizer(self.tokenizer), template=self.template, max_tokens=_NO_END)

    def spec(self) -> dict[str, Any]:
        """What a plan says of it: nothing without a limit."""
        encoder = self.encoder()
        if encoder is None:
            return {}
        identity = {key: value for key, value in encoder.identity().items() if key != "max_tokens"}
        return {"prompts": {"tokens": self.tokens, "name": self.tokenizer, **identity}}


NO_LIMIT: Final = PromptLimit()


def limit_in(section: DocumentsSection) -> PromptLimit:
    """The limit that a run file names."""
    return PromptLimit(
        tokens=section.max_prompt_tokens, tokenizer=section.prompt_tokenizer, template=section.prompt_template
    )


def limit_of(spec: Mapping[str, Any]) -> PromptLimit:
    """The limit that a documents plan names."""
    found = spec.get("prompts")
    if not found:
        return NO_LIMIT
    return PromptLimit(tokens=found["tokens"], tokenizer=found["name"], template=found["template"])


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

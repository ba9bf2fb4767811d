"""Which forms a row can have, which columns stand for which field, and which form the first rows fit."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from xkd_schemas.errors import UsageError

AUTO: Final = "auto"  # the form is looked up in the first rows


@dataclass(frozen=True, slots=True)
class Field:
    """One field of a form."""

    name: str
    role: str = ""  # segment role; empty for `messages`, whose rows bring their own
    aliases: tuple[str, ...] = ()  # column names that also stand for it, when `name` itself is not there
    required: bool = True
    target: bool = False

    def column(self, present: Sequence[str]) -> str:
        """The first of its names that the rows have, or its own.

        >>> Field("output", aliases=("response",)).column(["instruction", "response"])
        'response'
        """
        return next((name for name in (self.name, *self.aliases) if name in present), self.name)


@dataclass(frozen=True, slots=True)
class RowFormat:
    """What a row looks like; segments stand in the order of the fields."""

    title: str
    fields: tuple[Field, ...]


FORMS: Final[Mapping[str, RowFormat]] = {
    "messages": RowFormat("chat messages", (Field("messages", aliases=("conversations", "interactions")),)),
    "alpaca": RowFormat(
        "Alpaca/Dolly",
        (
            Field("instruction", "instruction"),
            Field("input", "input", ("context",), required=False),
            Field("output", "response", ("response",), target=True),
        ),
    ),
    "prompt_response": RowFormat(
        "prompt and response", (Field("prompt", "prompt"), Field("response", "response", ("completion",), target=True))
    ),
    "text": RowFormat("plain text", (Field("text", "text", target=True),)),
}
"""Every form, in the order in which they are tried."""


def check_fields(form: str, columns: Mapping[str, str]) -> None:
    """Raise UsageError where the form is not known or a mapped field is none of its fields."""
    if form not in (AUTO, *FORMS):
        raise UsageError(f"form '{form}' is not known", fix=f"use auto or one of: {', '.join(FORMS)}")
    known = list(dict.fromkeys(field.name for key, f in FORMS.items() if form in (AUTO, key) for field in f.fields))
    for field in columns:
        if field not in known:
            raise UsageError(f"columns: '{field}' is not a field", fix=f"use {', '.join(known)}, as prompt=question")


def choose_form(
    name: str, form: str, columns: Mapping[str, str], sample: Sequence[Mapping[str, object]]
) -> tuple[str, dict[str, str], tuple[str, ...]]:
    """(form, resolved columns, remarks): the form that most of the sampled rows fit, of equals the first in FORMS.

    UsageError where no sampled row fits, or no form has all mapped fields.

    Args:
        name: What the source is called in an error.
        form: A key of FORMS, or AUTO.
        columns: Field to column as mapped by the user; a form without one of these fields is left aside.
        sample: The first readable rows of the source; may be empty.
    """
    present = sorted({key for row in sample for key in row})
    candidates = [
        key for key, f in FORMS.items() if form in (AUTO, key) and set(columns) <= {field.name for field in f.fields}
    ]
    if not candidates:
        raise UsageError(f"columns: no form has all of {', '.join(columns)}", fix="map the fields of one form")
    resolved = {
        key: {f.name: columns.get(f.name) or f.column(present) for f in FORMS[key].fields} for key in candidates
    }
    if not sample:
        chosen = candidates[0] if form != AUTO or columns else "text"
        return chosen, resolved[chosen], ("no readable row to tell the form by",) if form == AUTO else ()
    needed = {key: [resolved[key][field.name] for field in FORMS[key].fields if field.required] for key in candidates}
    fitting = {k: sum(all(row.get(c) is not None for c in needed[k]) for row in sample) for k in candidates}
    chosen = max(candidates, key=lambda key: fitting[key])
    if not fitting[chosen]:
        raise UsageError(
            f"{name}: no row fits {form if form != AUTO else 'any form'}; the rows have {', '.join(present[:20])}",
            fix="say which column is which, as --column prompt=question --column response=answer",
        )
    few = fitting[chosen] < len(sample)
    remarks = [f"{fitting[chosen]} of the first {len(sample)} readable rows fit"] if few else []
    others = [key for key in candidates if key != chosen and fitting[key]]
    remarks += [f"the rows also fit {', '.join(others)}"] if others else []
    return chosen, resolved[chosen], tuple(remarks)

"""Which forms a row can have, which columns stand for which field, and which form the first rows fit."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from xkd_schemas.errors import UsageError

AUTO: Final = "auto"
"""The form is looked up in the first rows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Field:
    """One field of a form."""

    name: str
    aliases: tuple[str, ...] = ()
    """Column names that also stand for it, when `name` itself is not there."""
    required: bool = True
    role: str = ""
    """Segment role; empty for `messages`, whose rows bring their own."""
    target: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class RowFormat:
    """What a row looks like; segments stand in the order of the fields."""

    title: str
    fields: tuple[Field, ...]


FORMS: Final[Mapping[str, RowFormat]] = {
    "messages": RowFormat(
        title="chat messages", fields=(Field(name="messages", aliases=("conversations", "interactions")),)
    ),
    "alpaca": RowFormat(
        title="Alpaca/Dolly",
        fields=(
            Field(name="instruction", role="instruction"),
            Field(name="input", aliases=("context",), required=False, role="input"),
            Field(name="output", aliases=("response",), role="response", target=True),
        ),
    ),
    "prompt_response": RowFormat(
        title="prompt and response",
        fields=(
            Field(name="prompt", role="prompt"),
            Field(name="response", aliases=("completion",), role="response", target=True),
        ),
    ),
    "text": RowFormat(title="plain text", fields=(Field(name="text", role="text", target=True),)),
}
"""Every form, in the order in which they are tried."""


def find_form(name: str) -> RowFormat:
    """The form, or UsageError that lists the known ones."""
    try:
        return FORMS[name]
    except KeyError:
        known = ", ".join(FORMS)
        raise UsageError(f"form '{name}' is not known", fix=f"use auto or one of: {known}") from None


def resolve_columns(
    form: RowFormat, columns: Mapping[str, str], rows: Sequence[Mapping[str, object]]
) -> dict[str, str]:
    """Field to column: as mapped by the user, else the field's name, else the alias that the rows have.

    A field that no row has keeps its own name.

    >>> resolve_columns(FORMS["alpaca"], {}, [{"instruction": "Say hi.", "response": "Hi."}])
    {'instruction': 'instruction', 'input': 'input', 'output': 'response'}
    """
    present = {key for row in rows for key in row}
    resolved = {}
    for field in form.fields:
        names = (field.name, *field.aliases)
        resolved[field.name] = columns.get(field.name) or next((n for n in names if n in present), field.name)
    return resolved


def count_fitting(form: RowFormat, columns: Mapping[str, str], rows: Sequence[Mapping[str, object]]) -> int:
    """Rows that have all required fields of the form, none of them null; `columns` is resolved."""
    needed = [columns[field.name] for field in form.fields if field.required]
    return sum(all(row.get(column) is not None for column in needed) for row in rows)


def check_fields(form: str, columns: Mapping[str, str]) -> None:
    """Raise UsageError where the form is not known or a mapped field is none of its fields."""
    forms = FORMS.values() if form == AUTO else [find_form(form)]
    known = list(dict.fromkeys(field.name for f in forms for field in f.fields))
    for field in columns:
        if field not in known:
            raise UsageError(f"columns: '{field}' is not a field", fix=f"use {', '.join(known)}, as prompt=question")


def choose_form(
    name: str, form: str, columns: Mapping[str, str], sample: Sequence[Mapping[str, object]]
) -> tuple[str, dict[str, str], tuple[str, ...]]:
    """(form, resolved columns, remarks): the form that most of the sampled rows fit, of equals the first in FORMS.

    Args:
        name: What the source is called in an error.
        form: A key of FORMS, or AUTO.
        columns: Field to column as mapped by the user; a form without one of these fields is left aside.
        sample: The first readable rows of the source; may be empty.

    Raises:
        UsageError: no sampled row fits, or no form has all mapped fields.
    """
    candidates = [
        key for key, f in FORMS.items() if form in (AUTO, key) and set(columns) <= {field.name for field in f.fields}
    ]
    if not candidates:
        raise UsageError(f"columns: no form has all of {', '.join(columns)}", fix="map the fields of one form")
    resolved = {key: resolve_columns(FORMS[key], columns, sample) for key in candidates}
    if not sample:
        chosen = candidates[0] if form != AUTO or columns else "text"
        return chosen, resolved[chosen], ("no readable row to tell the form by",) if form == AUTO else ()
    fitting = {key: count_fitting(FORMS[key], resolved[key], sample) for key in candidates}
    chosen = max(candidates, key=lambda key: fitting[key])
    if not fitting[chosen]:
        present = ", ".join(sorted({key for row in sample for key in row})[:20])
        raise UsageError(
            f"{name}: no row fits {form if form != AUTO else 'any form'}; the rows have {present}",
            fix="say which column is which, as --column prompt=question --column response=answer",
        )
    remarks = []
    if fitting[chosen] < len(sample):
        remarks.append(f"{fitting[chosen]} of the first {len(sample)} readable rows fit")
    others = [key for key in candidates if key != chosen and fitting[key]]
    if others:
        remarks.append(f"the rows also fit {', '.join(others)}")
    return chosen, resolved[chosen], tuple(remarks)

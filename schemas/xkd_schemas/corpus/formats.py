"""Which forms a row can have, which columns stand for which field, and which form the first rows fit."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from xkd_schemas.documents import POLICY
from xkd_schemas.errors import UsageError

MOST_POLICY: Final = 40  # characters of a policy; a field of that name with longer texts is something else
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
PROMPTS: Final[Mapping[str, RowFormat]] = {
    key: RowFormat(form.title, fields)
    for key, form in FORMS.items()
    if (fields := tuple(field for field in form.fields if not field.target))
}
"""The same without what is learnt, for rows that are going to be answered."""


def check_fields(form: str, columns: Mapping[str, str]) -> None:
    """Raise UsageError where the form is not known or a mapped field is none of its fields."""
    if form not in (AUTO, *FORMS):
        raise UsageError(f"form '{form}' is not known", fix=f"use auto or one of: {', '.join(FORMS)}")
    known = list(dict.fromkeys(field.name for key, f in FORMS.items() if form in (AUTO, key) for field in f.fields))
    known += [POLICY]
    for field in columns:
        if field not in known:
            raise UsageError(f"columns: '{field}' is not a field", fix=f"use {', '.join(known)}, as prompt=question")


def choose_form(
    name: str,
    form: str,
    columns: Mapping[str, str],
    sample: Sequence[Mapping[str, object]],
    forms: Mapping[str, RowFormat] = FORMS,
) -> tuple[str, dict[str, str], tuple[str, ...]]:
    """(form, resolved columns, remarks): the form that most of the sampled rows fit, of equals the first in `forms`.

    UsageError where no sampled row fits, or no form has all mapped fields.

    Args:
        name: What the source is called in an error.
        form: A key of FORMS, or AUTO.
        columns: Field to column as mapped by the user; a form without one of these fields is left aside.
        sample: The first readable rows of the source; may be empty.
        forms: FORMS, or PROMPTS of rows that need no response.
    """
    if form not in (AUTO, *forms):
        raise UsageError(f"{name}: rows of the form {form} have no prompt", fix="name rows with prompts or messages")
    present = sorted({key for row in sample for key in row})
    candidates = [
        key
        for key, f in forms.items()
        if form in (AUTO, key) and set(columns) <= {POLICY, *(field.name for field in f.fields)}
    ]
    if not candidates:
        raise UsageError(f"columns: no form has all of {', '.join(columns)}", fix="map the fields of one form")
    policy = {POLICY: column} if _is_policy(sample, column := columns.get(POLICY, POLICY)) else {}
    resolved = {
        key: {f.name: columns.get(f.name) or f.column(present) for f in forms[key].fields} | policy
        for key in candidates
    }
    if not sample:
        chosen = candidates[0 if form != AUTO or columns else -1]
        return chosen, resolved[chosen], ("no readable row to tell the form by",) if form == AUTO else ()
    needed = {key: [resolved[key][field.name] for field in forms[key].fields if field.required] for key in candidates}
    fitting = {k: sum(all(row.get(c) is not None for c in needed[k]) for row in sample) for k in candidates}
    chosen = max(candidates, key=lambda key: fitting[key])
    if not fitting[chosen]:
        absent = [column for column in columns.values() if column not in present]
        wanted = f"has {' and '.join(absent)}" if absent else f"fits {form if form != AUTO else 'any form'}"
        raise UsageError(
            f"{name}: no row {wanted}; the rows have {', '.join(present[:20])}",
            fix="say which column is which, as --column prompt=question --column response=answer",
        )
    few = fitting[chosen] < len(sample)
    remarks = [f"{fitting[chosen]} of the first {len(sample)} readable rows fit"] if few else []
    others = [key for key in candidates if key != chosen and fitting[key]]
    remarks += [f"the rows also fit {', '.join(others)}"] if others else []
    return chosen, resolved[chosen], tuple(remarks)


def _is_policy(sample: Sequence[Mapping[str, object]], column: str) -> bool:
    """Whether the rows say in this column who wrote their responses."""
    found = [row[column] for row in sample if row.get(column) is not None]
    return bool(found) and all(isinstance(value, str) and len(value) <= MOST_POLICY for value in found)

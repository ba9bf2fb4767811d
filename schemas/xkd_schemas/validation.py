"""What pydantic finds wrong with a run file or with settings, as one line that says what to change."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from xkd_schemas.errors import UsageError


def run_error(path: str, typed: Mapping[str, str], error: ValidationError, model: type[BaseModel]) -> UsageError:
    """The first mistake in a run file, which begins with the flag, `--set` or file that made it.

    `typed` says which flag set a key, `path` names the file, and the keys that `model` has are suggested.
    """
    first = error.errors()[0]
    dotted = ".".join(str(part) for part in first["loc"])
    said = [name for key, name in typed.items() if f"{dotted}.".startswith(f"{key}.") or key.startswith(f"{dotted}.")]
    where = said[-1] if said else path
    if first["type"] == "extra_forbidden":
        *sections, key = map(str, first["loc"])
        section: Any = model
        for name in sections:
            section = section.model_fields[name].annotation
        return UsageError(f"{where}: {dotted!r} is not a key", fix=_suggest(key, section.model_fields))
    name = dotted if where in ("--set", "--vary", path) else where
    what = f"{first['msg'].removeprefix('Value error, ')}, found {first['input']!r}"
    return UsageError(f"{where}: {what}" if name == where else f"{where}: {dotted}: {what}", fix=f"change {name}")


def settings_error(loss: str, error: ValidationError, fields: Iterable[str]) -> UsageError:
    """The first mistake in the settings of a loss; `fields` are those that it has."""
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return UsageError(f"losses.{loss}: {key!r} is not a setting", fix=_suggest(key, fields))
    return UsageError(f"losses.{loss}.{key}: {first['msg']}, found {first['input']!r}", fix=f"change {key}")


def _suggest(key: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(key, list(known), n=1)
    return f"did you mean {near[0]!r}?" if near else f"use one of: {', '.join(known)}"

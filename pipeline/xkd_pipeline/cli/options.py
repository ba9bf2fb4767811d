"""What several commands read out of their flags, and how they speak while they work."""

from collections.abc import Callable
from typing import Annotated

import typer

from xkd_schemas.console import say

ThinkingOption = Annotated[
    str | None, typer.Option(metavar="true|false", help="enable_thinking for the chat template; its own unless given.")
]


def names_of(text: str | None) -> list[str]:
    """The parts of `a,b`.

    >>> names_of("mta, sra,")
    ['mta', 'sra']
    """
    return [part.strip() for part in (text or "").split(",") if part.strip()]


def numbers_of(text: str | None) -> list[int] | None:
    """The layers of `22,30`; None where none were given."""
    try:
        return None if text is None else [int(part) for part in names_of(text)]
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a list of layer numbers like 22,30") from None


def echo_for(as_json: bool) -> Callable[[str], None]:
    """Where lines go while a command works: with --json, standard output holds one object and nothing else."""
    return _silent if as_json else say


def _silent(_line: str) -> None: ...

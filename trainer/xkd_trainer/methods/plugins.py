"""Losses of other packages: entry points of the group `xkd.losses`, each a Declaration under its own name."""

import functools
from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Final

from xkd_schemas.errors import UsageError
from xkd_trainer.methods.declaration import Declaration

GROUP: Final = "xkd.losses"


@functools.cache
def installed() -> Mapping[str, EntryPoint]:
    """Entry points by name, sorted; nothing of them is imported yet.

    Raises:
        UsageError: Two packages give the same name.
    """
    found: dict[str, EntryPoint] = {}
    for point in sorted(entry_points(group=GROUP), key=lambda p: (p.name, p.value)):
        other = found.setdefault(point.name, point)
        if other.value != point.value:
            raise UsageError(
                f"loss {point.name!r} is declared twice: {other.value} and {point.value}",
                next="uninstall one of the two packages",
            )
    return found


def load(name: str, point: EntryPoint) -> Declaration:
    """The declaration behind an entry point.

    Raises:
        UsageError: It cannot be imported, or is no Declaration of that name.
    """
    where = f"loss {name!r} ({point.value}{f' of {point.dist.name}' if point.dist else ''})"
    try:
        declaration = point.load()
    except Exception as error:  # whatever a foreign module does when imported
        raise UsageError(
            f"{where} cannot be imported: {type(error).__name__}: {error}", next="mend or uninstall that package"
        ) from error
    if not isinstance(declaration, Declaration) or declaration.name != name:
        raise UsageError(
            f"{where} is no Declaration named {name!r}", next="see docs/adding-a-loss.md for what a loss declares"
        )
    return declaration

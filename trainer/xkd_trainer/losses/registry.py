"""How each loss is wired: its settings, the signals it needs, its projectors, and the terms it makes of a batch.

The mathematics is in xkd_trainer.losses. A new loss is one file here and one line below, or a package of its own
(docs/adding-a-loss.md).
"""

import functools
from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Final

from xkd_schemas.errors import UsageError
from xkd_trainer.losses import registry as plugins
from xkd_trainer.losses.baselines.alm import ALM
from xkd_trainer.losses.baselines.dskd import DSKD, DSKD_CMA
from xkd_trainer.losses.baselines.dskd_v2 import DSKD_V2
from xkd_trainer.losses.baselines.fdd import FDD
from xkd_trainer.losses.baselines.kl import KL
from xkd_trainer.losses.baselines.mined import MINED
from xkd_trainer.losses.baselines.multilevelot import MULTILEVELOT
from xkd_trainer.losses.baselines.rskd import RSKD
from xkd_trainer.losses.baselines.uld import ULD
from xkd_trainer.losses.ce import CE
from xkd_trainer.losses.declaration import Declaration
from xkd_trainer.losses.dwa import DWA
from xkd_trainer.losses.mta import MTA
from xkd_trainer.losses.sra import SRA

LOSSES: Mapping[str, Declaration] = {
    d.name: d for d in (CE, KL, RSKD, FDD, MTA, SRA, DWA, DSKD, DSKD_CMA, DSKD_V2, ALM, MINED, ULD, MULTILEVELOT)
}
"""The losses that come with XKD."""


def loss_names() -> tuple[str, ...]:
    """Ours in their order, then those of installed packages; a package cannot replace one of ours.

    Raises:
        UsageError: A package declares a loss under one of our names.
    """
    foreign = plugins.installed()
    for name in LOSSES:
        if name in foreign:
            raise UsageError(
                f"{foreign[name].value} declares a loss named {name!r}, which is one of XKD's",
                fix="give it another name, or uninstall that package",
            )
    return (*LOSSES, *foreign)


def loss_named(name: str) -> Declaration:
    """The declaration of a loss; UsageError lists the known ones."""
    if name in LOSSES:
        return LOSSES[name]
    if name not in loss_names():
        raise UsageError(f"{name!r} is not a loss", fix=f"use one of: {', '.join(loss_names())}")
    return plugins.load(name, plugins.installed()[name])


# Losses of other packages: entry points of the group `xkd.losses`, each a Declaration under its own name.


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
                fix="uninstall one of the two packages",
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
            f"{where} cannot be imported: {type(error).__name__}: {error}", fix="mend or uninstall that package"
        ) from error
    if not isinstance(declaration, Declaration) or declaration.name != name:
        raise UsageError(
            f"{where} is no Declaration named {name!r}", fix="see docs/adding-a-loss.md for what a loss declares"
        )
    return declaration

"""How each loss is wired: its settings, the signals it needs, its projectors, and the terms it makes of a batch.

The mathematics is in xkd_trainer.losses. A new loss is one file here and one line below, or a package of its own
(docs/adding-a-loss.md).
"""

from collections.abc import Mapping

from xkd_schemas.errors import UsageError
from xkd_trainer.methods import plugins
from xkd_trainer.methods.alm import ALM
from xkd_trainer.methods.ce import CE
from xkd_trainer.methods.declaration import Declaration
from xkd_trainer.methods.dskd import DSKD, DSKD_CMA
from xkd_trainer.methods.dskd_v2 import DSKD_V2
from xkd_trainer.methods.dwa import DWA
from xkd_trainer.methods.fdd import FDD
from xkd_trainer.methods.kl import KL
from xkd_trainer.methods.mined import MINED
from xkd_trainer.methods.mta import MTA
from xkd_trainer.methods.multilevelot import MULTILEVELOT
from xkd_trainer.methods.rskd import RSKD
from xkd_trainer.methods.sra import SRA
from xkd_trainer.methods.uld import ULD

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
                next="give it another name, or uninstall that package",
            )
    return (*LOSSES, *foreign)


def loss_named(name: str) -> Declaration:
    """The declaration of a loss; UsageError lists the known ones."""
    if name in LOSSES:
        return LOSSES[name]
    if name not in loss_names():
        raise UsageError(f"{name!r} is not a loss", next=f"use one of: {', '.join(loss_names())}")
    return plugins.load(name, plugins.installed()[name])

"""How each loss is wired: its settings, the signals it needs, its projectors, and the terms it makes of a batch.

The mathematics is in xkd_trainer.losses. A new loss is one file here and one line below.
"""

from collections.abc import Mapping

from xkd_schemas.errors import UsageError
from xkd_trainer.methods.ce import CE
from xkd_trainer.methods.declaration import Declaration
from xkd_trainer.methods.dwa import DWA
from xkd_trainer.methods.mta import MTA
from xkd_trainer.methods.sra import SRA

LOSSES: Mapping[str, Declaration] = {d.name: d for d in (CE, MTA, SRA, DWA)}


def loss_named(name: str) -> Declaration:
    """The declaration of a loss; UsageError lists the known ones."""
    if name not in LOSSES:
        raise UsageError(f"{name!r} is not a loss", next=f"use one of: {', '.join(LOSSES)}")
    return LOSSES[name]

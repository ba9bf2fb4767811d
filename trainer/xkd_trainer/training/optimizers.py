"""Optimizers by the name that the run file gives them."""

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Final

import torch

from xkd_schemas.errors import UsageError

Groups = Sequence[Mapping[str, Any]]


def _adamw_8bit(groups: Groups) -> Any:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UsageError(
            "--optimizer adamw_8bit needs bitsandbytes, which is not installed here",
            fix="pip install bitsandbytes, or --optimizer adafactor",
        )
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit(groups)


OPTIMIZERS: Final[Mapping[str, Callable[[Any], Any]]] = {
    "adamw": torch.optim.AdamW,
    "adamw_fused": partial(torch.optim.AdamW, fused=True),
    "adafactor": torch.optim.Adafactor,
    "adamw_8bit": _adamw_8bit,
}


def make_optimizer(name: str, groups: Groups) -> Any:
    """An optimizer of some groups of parameters, each with its rate and decay; UsageError where it cannot be had.

    The rate of adafactor is a share of each matrix's own size, and at most one over the root of the step.
    """
    return OPTIMIZERS[name]([dict(group) for group in groups])

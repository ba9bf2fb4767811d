"""The losses by name, those of installed packages among them, and what `--loss` says as weights.

A new loss is one file in this folder and one line below, or a package of its own (docs/adding-a-loss.md): an entry
point of the group `xkd.losses`, a `Declaration` under its own name. A loss alone is its paper's whole recipe,
cross-entropy included: docs/losses.md has the rule in words, docs/decisions/0017-paper-weights.md the reasons.
"""

import functools
import re
from collections.abc import Iterable, Mapping
from importlib.metadata import EntryPoint, entry_points
from pkgutil import resolve_name
from typing import Any, Final

from xkd_schemas.errors import UsageError
from xkd_trainer.losses.declaration import Declaration, Loss

GROUP: Final = "xkd.losses"

LOSSES: Mapping[str, str] = {
    "ce": "baselines.kl:CE",
    "kl": "baselines.kl:KL",
    "rskd": "baselines.kl:RSKD",
    "fdd": "baselines.fdd:FDD",
    "mta": "mta:MTA",
    "sra": "sra:SRA",
    "dwa": "dwa:DWA",
    "dskd": "baselines.dskd:DSKD",
    "dskd_cma": "baselines.dskd:DSKD_CMA",
    "dskd_cma_ga": "baselines.dskd:DSKD_CMA_GA",
    "dskd_v2": "baselines.dskd:DSKD_V2",
    "alm": "baselines.alm:ALM",
    "gold": "baselines.gold:GOLD",
    "simct": "baselines.simct:SIMCT",
    "xtoken_p": "baselines.xtoken:XTOKEN_P",
    "xtoken_h": "baselines.xtoken:XTOKEN_H",
    "mined": "baselines.mined:MINED",
    "uld": "baselines.uld:ULD",
    "multilevelot": "baselines.multilevelot:MULTILEVELOT",
}
"""The losses that come with XKD: where in this folder each is declared. Only what a run names is imported."""


def loss_names() -> tuple[str, ...]:
    """Ours in their order, then those of installed packages; UsageError where one of those has a name of ours."""
    foreign = find_installed()
    for name in LOSSES:
        if name in foreign:
            raise UsageError(
                f"{foreign[name].value} declares a loss named {name!r}, which is one of XKD's",
                fix="give it another name, or uninstall that package",
            )
    return (*LOSSES, *foreign)


def loss_named(name: str) -> Declaration:
    """The declaration of a loss; UsageError lists the known ones, or says what is wrong with a package's."""
    if name in LOSSES:
        ours: Declaration = resolve_name(f"xkd_trainer.losses.{LOSSES[name]}")
        return ours
    if name not in loss_names():
        raise UsageError(f"{name!r} is not a loss", fix=f"use one of: {', '.join(loss_names())}")
    point = find_installed()[name]
    where = f"loss {name!r} ({point.value}{f' of {point.dist.name}' if point.dist else ''})"
    try:
        declaration = point.load()
    except Exception as error:  # whatever a foreign module does when imported
        raise UsageError(
            f"{where} cannot be imported: {type(error).__name__}: {error}", fix="fix or uninstall that package"
        ) from error
    if not isinstance(declaration, Declaration) or declaration.name != name:
        raise UsageError(
            f"{where} is no Declaration named {name!r}", fix="see docs/adding-a-loss.md for what a loss declares"
        )
    return declaration


def settings_of(names: Iterable[str], values: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Settings of the named losses and of all that have values; UsageError where a loss or setting is not known."""
    return {name: loss_named(name).parse(values.get(name, {})) for name in (*names, *sorted(values))}


@functools.cache
def find_installed() -> Mapping[str, EntryPoint]:
    """Entry points by name, sorted, not imported yet; UsageError where two packages give the same name."""
    found: dict[str, EntryPoint] = {}
    for point in sorted(entry_points(group=GROUP), key=lambda p: (p.name, p.value)):
        other = found.setdefault(point.name, point)
        if other.value != point.value:
            raise UsageError(
                f"loss {point.name!r} is declared twice: {other.value} and {point.value}",
                fix="uninstall one of the two packages",
            )
    return found


# -- what `--loss` says


HOW = "losses are joined by +, and NAME=NUMBER, a number from 0 on, multiplies what the paper gives that loss"
_PART = re.compile(r"([A-Za-z]\w*)\s*(?:=\s*(\d+\.?\d*(?:e-?\d{1,2})?|\.\d+))?", re.ASCII)


def parse_loss(text: str) -> dict[str, float]:
    """`mta+sra=2` as factors; a loss that weighs 0 is left out.

    >>> parse_loss("sra")
    {'ce': 0.5, 'sra': 0.5}
    >>> parse_loss("kl+mta"), parse_loss("mta+sra+dwa")
    ({'kl': 1.0, 'mta': 1.0}, {'ce': 0.5, 'mta': 0.5, 'sra': 0.5, 'dwa': 1.0})
    >>> parse_loss("ce=0+sra=2")
    {'sra': 1.0}

    Raises:
        UsageError: A loss is not known, twice there, or its number is none from 0 on; nothing weighs more than 0; or
            the text is in the spelling of earlier versions, where numbers meant something else.
    """
    if "," in text:
        raise _refuse_earlier(text)
    multiples: dict[str, float] = {}
    for part in map(str.strip, text.split("+")):
        found = _PART.fullmatch(part)
        name = found[1] if found else part.partition("=")[0].strip()
        loss_named(name)
        if not found or name in multiples:
            negative = re.fullmatch(r"\s*-\s*[\d.]+", part.partition("=")[2])
            fault = f"{part} is negative" if negative else f"{part!r} is not NAME or NAME=NUMBER"
            twice = f"{part!r} names a loss that is there before"
            raise UsageError(f"--loss {text}: {twice if name in multiples else fault}", fix=HOW)
        multiples[name] = float(found[2] or 1)
    if "=" in text and len(multiples) == 1 and "ce" not in multiples:
        raise _refuse_earlier(text)
    weights = _weigh_as_papers(multiples) | {name: value for name, value in multiples.items() if name == "ce"}
    kept = {name: weights[name] for name in ("ce", *multiples) if weights[name] > 0}
    if not kept:
        raise UsageError(f"--loss {text}: every loss weighs 0", fix=HOW)
    return kept


def _weigh_as_papers(multiples: Mapping[str, float]) -> dict[str, float]:
    """What the papers say, times the multiples; cross-entropy as the papers of the others have it."""
    declared = {name: loss_named(name) for name in multiples if name != "ce"}
    bases = [d for d in declared.values() if not d.plug_in] or list(declared.values())
    beside = max((d.default_weight if d.plug_weight is None else d.plug_weight for d in bases), default=1.0)
    weights = {n: (beside if d.plug_in else d.default_weight) * multiples[n] for n, d in declared.items()}
    return weights | {"ce": max((d.ce_weight for d in bases), default=1.0)}


def _refuse_earlier(text: str) -> UsageError:
    """A text that meant something else when a number was a weight and ce was 1 unless given."""
    names = [part.partition("=")[0].strip() for part in text.split(",") if part.strip()]
    for name in names:
        loss_named(name)
    new = "+".join(dict.fromkeys(name for name in names if name != "ce")) or "ce"
    more = HOW if "," in text else f"--loss ce=1+{new}=2 gives {new} twice its weight beside 1 ce"
    return UsageError(
        f"--loss {text} is not written so any more", fix=f"--loss {new} is {formula(parse_loss(new))}; {more}"
    )


def formula(weights: Mapping[str, float], terms: Mapping[str, str] | None = None) -> str:
    """Weights as a sum: `0.5 ce + 0.5 sra`, with `terms` in place of names."""
    return " + ".join(f"{weight:g} {(terms or {}).get(name, name)}" for name, weight in weights.items())


def term_weights(weights: Mapping[str, float], losses: Mapping[str, Loss], step: int) -> dict[str, float]:
    """What each term LOSS.TERM is multiplied by at an optimizer step, without those that are 0."""
    return {
        f"{name}.{term}": weight * factor
        for name, weight in weights.items()
        for term, factor in losses[name].weights(step).items()
        if factor
    }


def describe_weights(weights: Mapping[str, float], losses: Mapping[str, Loss], last: int) -> str:
    """The whole sum with every loss's terms, as it is at the last step and, where that differs, at the first.

    For example `0.5 ce + 0.5 (sra.cos 1 + sra.geo 50 + sra.kd 1)`.
    """
    texts = {}
    for name in weights:
        first, then = losses[name].weights(0), losses[name].weights(last)
        changes = {term: ("" if first[term] == then[term] else f"{first[term]:g} to ") for term in then}
        terms = [f"{name}.{term} {changes[term]}{then[term]:g}" for term in then if first[term] or then[term]]
        texts[name] = name if terms == [f"{name}.{name} 1"] else f"({' + '.join(terms)})"
    return formula(weights, texts)

"""What `--loss` says as weights: a loss alone is its paper's whole recipe, cross-entropy included.

docs/losses.md has the rule in words, docs/decisions/0017-paper-weights.md the reasons.
"""

import re
from collections.abc import Mapping

from xkd_schemas.errors import UsageError
from xkd_trainer.losses.declaration import Declaration, Loss
from xkd_trainer.losses.registry import loss_named

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
        UsageError: A loss is not known, twice there, or its number is none from 0 on; or the text is in the spelling
            of earlier versions, where numbers meant something else.
    """
    if "," in text:
        raise _earlier(text)
    multiples: dict[str, float] = {}
    for part in text.split("+"):
        found = _PART.fullmatch(part.strip())
        name = found[1] if found else part.partition("=")[0].strip()
        loss_named(name)
        if not found or name in multiples:
            raise UsageError(f"--loss {text}: {_fault(part.strip(), name in multiples)}", fix=HOW)
        multiples[name] = float(found[2] or 1)
    if "=" in text and len(multiples) == 1 and "ce" not in multiples:
        raise _earlier(text)
    weights = _own(multiples) | {name: value for name, value in multiples.items() if name == "ce"}
    return {name: weights[name] for name in ("ce", *multiples) if weights[name] > 0}


def _fault(part: str, twice: bool) -> str:
    """What is wrong with a part of `--loss`.

    >>> _fault("mta=-1", False), _fault("mta=x", False)
    ('mta=-1 is negative', "'mta=x' is not NAME or NAME=NUMBER")
    """
    if twice:
        return f"{part!r} names a loss that is there before"
    negative = re.fullmatch(r"\s*-\s*[\d.]+", part.partition("=")[2])
    return f"{part} is negative" if negative else f"{part!r} is not NAME or NAME=NUMBER"


def _own(multiples: Mapping[str, float]) -> dict[str, float]:
    """What the papers say, times the multiples; cross-entropy as the papers of the others have it."""
    declared = {name: loss_named(name) for name in multiples if name != "ce"}
    bases = [d for d in declared.values() if not d.plug_in] or list(declared.values())
    beside = max((_beside(d) for d in bases), default=1.0)
    weights = {n: (beside if d.plug_in else d.default_weight) * multiples[n] for n, d in declared.items()}
    return weights | {"ce": max((d.ce_weight for d in bases), default=1.0)}


def _beside(declaration: Declaration) -> float:
    """What a plug-in weighs beside a loss."""
    return declaration.default_weight if declaration.plug_weight is None else declaration.plug_weight


def _earlier(text: str) -> UsageError:
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
    return " + ".join(f"{weight:g} {(terms or {}).get(name, name)}" for name, weight in weights.items()) or "nothing"


def term_weights(weights: Mapping[str, float], losses: Mapping[str, Loss], step: int) -> dict[str, float]:
    """What each term LOSS.TERM is multiplied by at an optimizer step, without those that are 0."""
    return {
        f"{name}.{term}": weight * factor
        for name, weight in weights.items()
        for term, factor in losses[name].weights(step).items()
        if factor
    }


def described(weights: Mapping[str, float], losses: Mapping[str, Loss], last: int) -> str:
    """The whole sum with every loss's terms, as it is at the last step and, where that differs, at the first.

    For example `0.5 ce + 0.5 (sra.cos 1 + sra.geo 50 + sra.kd 1)`.
    """
    return formula(
        weights, {name: _terms(name, losses[name].weights(0), losses[name].weights(last)) for name in weights}
    )


def _terms(name: str, first: Mapping[str, float], last: Mapping[str, float]) -> str:
    shown = {term: _change(first[term], last[term]) for term in last if first[term] or last[term]}
    if list(shown.items()) == [(name, "1")]:
        return name
    return f"({' + '.join(f'{name}.{term} {value}' for term, value in shown.items())})"


def _change(first: float, last: float) -> str:
    return f"{last:g}" if first == last else f"{first:g} to {last:g}"

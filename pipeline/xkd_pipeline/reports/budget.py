"""How a plan gets below a budget: steps down, each with its price in what the student no longer learns."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

from xkd_schemas.config import RunConfig
from xkd_schemas.errors import UsageError

_FACTORS: Final = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
FEW_DRAWS: Final = 8
"""Drawn classes of a prediction below which a plan does not go."""
_SIZE: Final = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(I?)B?")


def bytes_named(text: str) -> int:
    """A size as people write it; GB is 10^9 bytes, GiB 2^30.

    >>> bytes_named("200GB"), bytes_named("1.5 MiB")
    (200000000000, 1572864)

    Raises:
        UsageError: It is no size.
    """
    found = _SIZE.fullmatch(text.strip().upper())
    if found is None:
        raise UsageError(f"{text!r} is no size", fix="e.g. --budget 200GB")
    factor = _FACTORS[found[2]] if not found[3] else 2 ** (10 * list(_FACTORS).index(found[2]))
    return int(float(found[1]) * factor)


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One way down."""

    flags: str
    """What to type; TOP stands for the last layer, LOSSES for the losses that are left."""
    cost: str
    change: Callable[[RunConfig, int], RunConfig | None]
    """From the run and the teacher's number of layers to the smaller run; None where it changes nothing."""


def _coded(codec: str, *instead_of: str) -> Callable[[RunConfig, int], RunConfig | None]:
    def change(run: RunConfig, _layers: int) -> RunConfig | None:
        if run.teacher.codec not in instead_of:
            return None
        return run.model_copy(update={"teacher": run.teacher.model_copy(update={"codec": codec})})

    return change


def _without_hid(run: RunConfig, _layers: int) -> RunConfig | None:
    mta = run.losses.get("mta", {})
    if "mta" not in run.teacher.losses or mta.get("hid") == "off":
        return None
    return run.model_copy(update={"losses": {**run.losses, "mta": {**mta, "hid": "off"}}})


def _hid_of_spans(run: RunConfig, _layers: int) -> RunConfig | None:
    mta = run.losses.get("mta", {})
    if "mta" not in run.teacher.losses or mta.get("hid") != "token":
        return None
    return run.model_copy(update={"losses": {**run.losses, "mta": {**mta, "hid": "spans"}}})


def _top_phrases(run: RunConfig, layers: int) -> RunConfig | None:
    if "mta" not in run.teacher.losses or tuple(run.teacher.phrase_layers) == (layers,):
        return None
    return run.model_copy(update={"teacher": run.teacher.model_copy(update={"phrase_layers": (layers,)})})


def _drawn(run: RunConfig, _layers: int) -> RunConfig | None:
    kl = run.losses.get("kl", {})
    plain = kl.get("divergence", "forward_kl") == "forward_kl" and kl.get("temperature", 1.0) == 1.0
    if "kl" not in run.teacher.losses or not plain:
        return None
    kept = tuple(dict.fromkeys("rskd" if name == "kl" else name for name in run.teacher.losses))
    return run.model_copy(update={"teacher": run.teacher.model_copy(update={"losses": kept})})


def _fewer_draws(run: RunConfig, _layers: int) -> RunConfig | None:
    if "rskd" not in run.teacher.losses or run.teacher.samples <= FEW_DRAWS:
        return None
    return run.model_copy(update={"teacher": run.teacher.model_copy(update={"samples": FEW_DRAWS})})


def _without(*names: str) -> Callable[[RunConfig, int], RunConfig | None]:
    def change(run: RunConfig, _layers: int) -> RunConfig | None:
        kept = tuple(name for name in run.teacher.losses if name not in names)
        if kept == run.teacher.losses:
            return None
        return run.model_copy(update={"teacher": run.teacher.model_copy(update={"losses": kept})})

    return change


STEPS: Final = (
    Step(flags="--codec bf16-planes", change=_coded("bf16-planes", "bf16"), cost="nothing is lost; reading unpacks"),
    Step(flags="--codec int8", change=_coded("int8", "bf16", "bf16-planes"),
         cost="states rounded to 255 steps; the manifest's codec_error says how much that is on your data"),
    Step(flags="--for LOSSES", change=_drawn,
         cost="KL from drawn classes (rskd): its gradient is right on average, a prediction's is off by about 0.2 of "
         "the teacher's probabilities with 16 of them; the manifest's codec_error says how much on your data"),
    Step(flags="--set teacher.samples=8", change=_fewer_draws,
         cost="rskd stays right on average; a prediction's error grows to about 0.35 of the probabilities"),
    Step(flags="--set losses.mta.hid=spans", change=_hid_of_spans,
         cost="MTA's Hid compares span vectors, not the states of tokens; its geometry term DSA stays exact"),
    Step(flags="--for LOSSES", change=_without("fdd"), cost="no FDD; the other losses stay exact"),
    Step(flags="--set losses.mta.hid=off", change=_without_hid,
         cost="MTA loses its Hid term (span vectors); its geometry term DSA stays exact"),
    Step(flags="--phrase-layers TOP", change=_top_phrases,
         cost="MTA compares phrases in the last layer only, not at two depths"),
    Step(flags="--for LOSSES", change=_without("mta"), cost="no MTA; SRA and DWA stay exact"),
    Step(flags="--for LOSSES", change=_without("sra", "dwa"),
         cost="no loss is left but cross-entropy; what remains serves evaluation"),
)  # fmt: skip
"""From the least harm to the most."""


def way_down(
    run: RunConfig, layers: int, size_of: Callable[[RunConfig], int], budget: int
) -> Iterator[tuple[dict[str, Any], RunConfig]]:
    """Steps one after the other until the size is within the budget; a step that saves nothing is left out.

    Yields what the step is (flags, cost, bytes after it) and the run after it.
    """
    size = size_of(run)
    for step in STEPS:
        if size <= budget:
            return
        smaller = step.change(run, layers)
        if smaller is None or (after := size_of(smaller)) >= size:
            continue
        run, size = smaller, after
        left = ",".join(run.teacher.losses)
        flags = step.flags.replace("TOP", str(layers)).replace("LOSSES", left) if left else "teacher.losses = []"
        yield {"flags": flags, "cost": step.cost, "bytes": size, "fits": size <= budget}, run

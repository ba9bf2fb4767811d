"""The wide signals of one unit through their codec, with the error that it made on just these numbers."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from xkd_schemas.cache.manifest import Commit
from xkd_schemas.codecs import CODECS, PLAIN, Bits, Encoded, numbers_of, squared_error
from xkd_schemas.signals import Signal
from xkd_trainer.models.architecture import Head

KL_ROWS = 32
"""States of a unit whose next-token distributions are compared before and after the codec."""


def encode_signals(
    captured: Sequence[Mapping[str, Any]], wanted: Sequence[Signal], codec: str, head: Head
) -> tuple[Encoded, dict[str, float]]:
    """All signals of a unit as columns, wide ones through `codec`, and sums of errors for the unit's record."""
    made, sums = Encoded({}, {}), dict[str, float]()
    for signal in wanted:
        rows = [row[signal.column] for row in captured]
        sums.update(_sum_capture_errors(signal.column, captured))
        if not signal.kind.wide or codec == PLAIN:
            made.columns[signal.column] = rows
            continue
        encoded = CODECS[codec].encode(signal.column, rows)
        again = [
            CODECS[codec].decode(signal.column, {name: c[i] for name, c in encoded.columns.items()}.__getitem__,
                                 encoded.metadata)
            for i in range(len(rows))
        ]  # fmt: skip
        made.columns.update(encoded.columns)
        made.metadata.update(encoded.metadata)
        lost, kept = squared_error(rows, again)
        sums.update({f"codec:{signal.column}:lost": lost, f"codec:{signal.column}:kept": kept})
        if signal.name == "hidden_last" and rows:
            sums.update(_measure_kl(rows, again, head))
    return made, sums


def _sum_capture_errors(column: str, captured: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Squared error that capture itself made and noted beside the column, and what it is a part of; {} for none."""
    noted = [row for row in captured if f"{column}.lost" in row]
    sums = {part: sum(float(np.sum(row[f"{column}.{part}"])) for row in noted) for part in ("lost", "kept")}
    return {f"codec:{column}:{part}": value for part, value in sums.items()} if noted else {}


def _measure_kl(rows: Sequence[Bits], again: Sequence[Bits], head: Head) -> dict[str, float]:
    """Sum over some states of KL(head of the exact state || head of the stored one), in nats, and their number."""
    exact_ND, stored_ND = (np.concatenate(list(side)) for side in (rows, again))
    chosen = np.unique(np.linspace(0, max(0, len(exact_ND) - 1), min(KL_ROWS, len(exact_ND))).astype(np.int64))
    states = (torch.from_numpy(numbers_of(bits[chosen])).to(head.weight_VD) for bits in (exact_ND, stored_ND))
    exact, stored = (head(values).float().log_softmax(-1) for values in states)
    kl = float((exact.exp() * (exact - stored)).sum())
    return {"codec:kl": kl, "codec:kl_n": float(len(chosen))}


def codec_error(commits: Sequence[Commit]) -> dict[str, float]:
    """Relative root-mean-square error of each coded signal, and the mean KL in nats of the last states.

    Empty where nothing was coded.
    """
    total: dict[str, float] = {}
    for commit in commits:
        for name, value in commit.sums.items():
            if name.startswith("codec:"):
                total[name.removeprefix("codec:")] = total.get(name.removeprefix("codec:"), 0.0) + value
    signals = sorted(name.removesuffix(":kept") for name in total if name.endswith(":kept"))
    found = {
        s: float(np.sqrt(total[f"{s}:lost"] / total[f"{s}:kept"])) if total[f"{s}:kept"] else 0.0 for s in signals
    }
    return found | ({"kl_nats": total["kl"] / max(1.0, total["kl_n"])} if "kl" in total else {})

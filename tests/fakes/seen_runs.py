"""Folders as runs leave them, without a model: metrics, times, settings."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xkd_schemas.durable_files import digest


def seen_run(
    out: Path, *, steps: int = 40, slope: float = 1.0, settings: Mapping[str, Any] | None = None,
    term: str = "sra.cos", finished: bool = True,
) -> Path:  # fmt: skip
    """A run that logs every second step and evaluates every eighth; the best evaluation is not the last."""
    out.mkdir(parents=True)
    metrics: list[dict[str, float]] = []
    for step in range(2, steps + 1, 2):
        loss = 6 * math.exp(-slope * step / 20) + 2 + 0.2 * math.sin(step)
        term_values = {"ce.ce": 0.7 * loss, term: 0.3 * loss, "ce.ce.count": 400.0 + step, f"{term}.count": 24.0}
        metrics.append({"step": step, "grad_norm": 3 / loss, "lr": 5e-4 * step / steps, "loss": loss, **term_values})
        if step % 8 == 0:
            bits = 2 + abs(step - 24) / (20 * slope)
            metrics.append(
                {"step": step, "eval.bytes": 900.0, "eval.bits_per_byte": bits, "eval.agreement": 10.0 + step}
            )
    timing = {"total": steps, "steps": 2, "seconds_per_step": 0.5 / slope, "tokens_per_second": 2000.0 * slope}
    timing |= {"waiting_share": 0.01, "peak_memory_bytes": 3 * 2**30}
    times = [{"step": step, **timing} for step in range(2, steps + 1, 2)]
    for name, lines in (("metrics", metrics), ("timing", times)):
        (out / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found: dict[str, Any] = {
        "run": {"steps": steps, "train": {"lr": 5e-4, "loss": "ce", **(settings or {})}},
        "files": {},
    }
    if finished:
        (out / "xkd.json").write_text(json.dumps({**found, "digest": digest(found)}))
    return out

"""What a cache of 100 million tokens costs with a 7B teacher, by arithmetic: gigabytes by loss, and hours.

The teacher has the shape of Qwen2.5-7B: width 3584, 28 layers, 152,064 classes, 7.6 billion parameters. A document has
512 tokens, of which 60 % are targets, 0.71 words and 0.31 noun or verb phrases per token. Hours are 2 operations per
parameter and token at an assumed 400 TFLOP/s; none of it was run on a GPU.
"""

from collections.abc import Mapping
from typing import Any, Final

from benchmarks.bench_size import naive_bytes
from benchmarks.measure import Options, Result, Row
from xkd_schemas.signals import Signal, signal_bytes
from xkd_trainer.losses.declaration import Levels
from xkd_trainer.losses.registry import loss_named

WIDTH, LAYERS, CLASSES, PARAMETERS = 3584, 28, 152_064, 7.6e9
TOKENS = 100e6
FLOPS = 400e12
"""Assumed of one GPU: some 40 % of the dense bfloat16 peak of an H100."""
LEVELS: Final = Levels(((14, "word"), (21, "phrase"), (28, "phrase")), num_layers=LAYERS, states=(14, 21, 28))
DOCUMENT: Final = {"T": 512, "R": 308, "N": 307} | {
    f"{unit} {per}": number
    for unit, k in (("word", 363), ("phrase", 159))
    for per, number in (("K", k), ("K(K-1)/2", k * (k - 1) // 2))
}
TIERS: Final[tuple[tuple[str, str, Mapping[str, Any], str], ...]] = (
    ("argmax alone: agreement, no loss", "ce", {}, "bf16"),
    ("alm: log-probability of each target", "alm", {}, "bf16"),
    ("rskd: 16 drawn classes", "rskd", {}, "bf16"),
    ("uld, teacher=topk: 64 largest logits", "uld", {"teacher": "topk"}, "bf16"),
    ("mta, hid=off: geometry of spans", "mta", {"hid": "off"}, "bf16"),
    ("kl, dskd, mined, ...: last states, int8", "dskd_v2", {}, "int8"),
    ("kl, dskd, mined, ...: last states", "dskd_v2", {}, "bf16"),
    ("sra", "sra", {}, "bf16"),
    ("dwa", "dwa", {}, "bf16"),
    ("mta: geometry and span vectors", "mta", {}, "bf16"),
)
"""What is kept, the loss and settings that declare it, and the codec of its vectors."""


def run(options: Options) -> list[Result]:
    """One row for each tier, then the hours of one pass."""
    naive = naive_bytes(1, 4, WIDTH, CLASSES)
    rows: list[Result] = []
    for what, loss, settings, codec in TIERS:
        size = _bytes_per_token(loss, settings, codec)
        rows.append(
            Row(what=f"7B teacher, 100 M tokens, {what} / 4 layers of states and full logits", ratio=size / naive,
                ours=size * TOKENS / 1e9, theirs=naive * TOKENS / 1e9, unit=f"GB ({size:.0f} bytes per token)")
        )  # fmt: skip
    seconds = 2 * PARAMETERS * TOKENS / FLOPS
    hours = Row(what="7B teacher, 100 M tokens, one pass at 400 TFLOP/s, hours", ratio=seconds / 3600, ours=seconds,
                theirs=3600.0, unit="s")  # fmt: skip
    return [*rows, hours]


def _bytes_per_token(loss: str, settings: Mapping[str, Any], codec: str) -> float:
    declaration = loss_named(loss)
    wanted = {Signal("argmax"), *declaration.needs(declaration.parse(settings), LEVELS)}
    sized = [Signal(s.name, s.layer, s.unit, (16 if s.kind.drawn else 64) if s.kind.top else None) for s in wanted]
    return sum(signal_bytes(signal, WIDTH, codec, DOCUMENT, 1) for signal in sized) / DOCUMENT["T"]

"""Teacher size by hardware, as a table in markdown: python -m benchmarks.teacher_sizes. Arithmetic; nothing is run.

Bytes are those of `xkd-cache plan` for documents like those of `bench_cost`. Seconds are 2 operations for each weight
and token, at the rates that shards are cut by and that `bench_cost` assumes, or the reading of weights where no device
holds them: once for every group of 65,536 tokens.
"""

from dataclasses import dataclass
from typing import Final

from benchmarks.bench_cost import DOCUMENT, FLOPS
from xkd_pipeline.stages import FLOPS as USUAL
from xkd_pipeline.stages import signals_for
from xkd_schemas.config import RunConfig
from xkd_schemas.page import format_size
from xkd_schemas.signals import signal_bytes

TOKENS: Final = 10**6
GROUP: Final = 65_536  # tokens that weights from a disk are read once for
READ: Final = 3e9  # bytes that a disk gives in a second
SPARE: Final = 0.8  # share of a device's memory that weights may take


@dataclass(frozen=True, slots=True)
class Teacher:
    """A dense model of some size, in the shape of a published one."""

    name: str
    weights: float
    width: int
    layers: int
    classes: int


@dataclass(frozen=True, slots=True)
class Machine:
    """What one device holds and computes, and how many there are."""

    name: str
    memory: float
    flops: float
    widths: tuple[tuple[str, float], ...]  # name and bytes of a weight, as it would be had first
    devices: int = 1


TEACHERS: Final = (
    Teacher("0.1B (SmolLM2-135M)", 0.135e9, 576, 30, 49_152),
    Teacher("1B (Llama 3.2)", 1.24e9, 2048, 16, 128_256),
    Teacher("8B (Llama 3.1)", 8.03e9, 4096, 32, 128_256),
    Teacher("32B (Qwen 2.5)", 32.8e9, 5120, 64, 152_064),
    Teacher("70B (Llama 3.1)", 70.6e9, 8192, 80, 128_256),
    Teacher("400B (Llama 3.1)", 405e9, 16_384, 126, 128_256),
)
GPU: Final = (("", 2.0), ("int8", 1.0), ("4-bit", 0.5))
MACHINES: Final = (
    Machine("laptop, 8 cores, 32 GB", 32e9, 8 * USUAL["cpu"], (("", 4.0), ("int8", 1.0))),
    Machine("one 24 GB GPU", 24e9, USUAL["cuda"], GPU),
    Machine("one 80 GB GPU", 80e9, FLOPS, GPU),
    Machine("8 GPUs of 80 GB", 80e9, FLOPS, GPU, devices=8),
)


def cache_bytes(teacher: Teacher, *losses: str) -> float:
    """Bytes of a million tokens' signals for these losses."""
    run = RunConfig.load(None, teacher={"losses": losses})
    sizes = (signal_bytes(s, teacher.width, "bf16", DOCUMENT, 1) for s in signals_for(run, teacher.layers))
    return TOKENS * sum(sizes) / DOCUMENT["T"]


def seconds(teacher: Teacher, machine: Machine) -> tuple[float, str]:
    """Seconds of a million tokens, and how the weights are held: "" for as they are.

    Weights that need several devices lie on them one part after another, and one part computes at a time.

    >>> [seconds(TEACHERS[at], MACHINES[1]) for at in (2, 3)]
    [(160.6, ''), (656.0, '4-bit')]
    """
    compute = 2 * teacher.weights * TOKENS / machine.flops
    for devices in range(1, machine.devices + 1):
        if teacher.weights * machine.widths[0][1] <= SPARE * machine.memory * devices:
            return compute / (machine.devices // devices), ""
    for name, width in machine.widths[1:]:
        if teacher.weights * width <= SPARE * machine.memory * machine.devices:
            return compute, name
    read = teacher.weights * machine.widths[0][1] / READ * TOKENS / GROUP
    return max(compute, read), "disk, reading" if read > compute else "disk, computing"


def markdown() -> str:
    """The table of docs/teachers.md."""
    head = [
        "teacher",
        *(machine.name for machine in MACHINES),
        "mta, sra, dwa",
        "kl",
        "rskd",
        "head and embeddings, once",
    ]
    rows = [head, ["---"] * len(head)]
    for teacher in TEACHERS:
        times = (seconds(teacher, machine) for machine in MACHINES)
        cells = [f"{time:,.0f}" + (f" ({how})" if how else "") if time >= 10 else f"{time:.1f}" for time, how in times]
        sizes = [cache_bytes(teacher, *losses) for losses in (("mta", "sra", "dwa"), ("kl",), ("rskd",))]
        sizes.append(2 * 2 * teacher.width * teacher.classes)
        rows.append([teacher.name, *cells, *map(format_size, sizes)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    print(markdown())

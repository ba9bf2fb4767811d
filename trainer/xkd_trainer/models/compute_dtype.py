"""In which dtype a model runs: what was asked for, or what the hardware computes fast, and why.

The name is resolved once, before anything is made, and goes into what is made. Tests replace `hardware`.
"""

import functools
import time
from dataclasses import dataclass
from typing import Final

import torch

from xkd_schemas.config import AUTO, dtype_name
from xkd_schemas.console import warn
from xkd_schemas.errors import UsageError

DTYPES: Final[dict[str, torch.dtype]] = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}
SLOW: Final = 1.5  # A dtype whose products take so many times as long as those of float32 is slow
_PRODUCT: Final = {"cpu": (64, 256, 256), "cuda": (2048, 2048, 2048)}
"""Sizes of the product that is timed: at most some 50 ms where torch has nothing but a reference routine."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """A dtype and the reason for it."""

    dtype: str
    why: str
    warning: str = ""  # for the user, where this dtype is slow here

    @property
    def line(self) -> str:
        """Both, for people."""
        return f"dtype: {self.dtype}, {self.why}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Hardware:
    """A processor, or a GPU of the workers that this process cannot ask: every one since 2020 has bfloat16."""

    kind: str = "a GPU that only the workers see"  # what results may depend on, e.g. "CPU AVX2" or the name of a GPU
    has_bfloat16: bool = True  # whether it has instructions for products in bfloat16
    device: str = ""

    def slowdown(self, dtype: str) -> float:
        """How many times as long a product takes in this dtype as in float32."""
        return _time_product(self.device, dtype) / _time_product(self.device, "float32") if self.device else 1.0


def dtype_named(name: str) -> torch.dtype:
    """The torch dtype; UsageError lists the known names."""
    if dtype_name(name) not in DTYPES:
        raise UsageError(f"dtype {name!r} is not known", fix=f"use one of: {', '.join(DTYPES)}")
    return DTYPES[dtype_name(name)]


def this_device() -> str:
    """What a model runs on in this process: cuda or cpu."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def choose_dtype(asked: str, device: str) -> Choice:
    """The dtype for a model on this device: the one asked for, or for `auto` the one that is fast there.

    >>> choose_dtype("fp32", "cpu").line
    'dtype: float32, as asked for'
    """
    here = hardware(device)
    if dtype_name(asked) == AUTO:
        return _choose_fast(here)
    dtype_named(asked)
    name, warning = dtype_name(asked), ""
    if name != "float32" and (factor := here.slowdown(name)) > SLOW:
        warning = f"{name} products take {_say_times(factor)} as long as float32 here ({here.kind})"
    return Choice(dtype=name, why="as asked for", warning=warning)


def _choose_fast(here: Hardware) -> Choice:
    factor = here.slowdown("bfloat16")
    times = f"bfloat16 products take {_say_times(factor)} as long as float32"
    if here.has_bfloat16 and factor > SLOW:
        return Choice(dtype="float32", why=f"because on {here.kind} {times}")
    name, has = ("bfloat16", "has") if here.has_bfloat16 else ("float32", "has no")
    return Choice(dtype=name, why=f"because {here.kind} {has} bfloat16 instructions; {times}")


def _say_times(factor: float) -> str:
    return f"{factor:.2g} times" if factor < 10 else f"{factor:.0f} times"


@functools.cache
def warn_of_slow_dtype(dtype: str, device: str) -> None:
    """Say before the work begins that this device is slow in this dtype, once in a process."""
    if warning := choose_dtype(dtype, device).warning:
        warn(warning)


def processor_kind(device: str) -> str:
    """What a model's results may depend on here, in words."""
    return hardware(device).kind


@functools.cache
def hardware(device: str) -> Hardware:
    """The processor that `device` (cpu or cuda) is in this process."""
    if device == "cpu":
        flags = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {
            "avx512_bf16": torch.cpu._is_avx512_bf16_supported(), "amx_bf16": torch.cpu._is_amx_tile_supported(),
        }  # fmt: skip
        names = sorted(name.upper() for name, there in flags.items() if "bf16" in name and there)
        kind = " ".join(["CPU", torch.backends.cpu.get_cpu_capability(), *names])
        return Hardware(kind=kind, has_bfloat16=bool(names), device=device)
    if not torch.cuda.is_available():
        return Hardware()
    has_bfloat16 = bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return Hardware(kind=str(torch.cuda.get_device_name()), has_bfloat16=has_bfloat16, device=device)


@functools.cache
def _time_product(device: str, dtype: str) -> float:
    m, k, n = _PRODUCT[device]
    a_MK, b_KN = (torch.ones(shape, dtype=DTYPES[dtype], device=device) for shape in ((m, k), (k, n)))
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        _ = a_MK @ b_KN
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return min(seconds)

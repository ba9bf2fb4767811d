"""A processor that is made up: what it says of itself, and how slow it is."""

from dataclasses import dataclass, field

import pytest

from xkd_trainer.models import compute_dtype


@dataclass
class Processor:
    """See xkd_trainer.models.compute_dtype.Hardware."""

    has_bfloat16: bool
    factor: float
    kind: str = "CPU AVX2"
    timed: list[str] = field(default_factory=list)

    def slowdown(self, dtype: str) -> float:
        self.timed.append(dtype)
        return self.factor


def hardware_is(patch: pytest.MonkeyPatch, *, has_bfloat16: bool, factor: float, kind: str = "CPU AVX2") -> Processor:
    """Let this process take its processor for such a one."""
    compute_dtype.warn_of_slow_dtype.cache_clear()
    processor = Processor(has_bfloat16, factor, kind)
    patch.setattr(compute_dtype, "hardware", lambda _device: processor)
    return processor

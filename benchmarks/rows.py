"""One line of the result: a ratio, its bar, and the two figures it was made of."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One measured ratio.

    >>> Row(what="a", ratio=1.2, bar=1.25, ours=6.0, theirs=5.0, unit="s").met
    True
    """

    what: str
    """Numerator against denominator."""
    ratio: float
    bar: float | None = None
    """None: printed, no bar."""
    at_least: bool = False
    """The ratio must reach the bar; otherwise it must not pass it."""
    ours: float
    """The numerator."""
    theirs: float
    """The denominator."""
    unit: str
    """Of both."""

    @property
    def met(self) -> bool | None:
        """None where there is no bar. A ratio that is no number meets nothing."""
        if self.bar is None:
            return None
        return self.ratio >= self.bar if self.at_least else self.ratio <= self.bar


@dataclass(frozen=True, kw_only=True, slots=True)
class Skipped:
    """A row that could not be measured here, and why."""

    what: str
    why: str


Result = Row | Skipped


def ratio(
    what: str, ours: float, theirs: float, unit: str, *, bar: float | None = None, at_least: bool = False
) -> Row:
    """A row of two figures in the same unit: how many times theirs ours is."""
    return Row(what=what, ratio=ours / theirs, bar=bar, at_least=at_least, ours=ours, theirs=theirs, unit=unit)


def cost(what: str, ours: float, theirs: float, *, bar: float | None = None) -> Row:
    """A row of two CPU times in seconds."""
    return ratio(what, ours * 1e3, theirs * 1e3, "ms", bar=bar)


def memory(what: str, ours: float, theirs: float, *, bar: float) -> Row:
    """A row of two sizes in bytes."""
    return ratio(what, ours / 2**20, theirs / 2**20, "MiB", bar=bar)


def table(results: Sequence[Result]) -> str:
    """Aligned lines for people.

    >>> print(table([Row(what="a / b", ratio=2.0, bar=6, at_least=True, ours=3, theirs=6, unit="ms")]))
    a / b    2.00  >= 6     NOT MET  3 / 6 ms
    """
    width = max((len(r.what) for r in results), default=0)
    return "\n".join(f"{r.what:<{width}}  {_figures(r)}" for r in results)


def _figures(result: Result) -> str:
    if isinstance(result, Skipped):
        return f"skipped: {result.why}"
    verdict = {True: "met", False: "NOT MET", None: ""}[result.met]
    bar = "printed, no bar" if result.bar is None else f"{'>=' if result.at_least else '<='} {result.bar:.3g}"
    small = 0 < abs(result.ratio) < 0.01
    times = f"{result.ratio:.1e}" if small else f"{result.ratio:.2f}"
    raw = f"{result.ours:.3g} / {result.theirs:.3g} {result.unit}".strip()
    return f"{times:>6}  {bar:<7} {verdict:<8} {raw}"


def as_json(benchmark: str, result: Result) -> dict[str, Any]:
    """The same for programs."""
    values = {"benchmark": benchmark, **asdict(result)}
    return values if isinstance(result, Skipped) else {**values, "met": result.met}

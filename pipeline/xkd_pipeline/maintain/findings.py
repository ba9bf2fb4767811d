"""What is wrong with a cache, one finding at a time."""

from dataclasses import dataclass
from pathlib import Path

from xkd_schemas.cache.table import Table
from xkd_schemas.errors import BadData, InputMissing, Mismatch


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One thing that is wrong."""

    table: str
    """"" for files of the cache itself."""
    unit: int | None
    """None where it is not about one unit."""
    file: str
    """Relative to the cache."""
    reason: str

    @property
    def line(self) -> str:
        """For people."""
        unit = "" if self.unit is None else f" (unit {self.unit})"
        return f"{self.file}{unit}: {self.reason}"


def opened(root: Path, name: str) -> Table:
    """The table, or BadData that says to verify first."""
    try:
        return Table(root, name)
    except (InputMissing, Mismatch) as error:
        raise BadData(error.what, fix=f"xkd-cache verify {root}") from error

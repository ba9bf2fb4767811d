"""What was added to a finished table: where it lies, and which plan holds.

Additions lie in added/1, added/2, ... below the table's folder, each laid out like a table's own folder: a plan,
which lists the units that were there and then the new ones, the records of the new units, and their shards. Nothing
that is there is touched; only the manifest is written anew, over all units.
"""

from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from xkd_schemas.errors import BadData
from xkd_schemas.manifest import Plan, read_record

ADDED: Final = "added"


def part_of(folder: Path, starts: Sequence[int], unit: int) -> Path:
    """The folder that holds the shard and the record of a unit, `starts` being the first unit of each addition.

    >>> [part_of(Path("documents"), (3, 5), unit).as_posix() for unit in (2, 3, 5)]
    ['documents', 'documents/added/1', 'documents/added/2']
    """
    number = bisect_right(starts, unit)
    return folder / ADDED / str(number) if number else folder


def plans_of(folder: Path) -> list[Plan]:
    """The plan of a table and of each of its additions; the last one is what the table is, or is becoming.

    Raises:
        InputMissing: There is no plan.json.
        BadData: A plan cannot be read, or does not go on where the one before it ends.
        Mismatch: Written by a newer program.
    """
    plans = [read_record(folder / "plan.json", Plan)]
    while (path := folder / ADDED / str(len(plans)) / "plan.json").exists():
        plan, last = read_record(path, Plan), plans[-1]
        if plan.units[: len(last.units)] != last.units or plan.starts != (*last.starts, len(last.units)):
            raise BadData(f"{path} does not go on where {last.table} ends", next=f"delete {path.parent} and add again")
        plans.append(plan)
    return plans


def parts_of(folder: Path) -> list[Path]:
    """A table's folder and those of its additions, in order."""
    added = [path for path in (folder / ADDED).glob("[1-9]*") if path.name.isdecimal() and not path.is_symlink()]
    return [folder, *sorted(added, key=lambda path: int(path.name))]


def records_of(folder: Path) -> list[Path]:
    """Every commit record of a table, in order of the units."""
    return [path for part in parts_of(folder) for path in sorted((part / "commits").glob("[0-9]*.json"))]

"""The deep check of a cache in a process of its own, with limits on memory and time.

A shard whose digests are right may still be made to break its reader. `guarded` starts this module again for each
process that such a shard ends, and the end is what is wrong with that unit.
"""

import json
import resource
import signal
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pyarrow as pa

from xkd_pipeline.deep import reasons_of
from xkd_pipeline.verify import Bad, opened
from xkd_schemas.errors import XkdError

OPENING: Final = -1
"""Stands for a unit while a table is opened."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What one process may use."""

    memory: int = 8 << 30
    """Bytes beyond the program itself and twice the mapped shards."""
    seconds: int = 900
    """CPU time for one unit."""


def guarded(root: Path, names: Sequence[str], limits: Limits | None = None) -> dict[str, list[Bad]]:
    """What is wrong with the rows of each table; a unit that ends the process that reads it is named too."""
    found: dict[str, list[Bad]] = {name: [] for name in names}
    todo, limits = [(name, 0) for name in names], limits or Limits()
    while todo:
        request = {"todo": todo, "memory": limits.memory, "seconds": limits.seconds}
        child = subprocess.run(
            [sys.executable, "-P", "-m", "xkd_pipeline.deep_child", str(root)],
            input=json.dumps(request), capture_output=True, text=True, check=False,
        )  # fmt: skip
        at: tuple[str, int] | None = None
        for line in child.stdout.splitlines():
            said = json.loads(line)
            at = (said["table"], said["unit"])
            for reason in said.get("reasons", ()):
                found[at[0]].append(_bad(root, *at, reason))
        if child.returncode == 0:
            break
        if at is None:
            raise RuntimeError(f"the check did not start: {child.stderr[-2000:]}")
        found[at[0]].append(_bad(root, *at, _ending(child.returncode, limits)))
        later = [(name, first) for name, first in todo if names.index(name) > names.index(at[0])]
        todo = later if at[1] == OPENING else [(at[0], at[1] + 1), *later]
    return found


def _ending(code: int, limits: Limits) -> str:
    if code == -signal.SIGXCPU:
        return f"reading it takes more than {limits.seconds} seconds"
    name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    return f"reading it ends the process ({name})"


def _bad(root: Path, table: str, unit: int, reason: str) -> Bad:
    if unit == OPENING:
        return Bad(table=table, unit=None, file=f"{table}/manifest.json", reason=reason)
    file = opened(root, table).path(unit).relative_to(root).as_posix()
    return Bad(table=table, unit=unit, file=file, reason=reason)


def _limit_memory(root: Path, spare: int) -> None:
    if sys.platform == "linux":
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        mapped = sum(path.stat().st_size for path in root.rglob("*.arrow"))
        resource.setrlimit(resource.RLIMIT_AS, (used + 2 * mapped + spare,) * 2)


def _limit_time(seconds: int) -> None:
    used = resource.getrusage(resource.RUSAGE_SELF)
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (int(used.ru_utime + used.ru_stime) + seconds, hard))


def _say(**said: Any) -> None:
    sys.stdout.write(json.dumps(said) + "\n")
    sys.stdout.flush()


def _check(root: Path, name: str, first: int, seconds: int) -> None:
    _say(table=name, unit=OPENING)
    table = opened(root, name)
    for unit in range(first, len(table.manifest.commits)):
        _say(table=name, unit=unit)
        _limit_time(seconds)
        _say(table=name, unit=unit, reasons=list(_reasons(root, table, unit)))


def _reasons(root: Path, table: Any, unit: int) -> Iterable[str]:
    """As `reasons_of`; whatever else a broken shard raises is a reason too."""
    try:
        yield from reasons_of(root, table, unit)
    except XkdError as error:
        yield error.what
    except (MemoryError, pa.ArrowMemoryError):
        yield "reading it needs more memory than it should"
    except Exception as error:  # a shard may be made to raise anything
        yield f"cannot be read: {type(error).__name__}: {' '.join(str(error).split())[:160]}"


def main() -> None:
    """Check what standard input asks for; one line of JSON when a unit is begun and one when it is done."""
    request = json.loads(sys.stdin.read())
    root = Path(sys.argv[1])
    _limit_memory(root, request["memory"])
    for name, first in request["todo"]:
        try:
            _check(root, name, first, request["seconds"])
        except XkdError as error:
            _say(table=name, unit=OPENING, reasons=[error.what])


if __name__ == "__main__":
    main()

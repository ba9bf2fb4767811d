"""A stage that needs no model and no parser, for tests of what runs stages and keeps their results.

Unit n has n % 3 + 1 rows; the last unit has a reject. Set `trouble` to make it fail. The module can be imported by
Ray workers, which is why it is not inside a test.
"""

import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

import xkd_pipeline
from xkd_pipeline.tables.shard import write_shard
from xkd_pipeline.tables.writer import Built, Store, build
from xkd_pipeline.workers.contract import AS_PLANNED, Make, Workers, local_paths
from xkd_schemas import durable_files
from xkd_schemas.cache.manifest import Commit, MadeDifferently, Unit
from xkd_schemas.errors import BadData
from xkd_schemas.ragged import flat_list

SCHEMA = pa.schema(
    [pa.field("doc_id", pa.string(), nullable=False), pa.field("values", flat_list(pa.float32()), nullable=False)]
)
UNITS = 5
SECONDS = 2.0
"""How long a shard waits for its name where writes are slow."""


def search_path() -> str:
    """PYTHONPATH of a process that imports what the tests share."""
    folders = [str(Path(__file__).parents[1] / name) for name in ("fakes", "programs")]
    return os.pathsep.join([*folders, *filter(None, [os.environ.get("PYTHONPATH")])])


def slow_writes() -> None:
    """From now on a shard of this process is written whole and then waits for its name."""
    rename = durable_files.rename

    def late(source: Path, target: Path) -> None:
        time.sleep(SECONDS * (target.suffix == ".arrow"))
        rename(source, target)

    durable_files.rename = late


@dataclass(frozen=True, kw_only=True)
class FakeStage:
    """Makes a unit from its number."""

    folder: Path
    trouble: str = ""
    """"" none; error, bug, load: raises; kill, stop: kills or stops its process once; poison: dies of row 1;
    memory: needs batches of at most 2; slow: writes slowly."""
    at: int = 2
    """The unit it happens at."""

    def load(self) -> Make:
        if self.trouble == "slow":
            slow_writes()
        if self.trouble == "load":
            raise BadData("the parser is broken", kept="k", fix="mend it")
        return self.make

    def rows(self, unit: int) -> int:
        return unit % 3 + 1

    def batch(self, _unit: int) -> int:
        return 8

    def paths(self) -> tuple[Path, ...]:
        return local_paths(self.folder)

    def make(self, unit: int, care: MadeDifferently = AS_PLANNED) -> Commit:
        if unit == self.at:
            self._fail(care)
        rows = [row for row in range(self.rows(unit)) if row not in care.lost]
        columns = {
            "doc_id": [f"u{unit}r{row}" for row in rows],
            "values": [np.arange(unit + row, dtype=np.float32) for row in rows],
        }
        rejects = [{"reason": "blank", "line": 9}] if unit == UNITS - 1 else []
        rejects += [{"reason": "worker_killed", "line": row} for row in care.lost]
        return write_shard(self.folder, unit, SCHEMA, columns, rejects=rejects, counts={"rows": len(rows)})

    def _fail(self, care: MadeDifferently) -> None:
        if self.trouble == "memory" and not 0 < care.batch <= 2:
            raise MemoryError("no memory for 9 GiB")
        if self.trouble == "poison" and 1 not in care.lost:
            os._exit(9)
        if self.trouble == "error":
            raise BadData(f"unit {self.at} is broken", kept="k", fix="mend it")
        if self.trouble == "bug":
            raise ZeroDivisionError("ours")
        if self.trouble == "interrupt":
            raise KeyboardInterrupt
        mark = self.folder.parents[1] / "killed"
        if self.trouble in ("stop", "kill") and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGSTOP if self.trouble == "stop" else signal.SIGKILL)


class Telling(FakeStage):
    """Puts into the record which GPUs a worker was given and where our code came from, as names of counts."""

    def make(self, unit: int, care: MadeDifferently = AS_PLANNED) -> Commit:
        time.sleep(SECONDS)
        commit = super().make(unit, care)
        told = {f"gpu {os.environ.get('CUDA_VISIBLE_DEVICES')}": 1, f"code {xkd_pipeline.__file__}": 1}
        return commit.model_copy(update={"counts": told})


class Importing(FakeStage):
    """Puts into the record where a module of the standard library came from, and the path it was looked for in."""

    def load(self) -> Make:
        import colorsys

        told = {f"module {colorsys.__file__}": 1, **dict.fromkeys((f"path {entry}" for entry in sys.path), 1)}
        return lambda unit, care=AS_PLANNED: self.make(unit, care).model_copy(update={"counts": told})


def opened(root: Path, *, spec: dict[str, Any] | None = None, units: int = UNITS) -> Store:
    listed = tuple(Unit(source="x", first=3 * n, rows=3) for n in range(units))
    spec = spec or {"seed": 1, "parser": {"name": "a"}, "corpus": [{"name": "x", "sha256": "0"}]}
    return Store(root, "documents", spec, listed)


def build_all(
    root: Path, workers: Workers | None = None, *, trouble: str = "", order: Sequence[int] | None = None, **more: Any
) -> Built:
    """Build the whole table; `order` is the order in which missing units are made."""
    store = opened(root)
    stage = FakeStage(folder=store.folder, trouble=trouble)

    def jobs(missing: Sequence[int]) -> list[int]:
        return [unit for unit in order if unit in missing] if order else list(missing)

    return build(store, stage, jobs, workers or Workers(), **more)

"""A stage that needs no model and no parser, for tests of what runs stages and keeps their results.

Unit n has n % 3 + 1 rows; the first unit has a reject. Set `troubles` to make it fail. The module can be imported by
Ray workers, which is why it is not inside a test.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

import xkd_pipeline
from xkd_pipeline.tables.shard import write_shard
from xkd_pipeline.tables.writer import Built, Store, build, locked
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
    troubles: Mapping[int, str] = field(default_factory=dict)
    """Unit -> error, bug, interrupt: raises; stop: stops its process once; poison: is killed by row 1;
    memory: needs batches of at most 2; slow: all units are written slowly."""

    def load(self) -> Make:
        if "slow" in self.troubles.values():
            slow_writes()
        return self.make

    def rows(self, unit: int) -> int:
        return unit % 3 + 1

    def batch(self, _unit: int) -> int:
        return 8

    def paths(self) -> tuple[Path, ...]:
        return local_paths(self.folder)

    def make(self, unit: int, care: MadeDifferently = AS_PLANNED) -> Commit:
        self._fail(unit, self.troubles.get(unit), care)
        rows = [row for row in range(self.rows(unit)) if row not in care.lost]
        columns = {
            "doc_id": [f"u{unit}r{row}" for row in rows],
            "values": [np.arange(unit + row, dtype=np.float32) for row in rows],
        }
        rejects = [{"reason": "blank", "line": 9}] if unit == 0 else []
        rejects += [{"reason": "worker_killed", "line": row} for row in care.lost]
        return write_shard(self.folder, unit, SCHEMA, columns, rejects=rejects, counts={"rows": len(rows)})

    def _fail(self, unit: int, trouble: str | None, care: MadeDifferently) -> None:
        if trouble == "memory" and not 0 < care.batch <= 2:
            raise MemoryError("no memory for 9 GiB")
        if trouble == "poison" and 1 not in care.lost:
            os.kill(os.getpid(), signal.SIGKILL)
        if trouble == "error":
            raise BadData(f"unit {unit} is broken", kept="k", fix="mend it")
        if trouble == "bug":
            raise ZeroDivisionError("ours")
        if trouble == "interrupt":
            raise KeyboardInterrupt
        mark = self.folder.parents[1] / "stopped"
        if trouble == "stop" and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGSTOP)


class Telling(FakeStage):
    """Writes beside the cache what each worker was given, and where our code and the standard library came from."""

    def load(self) -> Make:
        import colorsys

        told = {"gpu": os.environ.get("CUDA_VISIBLE_DEVICES"), "code": xkd_pipeline.__file__, "path": sys.path}
        note = self.folder.parents[1] / "told" / f"{os.getpid()}.json"
        note.parent.mkdir(exist_ok=True)
        note.write_text(json.dumps(told | {"colorsys": colorsys.__file__}))
        return super().load()


def read_told(folder: Path) -> list[dict[str, Any]]:
    """What each worker told; `folder` is the one that the cache lies in."""
    return [json.loads(note.read_text()) for note in (folder / "told").iterdir()]


def opened(root: Path, *, spec: dict[str, Any] | None = None, units: int = UNITS) -> Store:
    listed = tuple(Unit(source="x", first=3 * n, rows=3) for n in range(units))
    spec = spec or {"seed": 1, "parser": {"name": "a"}, "corpus": [{"name": "x", "sha256": "0"}]}
    return Store(root, "documents", spec, listed)


def build_all(
    root: Path,
    workers: Workers | None = None,
    *,
    troubles: Mapping[int, str] | None = None,
    order: Sequence[int] | None = None,
    kind: type[FakeStage] = FakeStage,
    units: int = UNITS,
    **more: Any,
) -> Built:
    """Build the whole table; `order` is the order in which missing units are made."""
    store = opened(root, units=units)
    stage = kind(folder=store.folder, troubles=troubles or {})

    def jobs(missing: Sequence[int]) -> list[int]:
        return [unit for unit in order if unit in missing] if order else list(missing)

    return build(store, stage, jobs, workers or Workers(), **more)


def run(root: Path, workers: Workers | None = None, **more: Any) -> Built:
    """`build_all` as a command does it: with the cache's lock."""
    with locked(root):
        return build_all(root, workers, **more)

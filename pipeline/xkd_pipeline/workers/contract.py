"""What a stage and the workers that run it promise each other; nothing here knows where they run."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from xkd_schemas.cache.manifest import Commit, MadeDifferently
from xkd_schemas.cache.table import Table
from xkd_schemas.config import RunConfig
from xkd_schemas.console import warn
from xkd_schemas.errors import OutOfMemory, UsageError, XkdError

AS_PLANNED: Final = MadeDifferently()
KEPT: Final = "every committed shard"
AGAIN: Final = "run the same command again to go on"


Make = Callable[[Any, MadeDifferently], Commit]
"""Writes the shard of a job, leaving out `lost` rows and in batches of `batch`, and returns its record."""


class Stage(Protocol):
    """Settings of one kind of work; it is sent to every worker once."""

    def load(self) -> Make:
        """Load models and parsers, and return the function that makes one shard."""

    def rows(self, job: Any) -> int:
        """Rows of a shard, which are tried apart when it kills its worker."""
        raise NotImplementedError

    def batch(self, job: Any) -> int:
        """Size of a batch as planned, which is halved when memory runs out: tokens, or documents at once."""
        return self.rows(job)

    def paths(self) -> tuple[Path, ...]:
        """Folder that shards are written to, then what else is read: every machine of a cluster must have them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TableStage(Stage):
    """Work on a table whose rows are those of the documents; a job is the number of a shard."""

    root: Path  # of the cache
    folder: Path  # of the table

    def rows(self, unit: int) -> int:
        """Documents of a shard."""
        return Table(self.root, "documents").manifest.commits[unit].rows

    def paths(self) -> tuple[Path, ...]:
        """The table's folder and the documents."""
        return self.folder.absolute(), (self.root / "documents").absolute()


@dataclass(frozen=True, kw_only=True, slots=True)
class Workers:
    """How shards are run; nothing here changes a byte of the result."""

    count: int = 0  # Ray actors; 0 makes the shards in this process
    gpus: float = 0.0  # GPUs of each actor
    address: str | None = None  # Ray cluster to join; None starts one on this machine's loopback
    stall_seconds: float | None = None
    """A shard that takes longer is taken for hung; None: five times the median, see scheduler.py."""

    @classmethod
    def of(cls, run: RunConfig) -> "Workers":
        """As a run file asks for them."""
        gpus, address, stall = run.gpus_per_worker, run.ray_address, run.stall_timeout
        return cls(count=run.workers, gpus=gpus, address=address, stall_seconds=stall)

    def __post_init__(self) -> None:
        if self.count == 0 and (self.address is not None or self.gpus or self.stall_seconds is not None):
            raise UsageError(
                "--ray-address, --gpus-per-worker and --stall-timeout need Ray workers, found --workers 0",
                fix="add --workers N",
            )


@dataclass(frozen=True, slots=True)
class Failed:
    """A worker's process is gone, or it could not do what it was given."""

    reason: str
    memory: bool = False  # it, or its machine, ran out of memory
    alive: bool = False


Report = tuple[Hashable, Commit | Failed | None]
"""Worker, and what it made; None once it has loaded the stage."""


def local_paths(*names: str | Path | None) -> tuple[Path, ...]:
    """Those of `names` that are files or folders of this machine, absolute; hub names are not."""
    return tuple(Path(name).absolute() for name in names if name and Path(name).exists())


def shard_of(job: Any) -> int:
    """Number of the shard that a job makes; a job may be just that number."""
    return int(getattr(job, "unit", job))


def out_of_memory(error: BaseException | None) -> bool:
    """Whether an error says that memory ran out: Python's, Arrow's and numpy's, torch's on any device.

    >>> out_of_memory(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried ..."))
    True
    """
    if isinstance(error, MemoryError):
        return True
    said = str(error).lower() if isinstance(error, RuntimeError) else ""
    return any(words in said for words in ("out of memory", "can't allocate memory", "cublas_status_alloc_failed"))


def first_line(error: BaseException) -> str:
    """What an error says, in one short line."""
    return " ".join(str(error).split())[:160] or type(error).__name__


def halve_batch(
    stage: Stage, job: Any, care: MadeDifferently, reason: str, kind: type[XkdError] = OutOfMemory
) -> MadeDifferently:
    """The same with batches half as large; says so on standard error. `kind` where a batch is one document already."""
    shard, batch = shard_of(job), (care.batch or stage.batch(job)) // 2
    if batch == 0:
        raise kind(
            f"shard {shard}: even a batch of one document fails: {reason}",
            kept=KEPT,
            fix="free memory, use a machine with more, or cut documents shorter (--max-tokens); then run this again",
        )
    warn(f"shard {shard}: {reason}; trying again in batches of {batch}")
    return care.model_copy(update={"batch": batch})

"""Where units are made: in this process, or by actors on Ray. The only module that imports ray.

A stage is a picklable bag of settings; `load()` gives a function from a job to a commit record.
The same function runs either way, so the bytes are the same.
"""

import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from xkd_schemas.errors import Refused, WorkersGone, XkdError
from xkd_schemas.manifest import Commit

Make = Callable[[Any], Commit]


class Stage(Protocol):
    """Settings of one kind of work; it is sent to every worker once."""

    def load(self) -> Make:
        """Load models and parsers, and return the function that makes one unit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Workers:
    """How units are run; nothing here changes a byte of the result."""

    count: int = 0
    """Actors; 0 makes the units in this process."""
    gpus: float = 0.0
    """GPUs of each actor."""
    address: str | None = None
    """Ray cluster to join; None starts one on this machine's loopback."""
    stall_seconds: float = 1800.0
    """Give up when no unit finishes for this long."""


def run_units(stage: Stage, jobs: Iterable[Any], workers: Workers, done: Callable[[Commit], None]) -> None:
    """Make every job and hand each record to `done` as soon as it is there, in any order.

    Raises:
        WorkersGone: Workers died or hung more often than they are restarted; what was handed over stays.
        XkdError: What a stage raised, as it raised it.
    """
    if workers.count == 0:
        make = stage.load()
        for job in jobs:
            done(make(job))
        return
    for record in _on_ray(stage, iter(jobs), workers):
        done(record)


class _Actor:
    """The loaded stage, and nothing else. Loaded with the first job, so that an error in it arrives as itself."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._make: Make | None = None

    def make(self, job: Any) -> Commit:
        if self._make is None:
            self._make = self._stage.load()
        return self._make(job)


def _start(ray: Any, workers: Workers) -> None:
    if workers.address is None and os.environ.get("RAY_ADDRESS"):
        raise Refused(
            f"RAY_ADDRESS is set to {os.environ['RAY_ADDRESS']}, and a cluster is only joined when asked for",
            next="pass --ray-address, or unset RAY_ADDRESS",
        )
    if workers.address is not None:
        ray.init(address=workers.address, log_to_driver=False)
        return
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    ray.init(
        num_cpus=workers.count,
        include_dashboard=False,
        _node_ip_address="127.0.0.1",
        log_to_driver=False,
        logging_level="error",
        object_store_memory=256 * 2**20,
    )


def _on_ray(stage: Stage, jobs: Iterator[Any], workers: Workers) -> Iterator[Commit]:
    import ray
    from ray.exceptions import RayError, RayTaskError

    _start(ray, workers)
    try:
        kind = ray.remote(num_cpus=1, num_gpus=workers.gpus, max_restarts=3, max_task_retries=3)(_Actor)
        idle = [kind.remote(stage) for _ in range(workers.count)]
        running: dict[Any, Any] = {}
        last = time.monotonic()
        while True:
            while idle and (job := next(jobs, None)) is not None:
                actor = idle.pop()
                running[actor.make.remote(job)] = actor
            if not running:
                return
            ready, _ = ray.wait(list(running), timeout=5.0)
            if not ready and time.monotonic() - last > workers.stall_seconds:
                raise WorkersGone(f"no unit finished for {workers.stall_seconds:.0f} s", kept=_KEPT, next=_AGAIN)
            for reference in ready:
                last = time.monotonic()
                idle.append(running.pop(reference))
                yield ray.get(reference)
    except RayTaskError as error:
        cause = error.cause
        if isinstance(cause, XkdError):
            raise cause from None
        raise
    except RayError as error:
        reason = _COLOUR.sub("", next(iter(str(error).splitlines()), type(error).__name__))
        raise WorkersGone(f"the Ray workers are gone: {reason}", kept=_KEPT, next=_AGAIN) from error
    finally:
        ray.shutdown()


_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_KEPT = "every committed unit"
_AGAIN = "run the same command again to go on"

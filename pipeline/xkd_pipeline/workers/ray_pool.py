"""Workers on Ray: on this machine's loopback, or on a cluster that is joined. With ray_start.py
the only module that imports ray.

Ray's own restarts and retries are off: schedule.py counts tries by unit, which tells a bad document from a bad worker.
"""

import os
import sys
from collections.abc import Hashable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Self

from xkd_pipeline.workers.contract import AGAIN, KEPT, Make, Stage, Workers, first_line, out_of_memory
from xkd_pipeline.workers.place import Place, versions
from xkd_pipeline.workers.ray_start import (
    doors,
    end,
    handlers_kept,
    no_answer,
    private_folder,
    refuse_too_small,
    said,
    start,
)
from xkd_pipeline.workers.scheduler import Died, Exhausted, Ready, Report
from xkd_schemas.cache.manifest import Commit, MadeDifferently
from xkd_schemas.durable_files import remove, write_beside
from xkd_schemas.errors import WorkersGone, XkdError


class _Actor:
    """The loaded stage, and nothing else."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage

    def ready(self, place: Place | None, cwd: str) -> None:
        if place is not None:
            place.check()
        with suppress(OSError):  # on another machine, where no path is relative, it is not missed
            os.chdir(cwd)
        self._make: Make = self._stage.load()

    def make(self, job: Any, care: MadeDifferently) -> Commit:
        return self._make(job, care)


class RayPool:
    """Workers that hold a loaded stage; see schedule.Pool. A context manager: at its end all of them are gone.

    Raises:
        Refused: RAY_ADDRESS is set without --ray-address, authentication is off, or the cluster refuses us.
        UsageError: The cluster has no machine that a worker fits on.
        WorkersGone: The cluster is not there.
    """

    def __init__(self, stage: Stage, workers: Workers) -> None:
        self._stage, self._workers = stage, workers
        self._open: dict[Any, Hashable] = {}
        self._own = ExitStack()
        self._cwd = str(Path.cwd())
        self._mark: Path | None = None
        self._doors: list[tuple[str, str, int]] = []

    def __enter__(self) -> Self:
        try:
            self._enter(self._own.enter_context(private_folder()))
        except BaseException:
            self.__exit__()
            raise
        return self

    def _enter(self, folder: Path) -> None:
        start(self._workers, folder)
        import ray

        self._ray = ray
        self._doors = doors(ray)
        self._place: Place | None = None
        refuse_too_small(ray, self._workers)
        if self._workers.address is not None:
            paths = self._stage.paths()
            self._mark = write_beside(paths[0], lambda _stream: None)
            self._place = Place(paths=paths, mark=self._mark, versions=versions())
        options = {"num_cpus": 1, "num_gpus": self._workers.gpus, "max_restarts": 0, "max_task_retries": 0}
        self._kind = ray.remote(**options)(_Actor)

    def __exit__(self, *_raised: object) -> None:
        if "ray" in sys.modules:
            with handlers_kept(default=True):  # a second signal does not wait
                end(sys.modules["ray"])
        if self._mark is not None:
            with suppress(OSError):
                remove(self._mark)
        self._own.close()

    def start(self) -> Hashable:
        """Start a worker; it loads the stage."""
        worker = self._kind.remote(self._stage)
        self._open[worker.ready.remote(self._place, self._cwd)] = worker
        return worker  # type: ignore[no-any-return]

    def give(self, worker: Any, job: Any, care: MadeDifferently) -> None:
        """Let a worker make a unit."""
        self._open[worker.make.remote(job, care)] = worker

    def kill(self, worker: Any) -> None:
        """End a worker; what it was at is forgotten. Ray kills a process that does not answer after some seconds."""
        self._ray.kill(worker, no_restart=True)
        self._open = {reference: owner for reference, owner in self._open.items() if owner is not worker}

    def reports(self, seconds: float) -> list[Report]:
        """What became of workers and units; the first within `seconds`."""
        references = list(self._open)
        first, _ = self._ray.wait(references, timeout=seconds)
        if first:
            first, _ = self._ray.wait(references, num_returns=len(references), timeout=0)
        found = [(self._open.pop(reference), self._result(reference)) for reference in first]
        if not found or any(isinstance(what, Died) for _, what in found):
            self._refuse_silence()
        return found

    def _result(self, reference: Any) -> Ready | Commit | Died | Exhausted:
        from ray.exceptions import OutOfMemoryError, RayActorError, RayError, RayTaskError

        try:
            value = self._ray.get(reference)
        except RayTaskError as error:
            cause = error.cause
            if isinstance(cause, XkdError):
                raise cause from None
            if out_of_memory(cause):
                return Exhausted(first_line(cause))
            raise
        except OutOfMemoryError as error:
            return Died(said(error), for_memory=True)
        except RayActorError as error:
            return Died(said(error))
        except RayError as error:
            raise WorkersGone(f"Ray fails: {said(error)}", kept=KEPT, fix=AGAIN) from error
        return value if isinstance(value, Commit) else Ready()

    def _refuse_silence(self) -> None:
        """Raise WorkersGone where Ray's own processes do not answer: Ray itself would wait for a minute and exit."""
        for name, host, port in self._doors:
            if silence := no_answer(host, port):
                reason = f"its {name} at {host}:{port} does not answer: {silence}"
                raise WorkersGone(f"the Ray cluster is gone: {reason}", kept=KEPT, fix=AGAIN)

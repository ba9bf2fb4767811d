"""Workers on Ray: on this machine's loopback, or on a cluster that is joined. The only module that imports ray.

Ray's own restarts and retries are off: schedule.py counts tries by unit, which tells a bad document from a bad worker.
"""

import importlib
import os
import re
import secrets
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Hashable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, Self

from xkd_pipeline.place import Place, versions
from xkd_pipeline.run import AGAIN, KEPT, Make, Stage, Workers, first_line, out_of_memory
from xkd_pipeline.schedule import Died, Exhausted, Ready, Report
from xkd_schemas.errors import Refused, UsageError, WorkersGone, XkdError
from xkd_schemas.files import remove, write_beside
from xkd_schemas.manifest import Care, Commit

SHIPPED: Final = ("xkd_schemas", "xkd_trainer", "xkd_pipeline")
"""Our packages, sent to every worker of a cluster."""


class _Actor:
    """The loaded stage, and nothing else."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage

    def ready(self, place: Place | None) -> None:
        if place is not None:
            place.check()
        self._make: Make = self._stage.load()

    def make(self, job: Any, care: Care) -> Commit:
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
        self._folder: Path | None = None
        self._mark: Path | None = None

    def __enter__(self) -> Self:
        try:
            self._enter()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _enter(self) -> None:
        self._folder = _start(self._workers)
        import ray

        self._ray = ray
        self._doors = _doors(ray)
        self._place: Place | None = None
        _refuse_too_small(ray, self._workers)
        if self._workers.address is not None:
            paths = self._stage.paths()
            self._mark = write_beside(paths[0], lambda _stream: None)
            self._place = Place(cwd=str(Path.cwd()), paths=paths, mark=self._mark, versions=versions())
        options = {"num_cpus": 1, "num_gpus": self._workers.gpus, "max_restarts": 0, "max_task_retries": 0}
        self._kind = ray.remote(**options)(_Actor)

    def __exit__(self, *_raised: object) -> None:
        if self._mark is not None:
            with suppress(OSError):
                remove(self._mark)
        if "ray" in sys.modules:
            sys.modules["ray"].shutdown()
        if self._folder is not None and not os.environ.get("XKD_DEBUG"):
            shutil.rmtree(self._folder, ignore_errors=True)

    def start(self) -> Hashable:
        """Start a worker; it loads the stage."""
        worker = self._kind.remote(self._stage)
        self._open[worker.ready.remote(self._place)] = worker
        return worker  # type: ignore[no-any-return]

    def give(self, worker: Any, job: Any, care: Care) -> None:
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
            return Died(_said(error), for_memory=True)
        except RayActorError as error:
            return Died(_said(error))
        except RayError as error:
            raise WorkersGone(f"Ray fails: {_said(error)}", kept=KEPT, next=AGAIN) from error
        return value if isinstance(value, Commit) else Ready()

    def _refuse_silence(self) -> None:
        """Raise WorkersGone where Ray's own processes do not answer: Ray itself would wait for a minute and exit."""
        for name, host, port in self._doors:
            try:
                socket.create_connection((host, port), timeout=5.0).close()
            except OSError as error:
                raise WorkersGone(
                    f"the Ray cluster is gone: its {name} at {host}:{port} does not answer: {error.strerror or error}",
                    kept=KEPT,
                    next=AGAIN,
                ) from None


def _doors(ray: Any) -> list[tuple[str, str, int]]:
    """Name, address and port of the processes without which nothing goes on: the head's, and this machine's own."""
    context = ray.get_runtime_context()
    host, _, port = context.gcs_address.rpartition(":")
    ours = next(node for node in ray.nodes() if node["NodeID"] == context.get_node_id())
    return [
        ("head", host.strip("[]"), int(port)),
        ("node manager", ours["NodeManagerAddress"], int(ours["NodeManagerPort"])),
    ]


def _start(workers: Workers) -> Path | None:
    """Start or join a cluster; the private folder of one that was started."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        if workers.address is None:
            return _start_here(workers.count)
        _join(workers.address)
        return None
    finally:
        for number, handler in handlers.items():  # Ray puts its own in their place
            with suppress(ValueError):  # not the main thread
                signal.signal(number, handler)


def _start_here(count: int) -> Path:
    if os.environ.get("RAY_ADDRESS"):
        raise Refused(
            f"RAY_ADDRESS is set to {os.environ['RAY_ADDRESS']}, and a cluster is only joined when asked for",
            next="pass --ray-address, or unset RAY_ADDRESS",
        )
    if os.environ.setdefault("RAY_AUTH_MODE", "token") != "token":
        raise Refused(
            f"RAY_AUTH_MODE is {os.environ['RAY_AUTH_MODE']}: any process of this machine could run code as you",
            next="unset RAY_AUTH_MODE",
        )
    if "RAY_AUTH_TOKEN_PATH" not in os.environ:
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # never written to a file
    os.environ.setdefault("RAY_worker_niceness", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # then it is loopback, elsewhere too
    import ray

    folder = Path(tempfile.mkdtemp(prefix="xkd-ray-", dir=_short_folder()))
    ray.init(
        num_cpus=count,
        include_dashboard=False,
        _node_ip_address="127.0.0.1",
        _temp_dir=str(folder),
        object_store_memory=256 * 2**20,
        **_quiet(),
    )
    return folder


def _short_folder() -> str:
    """Where temporary files go; the sockets that Ray makes there have names of 107 characters at most."""
    usual = tempfile.gettempdir()
    return usual if len(usual) < 20 else "/tmp"


def _join(address: str) -> None:
    if "://" in address:
        raise UsageError(f"--ray-address {address}: not the address of a cluster", next="give HOST:PORT, or auto")
    import ray
    from ray.exceptions import AuthenticationError

    modules = [str(Path(str(importlib.import_module(name).__file__)).parent) for name in SHIPPED]
    try:
        ray.init(address=address, runtime_env={"py_modules": modules}, **_quiet())
    except AuthenticationError as error:
        raise Refused(
            f"the Ray cluster at {address} does not take our token: {_said(error)}",
            next="set RAY_AUTH_TOKEN_PATH to a copy of the head's token file that only you can read",
        ) from error
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise WorkersGone(
            f"no Ray cluster at {address}: {first_line(error)}",
            next="start it (docs/cluster.md), on this machine too, and check the address",
        ) from error


def _quiet() -> dict[str, Any]:
    """Settings that keep Ray off our standard output, which may be one JSON object."""
    import ray._private.worker as worker

    worker.print_to_stdstream = lambda *_args, **_kwargs: None
    return {"log_to_driver": False, "logging_level": "error"}


def _refuse_too_small(ray: Any, workers: Workers) -> None:
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if not any(node.get("CPU", 0) >= 1 and node.get("GPU", 0) >= workers.gpus for node in nodes):
        most = max(nodes, key=lambda node: (node.get("GPU", 0), node.get("CPU", 0)))
        raise UsageError(
            f"no machine has room for a worker of 1 CPU and {workers.gpus:g} GPUs; the largest has "
            f"{most.get('CPU', 0):g} CPUs and {most.get('GPU', 0):g} GPUs",
            next="ask for fewer with --gpus-per-worker, or start Ray's nodes with --num-cpus and --num-gpus",
        )


_COLOUR: Final = re.compile(r"\x1b\[[0-9;]*m")


def _said(error: BaseException) -> str:
    """The telling line of what Ray says of a death."""
    lines = [line.strip() for line in _COLOUR.sub("", str(error)).splitlines() if line.strip()]
    telling = next((line for line in lines if line.startswith("The actor is dead because")), "")
    plain = (lines or [type(error).__name__])["creation task" in str(error) and -1]  # there, the cause is last
    line = telling.removeprefix("The actor is dead because ") or plain
    return line.partition(" Worker exit type")[0].rstrip(".")[:160]

"""Workers on Ray: on this machine's loopback, or on a cluster that is joined. The only module that imports ray.

Ray's own restarts and retries are off: scheduler.py counts tries by shard, which tells a bad document from a bad
worker.
"""

import atexit
import importlib
import importlib.metadata
import os
import re
import secrets
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Hashable, Iterator
from contextlib import ExitStack, chdir, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

from xkd_pipeline.workers.contract import AGAIN, KEPT, Failed, Make, Report, Stage, Workers, first_line, out_of_memory
from xkd_schemas.cache.manifest import Commit, MadeDifferently
from xkd_schemas.console import warn
from xkd_schemas.durable_files import own_folder, written_beside
from xkd_schemas.errors import InputMissing, Mismatch, Refused, UsageError, WorkersGone, XkdError

SAME: Final = ("numpy", "pyarrow", "spacy", "tokenizers", "torch", "transformers")
"""Packages that results depend on, which must be the same everywhere."""
LOOK_SECONDS: Final = 5.0  # how long a network file system may take to show a new file
SHIPPED: Final = ("xkd_schemas", "xkd_trainer", "xkd_pipeline")  # our packages, sent to every worker of a cluster
SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)
END_SECONDS: Final = 20.0
"""A Ray whose head is gone may wait for it for a minute and then end this process with its own exit status."""
_START_ONE: Final = "start it (docs/cluster.md), on this machine too, and check the address"
_COLOUR: Final = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """What a worker on another machine must find there."""

    paths: tuple[Path, ...]
    mark: Path  # a file that was written just now: a folder without it has the same name and is another one
    versions: dict[str, str]

    def check(self) -> None:
        """Raise InputMissing or Mismatch that names this machine and what is not as it is on the driver's."""
        host = socket.gethostname()
        shared = f"put it on storage that all machines see at the same path, or leave {host} out of the cluster"
        for path in self.paths:
            if not path.exists():
                raise InputMissing(f"worker on {host}: {path} is not there", fix=shared)
        end = time.monotonic() + LOOK_SECONDS
        while not self.mark.exists():
            if time.monotonic() > end:
                raise InputMissing(f"worker on {host}: {self.mark.parent} is another folder there", fix=shared)
            time.sleep(0.2)
        for name, version in versions().items():
            if self.versions.get(name, version) != version:
                raise Mismatch(
                    f"worker on {host} has {name} {version}, this process {self.versions[name]}",
                    kept=KEPT,
                    fix=f"install {name} {self.versions[name]} on {host}",
                )


def versions() -> dict[str, str]:
    """Versions of the packages of SAME that are installed, without the build (+cpu, +cu130)."""
    found = {}
    for name in SAME:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name).partition("+")[0]
    return found


def find_ray_processes(ray: Any) -> list[tuple[str, str, int]]:
    """Name, address and port of the processes without which nothing goes on: the head's, and this machine's own."""
    context = ray.get_runtime_context()
    host, _, port = context.gcs_address.rpartition(":")
    ours = next(node for node in ray.nodes() if node["NodeID"] == context.get_node_id())
    return [
        ("head", host.strip("[]"), int(port)),
        ("node manager", ours["NodeManagerAddress"], int(ours["NodeManagerPort"])),
    ]


def shut_down() -> None:
    """Shut Ray down; where it does not come back in time it is left to die with this process."""
    if ray := sys.modules.get("ray"):
        with handlers_kept(default=True):  # a second signal does not wait
            closing = threading.Thread(target=ray.shutdown, daemon=True)
            closing.start()
            closing.join(END_SECONDS)
        if closing.is_alive():
            atexit.unregister(ray.shutdown)


@contextmanager
def handlers_kept(*, default: bool = False) -> Iterator[None]:
    """Put back the handlers of signals at the end, and until then, if `default`, the system's in their place."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        for number in SIGNALS if default else ():
            signal.signal(number, signal.SIG_DFL)
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _start_here(count: int, folder: Path) -> None:
    if os.environ.get("RAY_ADDRESS"):
        raise Refused(
            f"RAY_ADDRESS is set to {os.environ['RAY_ADDRESS']}, and a cluster is only joined when asked for",
            fix="pass --ray-address, or unset RAY_ADDRESS",
        )
    if os.environ.setdefault("RAY_AUTH_MODE", "token") != "token":
        raise Refused(
            f"RAY_AUTH_MODE is {os.environ['RAY_AUTH_MODE']}: any process of this machine could run code as you",
            fix="unset RAY_AUTH_MODE",
        )
    if "RAY_AUTH_TOKEN_PATH" not in os.environ:
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # never written to a file
    os.environ["PYTHONSAFEPATH"] = "1"
    os.environ.setdefault("RAY_worker_niceness", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # then it is loopback, elsewhere too
    import ray

    try:
        ray.init(
            num_cpus=count, include_dashboard=False, _node_ip_address="127.0.0.1", _temp_dir=str(folder / "ray"),
            object_store_memory=256 * 2**20, **_quiet(),
        )  # fmt: skip
    except Exception as error:  # Ray raises just that where its processes do not come up
        raise WorkersGone(
            f"Ray did not start on this machine: {first_line(error)}", kept=KEPT, fix=f"{AGAIN}, or use --workers 0"
        ) from error
    address = ray.get_runtime_context().gcs_address
    if not address.startswith(("127.", "[::1]")):
        warn(f"Ray listens on {address}, which other machines may reach; they need a token that only this run knows")


def _join(address: str) -> None:
    if "://" in address:
        raise UsageError(f"--ray-address {address}: not the address of a cluster", fix="give HOST:PORT, or auto")
    host, colon, port = address.rpartition(":")
    if colon and (silence := no_answer(host, int(port) if port.isdigit() else 0)):  # Ray would try for minutes
        raise WorkersGone(f"no Ray cluster at {address}: {silence}", fix=_START_ONE)
    token = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()
    if "RAY_AUTH_TOKEN" not in os.environ and token.is_file() and token.stat().st_mode & 0o077:
        warn(f"{token}: others on this machine can read the cluster's token; chmod 600 it")
    import ray
    from ray.exceptions import AuthenticationError

    modules = [str(Path(str(importlib.import_module(name).__file__)).parent) for name in SHIPPED]
    try:
        ray.init(address=address, runtime_env={"py_modules": modules}, **_quiet())
    except AuthenticationError as error:
        raise Refused(
            f"the Ray cluster at {address} does not take our token: {telling_line(error)}",
            fix="set RAY_AUTH_TOKEN_PATH to a copy of the head's token file that only you can read",
        ) from error
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise WorkersGone(f"no Ray cluster at {address}: {first_line(error)}", fix=_START_ONE) from error


def no_answer(host: str, port: int) -> str:
    """Why nothing answers there; "" where something does."""
    try:
        socket.create_connection((host, port), timeout=5.0).close()
    except OSError as error:
        return str(error.strerror or error)
    return ""


def _quiet() -> dict[str, Any]:
    """Settings that keep Ray off our standard output, which may be one JSON object."""
    import ray._private.worker as worker

    worker.print_to_stdstream = lambda *_args, **_kwargs: None
    return {"log_to_driver": False, "logging_level": "error"}


def refuse_too_small(ray: Any, workers: Workers) -> None:
    """Raise UsageError where no machine has what one worker asks for: Ray would wait for one for ever."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if not any(node.get("CPU", 0) >= 1 and node.get("GPU", 0) >= workers.gpus for node in nodes):
        most = max(nodes, key=lambda node: (node.get("GPU", 0), node.get("CPU", 0)))
        raise UsageError(
            f"no machine has room for a worker of 1 CPU and {workers.gpus:g} GPUs; the largest has "
            f"{most.get('CPU', 0):g} CPUs and {most.get('GPU', 0):g} GPUs",
            fix="ask for fewer with --gpus-per-worker, or start Ray's nodes with --num-cpus and --num-gpus",
        )


def telling_line(error: BaseException) -> str:
    """The telling line of what Ray says of a death."""
    lines = [line.strip() for line in _COLOUR.sub("", str(error)).splitlines() if line.strip()]
    telling = next((line for line in lines if line.startswith("The actor is dead because")), "")
    plain = (lines or [type(error).__name__])["creation task" in str(error) and -1]  # there, the cause is last
    line = telling.removeprefix("The actor is dead because ") or plain
    return line.partition(". ")[0].rstrip(".")[:160]


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
    """Workers that hold a loaded stage; see scheduler.Pool. A context manager: at its end all of them are gone.

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
        self._place: Place | None = None

    def __enter__(self) -> Self:
        try:
            usual = tempfile.gettempdir()
            parent = Path(usual if len(usual) < 17 else "/tmp")  # Ray's sockets have names of 107 characters at most
            # a folder that only this user can enter: Ray opens the one it is given, inside, to all users
            self._enter(self._own.enter_context(own_folder(parent, "xkd-ray-", mode=0o700)))
        except BaseException:
            self._own.close()
            raise
        return self

    def _enter(self, folder: Path) -> None:
        """Start a cluster, whose files lie in `folder`, or join the one that was named.

        Ray lets workers import from the folder that the driver is in, and starts its own processes there: both is an
        empty one, so that no file of the user's folder is taken for a module.
        """
        (empty := folder / "empty").mkdir()
        if token := os.environ.get("RAY_AUTH_TOKEN_PATH"):
            os.environ["RAY_AUTH_TOKEN_PATH"] = str(Path(token).expanduser().absolute())
        address = self._workers.address
        self._own.callback(shut_down)
        with handlers_kept(), chdir(empty):  # Ray puts its own handlers in their place
            if address is None:
                _start_here(self._workers.count, folder)
            else:
                _join(address)
        import ray

        self._ray = ray
        self._processes = find_ray_processes(ray)
        refuse_too_small(ray, self._workers)
        if address is not None:
            paths = self._stage.paths()
            self._own.enter_context(suppress(OSError))
            mark = self._own.enter_context(written_beside(paths[0], Path.touch))
            self._place = Place(paths=paths, mark=mark, versions=versions())
        options = {"num_cpus": 1, "num_gpus": self._workers.gpus, "max_restarts": 0, "max_task_retries": 0}
        self._kind = ray.remote(**options)(_Actor)

    def __exit__(self, *_raised: object) -> None:
        self._own.close()

    def start(self) -> Hashable:
        """Start a worker; it loads the stage."""
        worker = self._kind.remote(self._stage)
        self._open[worker.ready.remote(self._place, self._cwd)] = worker
        return worker  # type: ignore[no-any-return]

    def give(self, worker: Any, job: Any, care: MadeDifferently) -> None:
        """Let a worker make a shard."""
        self._open[worker.make.remote(job, care)] = worker

    def kill(self, worker: Any) -> None:
        """End a worker; what it was at is forgotten. Ray kills a process that does not answer after some seconds."""
        self._ray.kill(worker, no_restart=True)
        self._open = {reference: owner for reference, owner in self._open.items() if owner is not worker}

    def reports(self, seconds: float) -> list[Report]:
        """What became of workers and shards; the first within `seconds`."""
        references = list(self._open)
        first, _ = self._ray.wait(references, timeout=seconds)
        if first:
            first, _ = self._ray.wait(references, num_returns=len(references), timeout=0)
        found = [(self._open.pop(reference), self._result(reference)) for reference in first]
        if not found or any(isinstance(what, Failed) for _, what in found):
            for name, host, port in self._processes:  # where one is gone, Ray would wait for a minute and exit
                if silence := no_answer(host, port):
                    reason = f"its {name} at {host}:{port} does not answer: {silence}"
                    raise WorkersGone(f"the Ray cluster is gone: {reason}", kept=KEPT, fix=AGAIN)
        return found

    def _result(self, reference: Any) -> Commit | Failed | None:
        from ray.exceptions import OutOfMemoryError, RayActorError, RayError, RayTaskError

        try:
            value = self._ray.get(reference)
        except RayTaskError as error:
            cause = error.cause
            if isinstance(cause, XkdError):
                raise cause from None
            if out_of_memory(cause):
                return Failed(first_line(cause), memory=True, alive=True)
            raise
        except OutOfMemoryError as error:
            return Failed(telling_line(error), memory=True)
        except RayActorError as error:
            return Failed(telling_line(error))
        except RayError as error:
            raise WorkersGone(f"Ray fails: {telling_line(error)}", kept=KEPT, fix=AGAIN) from error
        return value if isinstance(value, Commit) else None

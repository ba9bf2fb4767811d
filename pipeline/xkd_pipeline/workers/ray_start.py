"""Ray started on this machine's loopback, or a cluster joined; with cluster.py the only module that imports ray."""

import atexit
import importlib
import os
import re
import secrets
import signal
import socket
import tempfile
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, chdir, contextmanager
from pathlib import Path
from typing import Any, Final

from xkd_pipeline.workers.contract import AGAIN, KEPT, Workers, first_line
from xkd_schemas.console import warn
from xkd_schemas.errors import Refused, UsageError, WorkersGone
from xkd_schemas.own_folders import own_folder

SHIPPED: Final = ("xkd_schemas", "xkd_trainer", "xkd_pipeline")
"""Our packages, sent to every worker of a cluster."""
SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)


def doors(ray: Any) -> list[tuple[str, str, int]]:
    """Name, address and port of the processes without which nothing goes on: the head's, and this machine's own."""
    context = ray.get_runtime_context()
    host, _, port = context.gcs_address.rpartition(":")
    ours = next(node for node in ray.nodes() if node["NodeID"] == context.get_node_id())
    return [
        ("head", host.strip("[]"), int(port)),
        ("node manager", ours["NodeManagerAddress"], int(ours["NodeManagerPort"])),
    ]


def start(workers: Workers, folder: Path) -> None:
    """Start a cluster, whose files lie in `folder`, or join the one that `workers` names.

    Ray lets workers import from the folder that the driver is in, and starts its own processes there: both is an empty
    one, so that no file of the user's folder is taken for a module.
    """
    empty = folder / "empty"
    empty.mkdir()
    if token := os.environ.get("RAY_AUTH_TOKEN_PATH"):
        os.environ["RAY_AUTH_TOKEN_PATH"] = str(Path(token).expanduser().absolute())
    with handlers_kept(), chdir(empty):  # Ray puts its own handlers in their place
        if workers.address is None:
            _start_here(workers.count, folder)
        else:
            _join(workers.address)


def private_folder() -> AbstractContextManager[Path]:
    """A new folder that only this user can enter; what drivers that were killed left goes first.

    Ray's files lie in a folder of their own inside: Ray opens the one it is given to all users.
    """
    return own_folder(Path(_short_folder()), "xkd-ray-", mode=0o700)


END_SECONDS: Final = 20.0
"""A Ray whose head is gone may wait for it for a minute and then end this process with its own exit status."""


def end(ray: Any) -> None:
    """Shut Ray down; where it does not come back in time it is left to die with this process."""
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
            num_cpus=count,
            include_dashboard=False,
            _node_ip_address="127.0.0.1",
            _temp_dir=str(folder / "ray"),
            object_store_memory=256 * 2**20,
            **_quiet(),
        )
    except Exception as error:  # Ray raises just that where its processes do not come up
        raise WorkersGone(
            f"Ray did not start on this machine: {first_line(error)}", kept=KEPT, fix=f"{AGAIN}, or use --workers 0"
        ) from error
    address = ray.get_runtime_context().gcs_address
    if not address.startswith(("127.", "[::1]")):
        warn(f"Ray listens on {address}, which other machines may reach; they need a token that only this run knows")


def _short_folder() -> str:
    """Where temporary files go; the sockets that Ray makes there have names of 107 characters at most."""
    usual = tempfile.gettempdir()
    return usual if len(usual) < 17 else "/tmp"


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
            f"the Ray cluster at {address} does not take our token: {said(error)}",
            fix="set RAY_AUTH_TOKEN_PATH to a copy of the head's token file that only you can read",
        ) from error
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise WorkersGone(f"no Ray cluster at {address}: {first_line(error)}", fix=_START_ONE) from error


_START_ONE: Final = "start it (docs/cluster.md), on this machine too, and check the address"


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


_COLOUR: Final = re.compile(r"\x1b\[[0-9;]*m")


def said(error: BaseException) -> str:
    """The telling line of what Ray says of a death."""
    lines = [line.strip() for line in _COLOUR.sub("", str(error)).splitlines() if line.strip()]
    telling = next((line for line in lines if line.startswith("The actor is dead because")), "")
    plain = (lines or [type(error).__name__])["creation task" in str(error) and -1]  # there, the cause is last
    line = telling.removeprefix("The actor is dead because ") or plain
    return line.partition(". ")[0].rstrip(".")[:160]

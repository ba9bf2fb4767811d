"""Programs, and xkd-train in several processes that find each other as torchrun starts them, forked from this one.

A fork has torch and transformers, and kernels that are compiled already; a program of its own would take many seconds
to get there.
"""

import contextlib
import faulthandler
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from accelerate.state import AcceleratorState, GradientState

from xkd_trainer.cli import main


class Ended(NamedTuple):
    code: int
    out: str
    err: str


def launched(
    world: int, folder: Path, *words: object, inside: Callable[[int], None], seconds: float = 100.0
) -> list[Ended]:
    """How each process ends, and what it says; `inside` is called in each first, with its number.

    One that still runs when time is up says where it hangs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
    common |= {"LOCAL_WORLD_SIZE": str(world), "ACCELERATE_USE_CPU": "true"}
    pids = []
    for rank in range(world):
        if (pid := os.fork()) == 0:
            os.environ.update({**common, "RANK": str(rank), "LOCAL_RANK": str(rank)})
            sys.argv = ["xkd-train", *map(str, words)]
            _child(folder / str(rank), lambda rank=rank: (inside(rank), main()), seconds)
        pids.append(pid)
    return wait_for(pids, [folder / str(rank) for rank in range(world)], seconds)


def begun(
    code: str,
    folder: Path,
    *words: object,
    path: Path | None = None,
    without: Sequence[str] = (),
    seconds: float = 200,
) -> int:
    """A program of its own: nothing of ours is imported yet, none of the modules `without` is installed; its process.

    Args:
        folder: For what it says.
        path: Where it finds our packages; None for those that are here.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pid = os.fork()
    if pid == 0:
        gone = ("xkd_schemas", "xkd_trainer", "xkd_pipeline", "numba", *without)
        for name in [name for name in sys.modules if name.partition(".")[0] in gone]:
            del sys.modules[name]
        sys.modules.update(dict.fromkeys(without))  # type: ignore[arg-type]
        sys.path[:0] = [str(path)] if path else []
        sys.argv = ["-c", *map(str, words)]
        _child(folder, lambda: exec(code, {"__name__": "__main__"}), seconds)
    return pid


def wait_for(pids: list[int], folders: Sequence[Path], seconds: float = 200) -> list[Ended]:
    """How processes end, each of which speaks into its folder."""
    codes = _wait(pids, time.monotonic() + seconds + 5)
    said = ([(folder / name).read_text() for name in ("out", "err")] for folder in folders)
    return [Ended(code, *both) for code, both in zip(codes, said, strict=True)]


def _wait(pids: list[int], deadline: float) -> list[int]:
    ended: dict[int, int] = {}
    while len(ended) < len(pids):
        for pid in set(pids) - set(ended):
            gone, status = os.waitpid(pid, os.WNOHANG)
            if gone:
                ended[pid] = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
    return [ended[pid] for pid in pids]


def _child(folder: Path, program: Callable[[], object], seconds: float) -> None:
    code = 0
    folder.mkdir(exist_ok=True)
    out, err = (folder.joinpath(name).open("w", buffering=1) for name in ("out", "err"))
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            faulthandler.dump_traceback_later(seconds, exit=True, file=err)
            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()
            program()
    except SystemExit as left:
        code = int(left.code or 0)
    except BaseException:
        code = 99
        traceback.print_exc(file=err)
    finally:
        os._exit(code)

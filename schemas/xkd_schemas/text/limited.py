"""A stranger's program, such as a chat template, run in a copy of this process that the system ends at a limit.

What happens inside one call of the interpreter (a product, a comparison) no signal or thread of this process can stop.
See docs/decisions/0020-limits-of-chat-templates.md.
"""

import contextlib
import gc
import json
import os
import resource
import signal
import socket
import sys
import warnings
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

SECONDS: Final = 10.0  # of processor time, for each call
MEBIBYTES: Final = 1024  # of addresses, besides those that this process has
_OUT_OF_MEMORY: Final = 71


class LimitExceededError(Exception):
    """Which limit a call went over."""


class Limited:
    """A function of JSON values that runs in a child process; for one thread at a time."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function, self._owner = function, 0

    def map(self, calls: Sequence[Sequence[Any]]) -> list[tuple[Any, str]]:
        """Result of the function for each list of arguments, and the text of the error that it raised, else "".

        LimitExceededError where a call took too much time or memory, or ended its process.
        """
        if self._owner != os.getpid():  # not started, or by the process that this one is a copy of
            self._start()
        answer, code = b"", 0
        try:
            with contextlib.suppress(OSError):  # it is gone
                self._stream.write(json.dumps(calls).encode() + b"\n")
                self._stream.flush()
                answer = self._stream.readline()
        finally:
            if not answer:  # also where Ctrl-C came meanwhile: the next call would get this one's answer
                self._owner, code = 0, self._end() or 0
        if not answer:
            limits = {-signal.SIGPROF: f"{SECONDS:g} s", _OUT_OF_MEMORY: f"{MEBIBYTES} MiB"}
            raise LimitExceededError(limits.get(code, f"its process survives (exit code {code})"))
        return [(result, error) for result, error in json.loads(answer)]

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of our other threads: the child takes no lock
            child = os.fork()
        if not child:
            try:
                _serve(self._function, theirs)
            finally:
                os._exit(1)
        self._owner, self._stream = os.getpid(), ours.makefile("rwb")
        ours.close()
        theirs.close()
        self._end = weakref.finalize(self, _end, self._owner, child)


def _end(owner: int, child: int) -> int:
    """End a child of this process, not of one that this is a copy of; its exit code."""
    if os.getpid() != owner:
        return 0
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _serve(function: Callable[..., Any], ours: socket.socket) -> None:
    """Answer calls until our parent is gone."""
    for number in {int(path.name) for path in Path("/dev/fd").iterdir()} - {0, 1, 2, ours.fileno()}:
        with contextlib.suppress(OSError):  # the folder itself was open
            os.close(number)  # locks among them
    gc.freeze()  # nothing of our parent is finalised here
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    if sys.platform == "linux":  # no other system keeps to a limit of addresses
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEBIBYTES * 2**20,) * 2)
    stream = ours.makefile("rwb")
    for line in stream:
        try:
            answer = json.dumps([_call(function, arguments) for arguments in json.loads(line)])
        except MemoryError:
            os._exit(_OUT_OF_MEMORY)
        stream.write(answer.encode() + b"\n")
        stream.flush()


def _call(function: Callable[..., Any], arguments: Sequence[Any]) -> tuple[Any, str]:
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        return function(*arguments), ""
    except MemoryError:
        raise
    except Exception as error:  # whatever a stranger's program raises
        return None, str(error) or type(error).__name__
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)

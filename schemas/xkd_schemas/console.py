"""How both commands speak: one-line errors with exit codes, plain lines off a terminal; progress.py has the bars."""

import contextlib
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, Final, TextIO

import typer
from rich.console import Console
from rich.text import Text

from xkd_schemas import progress
from xkd_schemas.errors import Interrupted, OutOfMemory, Terminated, UsageError, XkdError

CONTROLS = dict.fromkeys([*range(32), 127, *range(128, 160), *range(8234, 8239), *range(8294, 8298)])
"""Characters that could steer a terminal or reorder a line; dropped from anything we print."""
STOPS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # a cluster sends the last before it takes a machine
AGAIN: Final = 1.0  # seconds after which a signal that ended nothing is raised again
_MISUSE: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")
"""Base of what typer raises for a command line; which package it lives in differs between its versions."""
_received: list[int] = []  # signals that came since the command began
_kept: list[str] = []  # what was kept, from the innermost work that was ended
_KEPT = "everything that was committed or saved so far"


def rank() -> int:
    """Which process of a run this is, as torchrun and accelerate launch number them; 0 where there is one."""
    return int(os.environ.get("RANK") or 0)


def say(line: str) -> None:
    """Print one line on standard output, as it is: no markup, no control characters, no wrapping.

    Of several processes of a run the first one speaks; so do `warn`, `note` and `say_json`.
    """
    if rank() == 0:
        _write(sys.stdout, line)


def _write(stream: TextIO, line: str) -> None:
    progress.clear()
    stream.write(line.translate(CONTROLS) + "\n")
    stream.flush()


def warn(line: str) -> None:
    """Print one line on standard error."""
    if rank():
        return
    progress.clear()
    Console(stderr=True, soft_wrap=True).print(Text(f"warning: {line.translate(CONTROLS)}", style="yellow"))


def note(line: str) -> None:
    """Print one line on a terminal about what is going on, so that a wait is not silent; nothing elsewhere.

    Standard error of a script stays what it is: nothing, or the one line of an error.
    """
    if rank() == 0 and sys.stderr.isatty():
        _write(sys.stderr, line)


def say_json(value: object) -> None:
    """Print one JSON object on standard output."""
    say(json.dumps(value, ensure_ascii=True, sort_keys=True))


def answer(value: object, lines: Iterable[str], as_json: bool) -> None:
    """Print what a command found: one JSON object, or lines."""
    if as_json:
        say_json(value)
    for line in () if as_json else lines:
        say(line)


def run(command: str, app: Callable[..., object]) -> None:
    """Run a typer app and leave with an exit code of errors.py; one line, never a traceback, for a user's mistake.

    Ctrl-C, SIGTERM and SIGUSR1 end it and clean up; a second one ends it at once.
    """
    _received.clear()
    _kept.clear()
    unraisable = sys.unraisablehook
    before = {number: signal.signal(number, _stop) for number in STOPS if signal.getsignal(number) != signal.SIG_IGN}
    try:
        with progress.heartbeat(command, quiet=rank() > 0):
            code = app(standalone_mode=False)  # typer hands its own errors to us
        if code == Interrupted.exit_code:  # how typer reports Ctrl-C
            raise KeyboardInterrupt
    except BaseException as error:
        ending = _translate_error(command, error)
        if os.environ.get("XKD_DEBUG"):
            traceback.print_exc()
        tell(ending, command)
        raise SystemExit(ending.exit_code) from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        sys.unraisablehook = unraisable
        for number, handler in before.items():
            signal.signal(number, handler)
    raise SystemExit(code if isinstance(code, int) else 0)


def _translate_error(command: str, error: BaseException) -> XkdError:
    """What ended a command, as one of ours; anything else is raised again."""
    if isinstance(error, XkdError):
        return error
    if isinstance(error, _MISUSE):
        return _translate_misuse(command, error)
    left = isinstance(error, SystemExit) and error.code == Interrupted.exit_code
    if left or _received or isinstance(error, typer.Abort | KeyboardInterrupt):  # C code makes other errors of it
        kind = Terminated if {*_received} - {signal.SIGINT} else Interrupted
        return kind(kind.__name__.lower(), kept=(_kept or [_KEPT])[0], fix="run the same command again to go on")
    if isinstance(error, MemoryError):
        return OutOfMemory("out of memory", kept=_KEPT, fix="use smaller batches")
    raise error


def _stop(number: int, _frame: FrameType | None) -> None:
    """As Ctrl-C, which libraries in C know how to hand on; of other exceptions Ray makes a SystemError."""
    signal.signal(number, signal.SIG_DFL)
    _received.append(number)
    sys.unraisablehook = lambda _unraisable: None  # where it comes in the middle of a library's callback
    signal.signal(signal.SIGALRM, _again)
    signal.setitimer(signal.ITIMER_REAL, AGAIN, AGAIN)
    raise KeyboardInterrupt


def _again(_number: int, _frame: FrameType | None) -> None:
    """Raise it once more where a library swallowed it, as pyarrow does while it imports pandas; not in a clean-up."""
    error = sys.exc_info()[1]
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    if error is None:
        raise KeyboardInterrupt


@contextlib.contextmanager
def tell_kept(describe: Callable[[], str]) -> Iterator[None]:
    """Where a signal of STOPS ends the work inside, the last line says `describe()` of what was kept."""
    try:
        yield
    except KeyboardInterrupt:
        _kept.append(describe())
        raise


@contextlib.contextmanager
def signals_noted() -> Iterator[Callable[[], int]]:
    """Which signal of STOPS came, 0 for none, so that the caller can end a step first; it is raised at the end.

    A second signal is raised at once. In other threads than the main one signals are not touched.
    """
    came: list[int] = []
    before: dict[int, Any] = {}

    def give_back() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)
        before.clear()

    def remember(number: int, _frame: FrameType | None) -> None:
        came.append(number)
        give_back()

    if threading.current_thread() is threading.main_thread():
        before.update({n: signal.signal(n, remember) for n in STOPS if signal.getsignal(n) != signal.SIG_IGN})
    try:
        yield lambda: came[0] if came else 0
    finally:
        give_back()
    if came:
        signal.raise_signal(came[0])


def _translate_misuse(command: str, error: Any) -> UsageError:
    context = getattr(error, "ctx", None)
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
        raise SystemExit(UsageError.exit_code)
    said = " ".join(error.format_message().split()).rstrip(".")
    return UsageError(said, fix=f"{context.command_path if context else command} --help")


def tell(error: XkdError, command: str = "") -> None:
    """Print what went wrong as every command does; `command` is by default the name of the program that runs.

    What is the same in all processes of a run is said by the first.
    """
    if rank() and (error.shared or isinstance(error, UsageError | Interrupted | Terminated)):
        return
    if "--json" in sys.argv:
        kind = type(error).__name__
        parts = {"code": error.exit_code, "kind": kind, "what": error.what, "kept": error.kept, "next": error.fix}
        say_json({"error": parts})
    _write(sys.stderr, f"{command or Path(sys.argv[0]).stem}: {error}")

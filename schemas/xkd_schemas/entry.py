"""Both commands from their first moment: a signal that stops them while modules are imported ends in one line, too."""

import importlib
import os
import signal
from types import FrameType


def cache() -> None:
    """Entry point of xkd-cache."""
    _start("xkd-cache", "xkd_pipeline.cli.app")


def train() -> None:
    """Entry point of xkd-train."""
    _start("xkd-train", "xkd_trainer.cli")


def _start(command: str, module: str) -> None:
    """Import the command and run it; console.run takes the signals over."""

    def leave(number: int, _frame: FrameType | None) -> None:
        word, code = ("interrupted", 130) if number == signal.SIGINT else ("terminated", 143)
        os.write(2, f"{command}: {word}. Kept: everything; nothing was begun. Next: run it again\n".encode())
        os._exit(code)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup and `&` leave it
            signal.signal(number, leave)
    importlib.import_module(module).main()

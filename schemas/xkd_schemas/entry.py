"""Both commands from their first moment: Ctrl-C and SIGTERM while modules are imported end in one line, too."""

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
        word, code = ("terminated", 143) if number == signal.SIGTERM else ("interrupted", 130)
        os.write(2, f"{command}: {word}. Kept: everything; nothing was begun. Next: run it again\n".encode())
        os._exit(code)

    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup and `&` leave it
            signal.signal(number, leave)
    importlib.import_module(module).main()

"""xkd-train as it is typed, in this process."""

import contextlib
import io
import sys
from typing import NamedTuple
from unittest.mock import patch

import pytest

from xkd_trainer.cli import main


class Ended(NamedTuple):
    code: int
    out: str
    err: str


def xkd_train(*words: object) -> Ended:
    """How the command ends, and what it says; whatever is no exit is raised."""
    with (
        patch.object(sys, "argv", ["xkd-train", *map(str, words)]),
        contextlib.redirect_stdout(io.StringIO()) as out,
        contextlib.redirect_stderr(io.StringIO()) as err,
        pytest.raises(SystemExit) as left,
    ):
        main()
    return Ended(int(left.value.code or 0), out.getvalue(), err.getvalue())

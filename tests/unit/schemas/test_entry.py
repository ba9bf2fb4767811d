"""A signal in the first moments of a command, while it imports its modules, torch among them."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = "import sys; sys.path.insert(0, {folder!r}); from xkd_schemas import entry; entry.train()"
SIGNALLED = "import os, signal\nos.kill(os.getpid(), signal.{name})\n"
WITH_ITS_OWN_ERROR = SIGNALLED + "raise ImportError('of the C code')\n"


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
@pytest.mark.parametrize(
    ("module", "content"), [("typer", SIGNALLED), ("torch", SIGNALLED), ("torch", WITH_ITS_OWN_ERROR)]
)
def test_a_signal_while_modules_are_imported_ends_in_one_line(
    tmp_path: Path, module: str, content: str, name: str, code: int
) -> None:
    (tmp_path / f"{module}.py").write_text(content.format(name=name))
    argv = ["--shards", "x", "--student", "y", "--out", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(folder=str(tmp_path)), *argv],
        capture_output=True, text=True, check=False,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    assert (done.returncode, done.stderr.count("\n")) == (code, 1), done.stderr
    assert done.stderr.startswith(f"xkd-train: {'terminated' if code == 143 else 'interrupted'}. Kept: everything")

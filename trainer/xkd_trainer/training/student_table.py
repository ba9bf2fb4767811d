"""What to do where the cache was not aligned for the student's tokenizer: say the command, or run it.

The trainer imports nothing of the pipeline; `xkd-cache align` runs as a program of its own, where it is installed.
"""

import importlib.util
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Final

from xkd_schemas.cache.table import names_in
from xkd_schemas.config import RunConfig
from xkd_schemas.console import note, say
from xkd_schemas.errors import InputMissing, Mismatch, UsageError
from xkd_schemas.text.templates import AUTO
from xkd_trainer.data.cache import find_student

CHOICES: Final = ("fail", "align")
PROGRAM: Final = "from xkd_pipeline.cli.app import main; main()"


def student_table(run: RunConfig, identity: dict[str, str], name: str, *, on_missing: str, quiet: bool = False) -> str:
    """Name of the table of this student's tokens, which is made first where it is missing and `align` is chosen.

    `identity` is of the student's tokenizer, `name` a table to be used, "" for the one that fits.

    Raises:
        UsageError: `on_missing` is no choice, several tables fit, or several processes would align at once.
        InputMissing, Mismatch: There is none, and `fail` is chosen or it could not be made.
    """
    if on_missing not in CHOICES:
        raise UsageError(f"--on-missing {on_missing}: not known", fix=f"use {' or '.join(CHOICES)}")
    root = Path(run.cache)
    try:
        return find_student(root, identity, name)
    except (InputMissing, Mismatch) as error:
        if not root.is_dir() or not names_in(root, "teachers"):
            raise
        command = align_command(run, name)
        if on_missing == "fail":
            raise type(error)(
                error.what, kept=error.kept, fix=f"{shlex.join(command)}   (or add --on-missing align)"
            ) from None
    _align(command, quiet)
    return find_student(root, identity, name)


def align_command(run: RunConfig, name: str) -> list[str]:
    """The `xkd-cache align` command for the student of a run.

    >>> " ".join(align_command(RunConfig(cache="c", student={"tokenizer": "tok", "template": "chat"}), ""))
    'xkd-cache align c --student tok --template chat --max-tokens 1024'
    """
    student = run.student
    command = ["xkd-cache", "align", run.cache, "--student", student.tokenizer or student.model]
    command += [] if student.template == AUTO else ["--template", student.template]
    command += ["--max-tokens", str(student.max_tokens)]
    thinking = student.enable_thinking
    command += [] if thinking is None else ["--enable-thinking", str(thinking).lower()]
    command += ["--name", name or student.name] if name or student.name else []
    return command + (["--teacher", run.teacher.name] if run.teacher.name else [])


def _align(command: list[str], quiet: bool) -> None:
    line = shlex.join(command)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("several processes cannot align at once", fix=f"once, before training: {line}")
    if importlib.util.find_spec("xkd_pipeline") is None:
        raise InputMissing("xkd-cache is not installed here", fix=f"pip install 'xkd-toolkit[pipeline]', then {line}")
    note(line)
    program = [sys.executable, "-P", "-c", PROGRAM, *command[1:]]
    done = subprocess.run(program, stdout=subprocess.PIPE, text=True, check=False)
    for said in done.stdout.splitlines() if not quiet else ():
        say(said)
    if done.returncode:
        raise InputMissing(f"aligning ended with exit code {done.returncode}", kept="the cache", fix=line)

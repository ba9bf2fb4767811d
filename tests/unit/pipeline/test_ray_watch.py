"""What watches Ray's own processes, without Ray."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from xkd_pipeline import ray_watch
from xkd_pipeline.ray_watch import Family, attended
from xkd_schemas.errors import WorkersGone

WAITS = """
import sys, time
from xkd_pipeline import ray_watch
from xkd_schemas.errors import WorkersGone
ray_watch.GRACE_SECONDS = 0.1
with ray_watch.attended(lambda: "its head died", WorkersGone, lambda: print("tidied")):
    time.sleep(60)
"""


def test_a_call_that_waits_for_a_dead_head_ends_the_process_with_69_and_one_line() -> None:
    done = subprocess.run([sys.executable, "-c", WAITS], capture_output=True, text=True, timeout=60)

    assert done.returncode == 69
    assert done.stdout == "tidied\n"
    assert done.stderr == "-c: its head died.\n"


def test_what_the_call_raises_within_the_grace_is_the_end() -> None:
    asked: list[int] = []

    def call() -> None:
        with attended(lambda: asked.append(1) or "x", WorkersGone, _no):
            while not asked:
                time.sleep(0.01)
            raise ValueError("Ray says so itself")

    with pytest.raises(ValueError, match="Ray says so itself"):
        call()


def test_a_head_that_answers_ends_nothing(monkeypatch) -> None:
    monkeypatch.setattr(ray_watch, "EVERY_SECONDS", 0.01)
    asked = []

    with attended(lambda: asked.append(1) or "", WorkersGone, _no):
        while len(asked) < 3:
            time.sleep(0.01)

    before = len(asked)
    time.sleep(0.05)
    assert len(asked) == before


def test_a_family_knows_who_of_it_died_and_ends_the_rest(tmp_path: Path) -> None:
    names = ("gcs_server", "raylet", "other")
    children = [subprocess.Popen([shutil.copy(shutil.which("sleep") or "", tmp_path / name), "60"]) for name in names]
    try:
        while any(Path(f"/proc/{child.pid}/comm").read_text().strip() == "python" for child in children):
            time.sleep(0.01)
        family = Family()
        assert family.gone() == ""

        os.kill(children[0].pid, 9)
        while not (said := family.gone()):  # a zombie until it is waited for
            time.sleep(0.01)
        family.kill()

        assert said == "its gcs_server died"
        assert children[1].wait(timeout=10) == -9
        assert children[2].poll() is None
    finally:
        for child in children:
            child.kill()
            child.wait()


def _no() -> None:
    raise AssertionError("nothing is to be tidied")

"""Kill something of a run on Ray while it makes shards.

`ray_kills.py STAGE CACHE SOURCE` is the driver: fake (fake_stage.py), or documents, teacher or align over the corpus
of small_cache in SOURCE, with two workers; each shard waits for its name.
"""

import importlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

if __name__ == "__main__":
    sys.path[:0] = [str(folder) for folder in (Path(__file__).parents[2], *Path(__file__).parents[1].iterdir())]

import fake_stage
from fake_stage import SECONDS, search_path
from xkd_pipeline.tables.writer import locked
from xkd_pipeline.workers.contract import Workers
from xkd_schemas.console import run as run_app

PARTS = {"fake": "documents", "documents": "documents", "teacher": "teachers", "align": "students"}
REAL = {
    "documents": ("xkd_pipeline.parsing.stage", "DocumentsStage"),
    "teacher": ("xkd_pipeline.capture.stage", "TeacherStage"),
    "align": ("xkd_pipeline.alignment", "AlignStage"),
}
"""Where the stage is that is replaced by a slow one."""
EXITS = {"worker": {0}, "driver": {-signal.SIGKILL}, "raylet": {0, 1, 69}, "gcs_server": {0, 1, 69}}
"""What is running goes on for a while without them, and may be all there is; 1 is Ray's own."""


def work(name: str, cache: Path, source: Path, workers: Workers, trouble: str = "") -> int:
    """Make what is missing; how many units were there already. On Ray a teacher is streamed, in this process not."""
    if name == "fake":
        with locked(cache):
            return fake_stage.build_all(cache, workers, trouble=trouble).kept
    import small_cache  # the fake stage needs no torch
    from xkd_pipeline import stages

    run = small_cache.run_file(
        cache,
        documents={"corpus": [str(source / "corpus.jsonl")]},
        teacher={"model": str(source / "teacher"), "stream_layers": workers.count > 0},
        student={"tokenizer": str(source / "student")},
    )
    return int(getattr(stages, f"{name}_stage")(run, workers).values["reused"])


def started(name: str, cache: Path, source: Path) -> subprocess.Popen[bytes]:
    """A driver as a process of its own group; what it says goes to a file, as Ray's agents would hold on to a pipe."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment["PYTHONPATH"] = search_path()
    with said_of(cache).open("wb") as said:
        return subprocess.Popen(
            [sys.executable, __file__, name, str(cache), str(source)],
            env=environment, stdout=subprocess.DEVNULL, stderr=said, start_new_session=True,
        )  # fmt: skip


def said_of(cache: Path) -> Path:
    return cache.with_suffix(".said")


def children(driver: subprocess.Popen[bytes]) -> list[psutil.Process]:
    try:
        return psutil.Process(driver.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def named(processes: list[psutil.Process], target: str) -> list[psutil.Process]:
    """Those that are the target: a worker's title changes with what it does."""
    found = []
    for process in processes:
        try:
            name = process.name()
        except psutil.NoSuchProcess:
            continue
        if name.startswith("ray::_Actor" if target == "worker" else target):
            found.append(process)
    return found


def until_made(cache: Path, part: str, driver: subprocess.Popen[bytes], seconds: float = 180.0) -> None:
    """Wait for the first file of a shard, so that a unit is being made; a plan's is gone when the plan is there."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and driver.poll() is None:
        if any(any(plan.parent.glob(".tmp-*")) for plan in list((cache / part).rglob("plan.json"))):
            return
        time.sleep(0.01)
    raise AssertionError(f"{part}: no unit was begun: {said_of(cache).read_text()[-500:]}")


def killed_once(cache: Path, source: Path, name: str, target: str, chance: random.Random) -> tuple[int, str]:
    """Exit status of the driver and what it said, after the target was killed while units are made.

    After a driver's death the stage is run again at once, in this process, while its workers are still writing.
    """
    driver = started(name, cache, source)
    family: list[psutil.Process] = []
    try:
        until_made(cache, PARTS[name], driver)
        time.sleep(chance.uniform(0.0, SECONDS))
        family = children(driver)
        victims = named(family, target) if target != "driver" else [psutil.Process(driver.pid)]
        if victims:
            chance.choice(victims).kill()
        if target == "driver":
            driver.wait(timeout=30)
            work(name, cache, source, Workers())
        return driver.wait(timeout=180), said_of(cache).read_text(errors="replace")
    finally:
        for process in [*family, *children(driver)]:
            process.kill() if process.is_running() else None
        driver.kill()
        psutil.wait_procs(family, timeout=10)


def main() -> None:
    name, cache, source = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    if name in REAL:
        module, stage = REAL[name]
        slow = getattr(importlib.import_module("ray_stages"), f"Slow{name.capitalize()}")
        setattr(importlib.import_module(module), stage, slow)
    run_app("driver", lambda **_options: work(name, cache, source, Workers(count=2), "slow"))


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored by what runs in the background
    main()

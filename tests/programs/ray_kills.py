"""Kill something of a run on Ray, run the stage again, and compare the cache with an undisturbed one.

`ray_kills.py STAGE CACHE` is the driver: documents, teacher or align over the corpus of small_cache with two workers,
each shard of which waits for its name (ray_stages.py).
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil

if __name__ == "__main__":
    sys.path[:0] = [str(folder) for folder in (Path(__file__).parents[2], *Path(__file__).parents[1].iterdir())]

import small_cache
from ray_stages import SECONDS, search_path
from small_cache import IN_PROCESS, files_of
from xkd_pipeline import alignment as align
from xkd_pipeline import stages
from xkd_pipeline.capture import stage as teacher
from xkd_pipeline.parsing import stage as documents
from xkd_pipeline.workers.contract import Workers
from xkd_schemas.config import RunConfig
from xkd_schemas.console import run as run_app

TARGETS = ("worker", "driver", "raylet", "gcs_server")
PARTS = {"documents": "documents", "teacher": "teachers", "align": "students"}
SLOW = {"documents": documents, "teacher": teacher, "align": align}
NAMES = {"documents": "DocumentsStage", "teacher": "TeacherStage", "align": "AlignStage"}
EXITS = {"worker": {0}, "driver": {-signal.SIGKILL}, "raylet": {0, 1, 69}, "gcs_server": {0, 1, 69}}
"""What is running goes on for a while without them, and may be all there is; 1 is Ray's own."""


def run_of(cache: Path, source: Path) -> RunConfig:
    return small_cache.run_file(
        cache,
        documents={"corpus": [str(source / "corpus.jsonl")]},
        teacher={"model": str(source / "teacher")},
        student={"tokenizer": str(source / "student")},
    )


def work(name: str, cache: Path, source: Path, workers: Workers) -> int:
    """Make what is missing; how many units were there already."""
    stage = getattr(stages, f"{name}_stage")
    return int(stage(run_of(cache, source), workers).values["reused"])


def without(cache: Path, name: str) -> Path:
    """The cache, after what a stage makes is taken out of it."""
    shutil.rmtree(cache / PARTS[name])
    return cache


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
            work(name, cache, source, IN_PROCESS)
        return driver.wait(timeout=180), said_of(cache).read_text(errors="replace")
    finally:
        for process in [*family, *children(driver)]:
            process.kill() if process.is_running() else None
        driver.kill()
        psutil.wait_procs(family, timeout=10)


def disturbed(folder: Path, rounds: int, chance: random.Random) -> str:
    """`rounds` kills, spread over targets and stages; each is followed by a run in this process to the end."""
    source = small_cache.made()
    whole = files_of(source / "cache")
    seen: Counter[str] = Counter()
    for number in range(rounds):
        target, name = TARGETS[number % len(TARGETS)], tuple(PARTS)[number // len(TARGETS) % len(PARTS)]
        cache = without(Path(shutil.copytree(source / "cache", folder / f"cache{number}")), name)
        status, said = killed_once(cache, source, name, target, chance)
        committed = len(list((cache / PARTS[name]).rglob("commits/0*.json")))
        if status not in EXITS[target] or "Traceback" in said:
            seen["other"] += 1
            sys.stderr.write(f"{target} of {name}: {status}: {said[-1000:]}\n")
        seen[f"exit {status}"] += 1
        seen["lost"] += work(name, cache, source, IN_PROCESS) < committed
        loose = list(cache.rglob(".tmp-*"))
        seen["loose"] += len(loose)
        for path in loose:
            path.unlink()
        seen["differ"] += files_of(cache) != whole
    exits = ", ".join(f"{count} {name}" for name, count in sorted(seen.items()) if name.startswith("exit"))
    bad = f"{seen['other']} unexpected exits, {seen['lost']} lost a finished unit, {seen['differ']} folders differ"
    return f"{exits}; {bad}; {seen['loose']} temporary files of dying writers left for gc"


def main() -> None:
    """The driver."""
    import ray_stages

    name, cache, source = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    setattr(SLOW[name], NAMES[name], getattr(ray_stages, f"Slow{name.capitalize()}"))
    run_app("driver", lambda **_options: work(name, cache, source, Workers(count=2)))


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored by what runs in the background
    main()

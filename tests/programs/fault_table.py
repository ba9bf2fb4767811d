"""The full fault table: `python tests/programs/fault_table.py [--seed N] [--rows kills,cuts,...]`; prints Markdown.

Every row runs a writer of five units in a forked copy of this process (or on a tmpfs) and compares the folder, byte
for byte, with an undisturbed run. A row whose machine cannot do it says so and counts as not run.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

if __name__ == "__main__":
    sys.path[:0] = [str(folder) for folder in (Path(__file__).parents[2], *Path(__file__).parents[1].iterdir())]

import faulty_disk
import nasty_run
import ray_kills
import real_stages
from damages import cuts, flips
from fake_stage import SCHEMA, UNITS, FakeStage, build_all, opened
from small_cache import copied, files_of
from xkd_pipeline.tables.build import Built, build
from xkd_pipeline.tables.shard import write_shard
from xkd_pipeline.tables.writer import locked
from xkd_pipeline.workers.contract import AS_PLANNED, Make, Workers
from xkd_schemas.cache.manifest import Commit, MadeDifferently
from xkd_schemas.errors import BadData, Busy, DiskFailed

STEP = 64 * 1024


def finished_file(root: Path) -> Path:
    return root.with_suffix(".finished")


def work(root: Path) -> Built:
    note = finished_file(root)
    with locked(root):
        return build_all(root, watch=lambda commits: note.write_text(str(len(commits))) and None)


def forked(job: Callable[[], object]) -> int:
    """Wait status of a copy of this process that does `job` and exits with its code."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = int(bool(job())) and 75
        finally:
            os._exit(code)
    return os.waitpid(child, 0)[1]


def disturbed(folder: Path, action: str, rounds: int, chance: random.Random, *, synced: bool = True) -> str:
    """`rounds` deaths at drawn operations, each of them followed by a run to the end."""
    with faulty_disk.injected("*:0:count") as fault:
        work(folder / "undisturbed")
    whole = files_of(folder / "undisturbed")
    lost = differing = 0
    for number in range(rounds):
        root = folder / f"{action}{number}"
        text = f"*:{chance.randint(1, fault.seen)}:{action}"
        seed = str(chance.randrange(2**30)) if action == "cut" and number % 2 else ""

        def job(root: Path = root, text: str = text, seed: str = seed) -> int:
            with faulty_disk.injected(text, seed, synced=synced):
                work(root)
            return 0

        assert os.WIFSIGNALED(forked(job)), f"{text} killed nothing"
        known = int(finished_file(root).read_text()) if finished_file(root).exists() else 0
        try:
            lost += work(root).kept < known
        except BadData:
            lost += 1
        differing += files_of(root) != whole
    return f"{lost} lost a finished unit, {differing} folders differ"


@dataclass(frozen=True, kw_only=True)
class BigStage(FakeStage):
    """Units of 96 KiB, so that a small disk fills up at different places."""

    def load(self) -> Make:
        return self.make

    def make(self, unit: int, _care: MadeDifferently = AS_PLANNED) -> Commit:
        columns = {"doc_id": [f"u{unit}"], "values": [np.arange(24 * 1024, dtype=np.float32) + unit]}
        return write_shard(self.folder, unit, SCHEMA, columns)


def big(root: Path) -> None:
    with locked(root):
        store = opened(root)
        build(store, BigStage(folder=store.folder), lambda missing: iter(missing), Workers())


def disk_full(folder: Path, _rounds: int, _chance: random.Random) -> str:
    """A tmpfs of every size from 64 KiB on until the run fits, then the same folder with room."""
    big(folder / "undisturbed")
    whole, point = files_of(folder / "undisturbed"), folder / "disk"
    point.mkdir()
    refused = differing = size = 0
    for size in range(STEP, 64 * STEP, STEP):
        made = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", point], capture_output=True)
        if made.returncode:
            return "not run: no tmpfs can be mounted here"
        try:
            fits = True
            try:
                big(point / "cache")
            except DiskFailed:
                fits, refused = False, refused + 1
            subprocess.run(["mount", "-o", f"remount,size={64 * STEP}", point], check=True)
            big(point / "cache")
            differing += files_of(point / "cache") != whole
        finally:
            subprocess.run(["umount", point], check=True)
        if fits:
            break
    return f"{size // STEP} sizes, {refused} refused with exit 74, {differing} folders differ after room was made"


def races(folder: Path, rounds: int, _chance: random.Random) -> str:
    """Two writers at once; the winner is killed while it holds the lock, and the next writer must get it."""
    winners: dict[int, int] = {}
    for number in range(rounds):
        root = folder / f"race{number}"
        children = []
        for _ in range(2):
            child = os.fork()
            if child == 0:
                try:
                    with locked(root):
                        time.sleep(600)
                except Busy:
                    os._exit(75)
                os._exit(1)
            children.append(child)
        first, status = os.wait()
        assert os.WEXITSTATUS(status) == 75
        (winner,) = (child for child in children if child != first)
        os.kill(winner, signal.SIGKILL)
        os.waitpid(winner, 0)
        with locked(root):
            winners[1] = winners.get(1, 0) + 1
    return f"{winners.get(1, 0)} with one winner and exit 75 for the other, lock free after its holder's death"


def shown(found: Counter[str]) -> str:
    return ", ".join(f"{number} {name}" for name, number in found.items())


def real_kills(folder: Path, rounds: int, chance: random.Random) -> str:
    real_stages.warm()
    return shown(real_stages.kills(folder, rounds, chance))


def cuts_of_stages(folder: Path, rounds: int, chance: random.Random, *, synced: bool = True) -> Counter[str]:
    real_stages.warm()
    return real_stages.cuts(folder, rounds, chance, synced=synced)


def nasty(folder: Path, rounds: int, chance: random.Random) -> str:
    return shown(nasty_run.through(folder, rounds, chance.randrange(2**30)))


def table(seed: int) -> dict[str, tuple[int, str, Callable[[Path, int, random.Random], str]]]:
    """Row -> (full number, what is done, how)."""

    def all_flips(folder: Path, rounds: int, _chance: random.Random) -> str:
        return str(flips(copied(folder), rounds, seed))

    def all_cuts(folder: Path, rounds: int, _chance: random.Random) -> str:
        return str(cuts(copied(folder), rounds))

    return {
        "kills": (200, "SIGKILL at a drawn operation", lambda f, n, c: disturbed(f, "kill", n, c)),
        "cuts": (40, "power cut at a drawn operation", lambda f, n, c: disturbed(f, "cut", n, c)),
        "control": (
            40,
            "the same with fsync stubbed out; must lose",
            lambda f, n, c: disturbed(f, "cut", n, c, synced=False),
        ),
        "full": (64, "disk full at every 64 KiB", disk_full),
        "races": (50, "two writers at once", races),
        "truncate": (512, "every file cut at every N bytes", all_cuts),
        "ray": (24, "SIGKILL of a worker, the driver, the raylet or the GCS of a run on Ray", ray_kills.disturbed),
        "flips": (10_000, "single bits flipped in all files of a cache", all_flips),
        "real-kills": (200, "SIGKILL of documents, teacher and align, by timer and at a drawn operation", real_kills),
        "real-cuts": (40, "power cut in documents, teacher and align", lambda f, n, c: shown(cuts_of_stages(f, n, c))),
        "real-control": (
            40,
            "the same with fsync stubbed out; must lose",
            lambda f, n, c: shown(cuts_of_stages(f, n, c, synced=False)),
        ),
        "nasty": (10_000, "nasty rows through documents, teacher, align twice, verify and report", nasty),
    }


def main() -> None:
    """Run the rows asked for and print them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=20261124)
    parser.add_argument("--rows", default="", help="comma-separated; all by default")
    parser.add_argument("--share", type=float, default=1.0, help="part of the full numbers")
    given = parser.parse_args()
    sys.stdout.write(f"seed {given.seed}, {UNITS} units\n\n| fault | times | result | seconds |\n|---|---|---|---|\n")
    for name, (full, what, how) in table(given.seed).items():
        if given.rows and name not in given.rows.split(","):
            continue
        rounds = full if name in ("truncate", "full") else max(1, round(given.share * full))
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            said = how(Path(folder), rounds, random.Random(given.seed))
        sys.stdout.write(f"| {what} | {rounds} | {said} | {time.monotonic() - start:.0f} |\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()

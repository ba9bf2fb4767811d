"""Ray started for one run: nobody else can reach it, and it, the driver or a signal may end it at any time."""

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

import fake_stage
from damages import SEED
from fake_stage import SECONDS, UNITS, Telling, build_all, read_told, search_path
from small_cache import files_of
from xkd_pipeline.workers.contract import Workers
from xkd_schemas.errors import Refused

pytestmark = [
    pytest.mark.ray,
    pytest.mark.filterwarnings("default::ResourceWarning", "default::pytest.PytestUnraisableExceptionWarning"),
]
DRIVER = """
import sys
from pathlib import Path
from fake_stage import run
from xkd_pipeline.workers.contract import Workers
from xkd_schemas.console import run as run_app
run_app("driver", lambda **_options: run(Path(sys.argv[1]), Workers(count=1), troubles={0: "slow"}))
"""
EXITS = {"worker": {0}, "driver": {-signal.SIGKILL}, "raylet": {0, 1, 69}, "gcs_server": {0, 1, 69}}
"""What is running goes on for a while without them, and may be all there is; 1 is Ray's own."""


def test_a_run_of_its_own_makes_the_same_bytes_and_is_closed_to_others_and_to_modules_of_its_folder_and_leaves_nothing(
    tmp_path: Path, monkeypatch, capfd
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("PYTHONPATH", search_path())
    build_all(tmp_path / "undisturbed")
    heard, niceness, asked, handler, seen = set(), set(), set(), signal.getsignal(signal.SIGTERM), []
    other = {"user": 65534, "group": 65534, "extra_groups": []} if os.getuid() == 0 else {}

    def look(_commits: object) -> None:
        for process in psutil.Process().children(recursive=True):
            niceness.add(process.nice())
            if process.name() in ("raylet", "gcs_server"):
                asked.add((process.environ().get("RAY_AUTH_MODE"), len(process.environ().get("RAY_AUTH_TOKEN", ""))))
            heard.update(c.laddr.ip.removeprefix("::ffff:") for c in process.net_connections() if c.status == "LISTEN")
        for folder in {*Path(short).iterdir()} - {killed}:
            assert folder.stat().st_mode & 0o077 == 0
            assert list((folder / "ray").glob("session_2*/sockets/raylet"))
            for place in (folder, folder / "ray", folder / "ray/session_latest/sockets/raylet") if other else ():
                ended = subprocess.run(["ls", str(place)], capture_output=True, text=True, check=False, **other)
                seen.append(f"{ended.returncode} {ended.stderr}")

    here = tmp_path / "here"
    here.mkdir()
    for name in ("random", "json", "colorsys", "torch", "sitecustomize"):
        (here / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'a').write({name!r})")
    monkeypatch.chdir(here)
    with tempfile.TemporaryDirectory(prefix="x", dir="/tmp") as short:
        Path(short).chmod(0o755)  # as /tmp itself: others may look there
        killed = Path(short) / "xkd-ray-1-left"  # a driver's
        (killed / "session").mkdir(parents=True)
        with monkeypatch.context() as patch:
            patch.setattr(tempfile, "tempdir", short)
            built = build_all(Path("t"), Workers(count=1), kind=Telling, watch=look)
        left = list(Path(short).iterdir())

    assert (built.made, built.kept) == (UNITS, 0)
    assert files_of(here / "t") == files_of(tmp_path / "undisturbed")
    assert heard == {"127.0.0.1"}
    assert asked == {("token", 64)}
    assert niceness == {psutil.Process().nice()}
    assert bool(seen) == bool(other)
    assert all(line.startswith("2 ") and "Permission denied" in line for line in seen)
    assert signal.getsignal(signal.SIGTERM) is handler
    assert [p.name() for p in psutil.Process().children(recursive=True) if "ray" in p.name()] == []
    assert capfd.readouterr().out == ""
    assert left == []
    assert not (tmp_path / "ran").exists()
    (told,) = read_told(here)
    paths = {Path(entry) for entry in told["path"]}
    assert {path for path in paths if "ray" not in path.parts and path.name != "empty"} <= {
        *map(Path, sys.path),
        Path(fake_stage.__file__).parent,
    }


@pytest.fixture
def driver(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A command of its own that makes the table in `cache` on Ray, each shard slowly, and is at work on one."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    with (tmp_path / "said").open("wb") as said:  # a file, as Ray's agents would hold on to a pipe
        process = subprocess.Popen(
            [sys.executable, "-c", DRIVER, tmp_path / "cache"], env=environment | {"PYTHONPATH": search_path()},
            stdout=subprocess.DEVNULL, stderr=said, start_new_session=True,
        )  # fmt: skip
    family: list[psutil.Process] = []
    try:
        plan, end = tmp_path / "cache/documents/plan.json", time.monotonic() + 180
        while not (plan.exists() and any(plan.parent.glob(".tmp-*"))):  # a file of a shard, not of the plan
            assert process.poll() is None, (tmp_path / "said").read_text()[-500:]
            assert time.monotonic() < end
            time.sleep(0.01)
        family = psutil.Process(process.pid).children(recursive=True)
        yield process
    finally:
        for one in [*family, process]:
            with suppress(psutil.NoSuchProcess):
                one.kill()
        psutil.wait_procs(family, timeout=10)
        process.wait()


def find_family(process: subprocess.Popen[bytes], name: str) -> list[psutil.Process]:
    """Processes below one: a worker's title changes with what it does."""
    found = []
    for one in psutil.Process(process.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            found += [one] if one.name().startswith(name) else []
    return found


def assert_same_bytes(tmp_path: Path) -> None:
    for path in (tmp_path / "cache").rglob(".tmp-*"):
        path.unlink()
    build_all(tmp_path / "undisturbed")
    assert files_of(tmp_path / "cache") == files_of(tmp_path / "undisturbed")


@pytest.mark.parametrize(
    "target", [pytest.param(name, marks=[] if name == "raylet" else pytest.mark.slow) for name in EXITS]
)
def test_what_a_run_consists_of_is_killed_and_the_same_command_goes_on(
    tmp_path: Path, driver: subprocess.Popen[bytes], target: str
) -> None:
    cache = tmp_path / "cache"
    time.sleep(random.Random(SEED).uniform(0.0, SECONDS))
    if target == "driver":
        driver.kill()
        driver.wait(timeout=30)
        fake_stage.run(cache)  # at once, while its worker is still writing
    else:
        for victim in find_family(driver, "ray::_Actor" if target == "worker" else target):
            victim.kill()

    status, said = driver.wait(timeout=180), (tmp_path / "said").read_text(errors="replace")

    assert status in EXITS[target]
    if status == 69:
        assert "the Ray cluster is gone" in said
        assert "Kept: every committed shard. Next: run the same command again to go on" in said
    assert "Traceback" not in said
    committed = len(list((cache / "documents/commits").glob("0*.json")))
    assert fake_stage.run(cache).kept >= committed
    assert_same_bytes(tmp_path)


def test_a_signal_ends_the_run_within_seconds_and_leaves_no_process(
    tmp_path: Path, driver: subprocess.Popen[bytes]
) -> None:
    family = find_family(driver, "ray")

    driver.send_signal(signal.SIGTERM)

    assert driver.wait(timeout=60) == 143
    said = [line for line in (tmp_path / "said").read_text().splitlines() if " elapsed" not in line]
    assert len(said) == 1, said
    assert family
    assert not any(one.is_running() for one in family)
    fake_stage.run(tmp_path / "cache")
    assert_same_bytes(tmp_path)


def test_a_cluster_without_authentication_is_not_started(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")

    with pytest.raises(Refused, match="RAY_AUTH_MODE is disabled: any process of this machine could run code as you"):
        build_all(tmp_path, Workers(count=1))

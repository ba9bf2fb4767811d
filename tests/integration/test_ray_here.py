"""Ray started for one run: nobody else can reach it, and it, the driver or a signal may end it at any time."""

import colorsys
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest

import fake_stage
import small_cache
from damages import SEED
from fake_stage import UNITS, Importing, build_all, search_path
from ray_kills import EXITS, PARTS, children, killed_once, named, said_of, started, until_made, work
from small_cache import IN_PROCESS, files_of
from xkd_pipeline.workers.contract import Workers
from xkd_schemas.errors import Refused

pytestmark = [
    pytest.mark.ray,
    pytest.mark.filterwarnings("default::ResourceWarning", "default::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture
def for_workers(monkeypatch) -> None:
    """No cluster from outside, and the stages of the tests where workers find them."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("PYTHONPATH", search_path())


def test_a_run_of_its_own_makes_the_same_bytes_is_closed_to_others_and_leaves_nothing(
    tmp_path: Path, monkeypatch, for_workers, capfd
) -> None:
    build_all(tmp_path / "undisturbed")
    heard, niceness, asked, handler, seen = set(), set(), set(), signal.getsignal(signal.SIGTERM), []
    other = {"user": 65534, "group": 65534, "extra_groups": []} if os.getuid() == 0 else {}

    def look(_commits: object) -> None:
        for process in psutil.Process().children(recursive=True):
            niceness.add(process.nice())
            if process.name() in ("raylet", "gcs_server"):
                asked.add((process.environ().get("RAY_AUTH_MODE"), len(process.environ().get("RAY_AUTH_TOKEN", ""))))
            heard.update(c.laddr.ip.removeprefix("::ffff:") for c in process.net_connections() if c.status == "LISTEN")
        for folder in Path(short).iterdir():
            assert folder.stat().st_mode & 0o077 == 0
            assert list((folder / "ray").glob("session_2*/sockets/raylet"))
            for place in (folder, folder / "ray", folder / "ray/session_latest/sockets/raylet") if other else ():
                ended = subprocess.run(["ls", str(place)], capture_output=True, text=True, check=False, **other)
                seen.append(f"{ended.returncode} {ended.stderr}")

    with tempfile.TemporaryDirectory(prefix="x", dir="/tmp") as short:
        Path(short).chmod(0o755)  # as /tmp itself: others may look there
        with monkeypatch.context() as patch:
            patch.setattr(tempfile, "tempdir", short)
            built = build_all(tmp_path / "t", Workers(count=1), watch=look)

    assert (built.made, built.kept) == (UNITS, 0)
    assert files_of(tmp_path / "t") == files_of(tmp_path / "undisturbed")
    assert heard == {"127.0.0.1"}
    assert asked == {("token", 64)}
    assert niceness == {psutil.Process().nice()}
    assert bool(seen) == bool(other)
    assert all(line.startswith("2 ") and "Permission denied" in line for line in seen)
    assert signal.getsignal(signal.SIGTERM) is handler
    assert [p.name() for p in psutil.Process().children(recursive=True) if "ray" in p.name()] == []
    assert capfd.readouterr().out == ""


def prepared(tmp_path: Path, stage: str) -> tuple[Path, dict[str, bytes]]:
    """A cache without what the stage makes, and the files of an undisturbed run."""
    if stage == "fake":
        build_all(tmp_path / "undisturbed")
        return tmp_path / "cache", files_of(tmp_path / "undisturbed")
    cache = small_cache.copied(tmp_path)
    undisturbed = files_of(cache)
    shutil.rmtree(cache / PARTS[stage])
    return cache, undisturbed


@pytest.mark.parametrize(
    ("stage", "target"),
    [
        pytest.param(s, t, marks=[] if s == "fake" and t in ("driver", "raylet") else pytest.mark.slow)
        for s in PARTS for t in EXITS
    ],
)  # fmt: skip
def test_what_a_run_consists_of_is_killed_and_the_same_command_goes_on(
    tmp_path: Path, stage: str, target: str
) -> None:
    cache, undisturbed = prepared(tmp_path, stage)

    status, said = killed_once(cache, small_cache.made(), stage, target, random.Random(SEED))

    assert status in EXITS[target]
    if status == 69:
        assert "the Ray cluster is gone" in said
        assert "Kept: every committed shard. Next: run the same command again to go on" in said
    assert "Traceback" not in said
    committed = len(list((cache / PARTS[stage]).rglob("commits/0*.json")))
    assert work(stage, cache, small_cache.made(), IN_PROCESS) >= committed
    for path in cache.rglob(".tmp-*"):
        path.unlink()
    assert files_of(cache) == undisturbed


def test_a_signal_ends_the_run_within_seconds_and_leaves_no_process(tmp_path: Path) -> None:
    cache, undisturbed = prepared(tmp_path, "fake")
    driver = started("fake", cache, tmp_path)
    until_made(cache, PARTS["fake"], driver)
    family = children(driver)

    driver.send_signal(signal.SIGTERM)

    assert driver.wait(timeout=60) == 143
    said = [line for line in said_of(cache).read_text().splitlines() if " elapsed" not in line]
    assert len(said) == 1, said
    assert named(family, "ray") == []
    work("fake", cache, tmp_path, IN_PROCESS)
    assert files_of(cache) == undisturbed


def test_workers_take_no_file_of_the_current_folder_for_a_module_and_folders_of_killed_drivers_go(
    tmp_path: Path, monkeypatch, for_workers
) -> None:
    here, told = tmp_path / "here", set()
    here.mkdir()
    for name in ("random", "json", "colorsys", "torch", "sitecustomize"):
        (here / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'a').write({name!r})")
    monkeypatch.chdir(here)
    monkeypatch.setattr(fake_stage, "FakeStage", Importing)
    with tempfile.TemporaryDirectory(prefix="x", dir="/tmp") as short:
        monkeypatch.setattr(tempfile, "tempdir", short)
        (Path(short) / "xkd-ray-1-left" / "session").mkdir(parents=True)
        build_all(Path("t"), Workers(count=1), watch=lambda commits: told.update(*(c.counts for c in commits)))
        left = list(Path(short).iterdir())

    assert left == []
    assert not (tmp_path / "ran").exists()
    assert f"module {colorsys.__file__}" in told
    paths = {Path(entry.removeprefix("path ")) for entry in told if entry.startswith("path ")}
    theirs = {path for path in paths if "ray" not in path.parts and path.name != "empty"}
    assert theirs <= {*map(Path, sys.path), Path(fake_stage.__file__).parent}


def test_a_cluster_without_authentication_is_not_started(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")

    with pytest.raises(Refused, match="RAY_AUTH_MODE is disabled: any process of this machine could run code as you"):
        build_all(tmp_path, Workers(count=1))

"""Shards in this process, and what a worker elsewhere refuses to go on without."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

import small_cache
from fake_stage import FakeStage
from xkd_pipeline import align, documents, stages, teacher
from xkd_pipeline.cli import app as cli
from xkd_pipeline.stages import Outcome
from xkd_pipeline.workers import ray_pool
from xkd_pipeline.workers.contract import Workers
from xkd_pipeline.workers.ray_pool import Place, versions
from xkd_pipeline.workers.scheduler import make_shards
from xkd_schemas.errors import InputMissing, Mismatch, Refused, WorkersGone

DEMO = Path(__file__).parents[3] / "runs" / "demo.toml"


def test_in_process_each_shard_is_handed_over_before_the_next_job_is_asked_for(tmp_path: Path) -> None:
    log: list[str] = []

    def jobs() -> Iterator[int]:
        for unit in (3, 0, 1):
            log.append(f"job {unit}")
            yield unit

    make_shards(FakeStage(folder=tmp_path), jobs(), Workers(), lambda commit: log.append(f"done {commit.unit}"))

    assert log == ["job 3", "done 3", "job 0", "done 0", "job 1", "done 1"]


def test_a_cluster_in_the_environment_is_not_joined_unless_asked_for(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")

    with pytest.raises(Refused, match=r"RAY_ADDRESS is set to 10\.0\.0\.1:6379.*Next: pass --ray-address, or unset"):
        make_shards(FakeStage(folder=tmp_path), [0], Workers(count=1), lambda _commit: None)

    assert list(tmp_path.iterdir()) == []


def test_ray_that_does_not_start_is_one_line(tmp_path: Path, monkeypatch) -> None:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_worker_niceness", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"):
        monkeypatch.setenv(name, "token" if name == "RAY_AUTH_MODE" else "0")  # what the run sets ends with the test
    monkeypatch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    import ray

    def init(**_settings: object) -> None:
        raise RuntimeError("Timed out waiting for file gcs_server_port")

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(WorkersGone, match="Ray did not start on this machine: Timed out waiting for file"):
        make_shards(FakeStage(folder=tmp_path), [0], Workers(count=1), lambda _commit: None)


def test_what_flags_say_of_workers_reaches_the_stages(monkeypatch) -> None:
    told: dict[str, Workers] = {}

    def stage(name: str):
        def work(_run: object, workers: Workers, *_more: object, **_others: object) -> Outcome:
            told[name] = workers
            return Outcome(line=name, values={})

        return work

    for name in ("documents", "teacher", "align"):
        monkeypatch.setattr(stages, f"{name}_stage", stage(name))
    flags = ["--workers", "2", "--gpus-per-worker", "0.5", "--ray-address", "head:6379", "--stall-timeout", "9"]
    whole = Workers(count=2, gpus=0.5, address="head:6379", stall_seconds=9.0)

    assert CliRunner().invoke(cli.app, ["teacher", "cache", "--model", "m", *flags]).exit_code == 0
    assert told == {"teacher": whole}
    assert CliRunner().invoke(cli.app, ["preprocess", str(DEMO), *flags]).exit_code == 0
    assert told == dict.fromkeys(("documents", "teacher", "align"), whole)


def test_what_a_run_file_says_of_workers_reaches_every_stage_and_gpus_only_the_teacher(monkeypatch) -> None:
    asked = {"workers": 2, "gpus_per_worker": 0.5, "ray_address": "head:6379", "stall_timeout": 9.0}
    run = small_cache.whole_run(small_cache.made() / "cache").model_copy(update=asked)
    told: dict[str, Workers] = {}

    def maker(name: str):
        def make(*given: object) -> None:
            told[name] = next(one for one in given if isinstance(one, Workers))
            raise WorkersGone("told")

        return make

    for name in ("documents", "teacher", "students"):
        monkeypatch.setattr(stages, f"make_{name}", maker(name))
    for stage in (documents, teacher, align):
        with pytest.raises(WorkersGone, match="told"):
            stage(run)

    whole = Workers(count=2, gpus=0.5, address="head:6379", stall_seconds=9.0)
    assert told == {"documents": replace(whole, gpus=0.0), "teacher": whole, "students": replace(whole, gpus=0.0)}


def here(folder: Path, **changes: object) -> Place:
    (folder / "mark").touch()
    values = {"paths": (folder,), "mark": folder / "mark", "versions": versions()}
    return Place(**{**values, **changes})


def test_the_same_machine_has_all_of_it_and_a_package_that_is_not_there_is_not_asked_for(tmp_path: Path) -> None:
    here(tmp_path).check()
    here(tmp_path, versions={name: version for name, version in versions().items() if name != "spacy"}).check()
    assert {"numpy", "torch", "transformers"} <= set(versions())


@pytest.mark.parametrize(
    ("lacking", "kind", "said"),
    [
        ("paths", InputMissing, "worker on node-7: .*/model is not there. Next: put it on storage that all"),
        ("mark", InputMissing, "is another folder there"),
        ("versions", Mismatch, r"has torch .*, this process 1\.0\. Kept: every .* Next: install torch 1\.0 on"),
    ],
)
def test_what_a_machine_lacks_is_named(tmp_path: Path, monkeypatch, lacking: str, kind: type, said: str) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "node-7")
    monkeypatch.setattr(ray_pool, "LOOK_SECONDS", 0.0)
    paths = (tmp_path, tmp_path / "model")
    other = {"paths": paths, "mark": tmp_path / "other", "versions": versions() | {"torch": "1.0"}}
    with pytest.raises(kind, match=said):
        here(tmp_path, **{lacking: other[lacking]}).check()

"""Units on Ray: the same bytes as in this process, through kills and errors, on a cluster of three nodes.

The nodes are started here and joined by their address; test_ray_here.py has what is started for one run.
"""

import gc
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import small_cache
from fake_stage import UNITS, FakeStage, Telling, build_all, read_told, search_path
from small_cache import files_of
from xkd_pipeline.stages import align_stage, documents_stage, teacher_stage
from xkd_pipeline.tables.writer import Store
from xkd_pipeline.workers import ray_pool, scheduler
from xkd_pipeline.workers.contract import Make, Stage, Workers
from xkd_pipeline.workers.scheduler import make_shards
from xkd_schemas.cache.manifest import Commit, MadeDifferently
from xkd_schemas.errors import BadData, Mismatch, UsageError, WorkersGone

pytestmark = [
    pytest.mark.ray,
    # Ray leaves the processes it started, and its sockets, to the garbage collector.
    pytest.mark.filterwarnings("default::ResourceWarning", "default::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head and two nodes with one CPU each; the last has two GPUs, if Ray may be believed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.setenv("PYTHONPATH", search_path())
        settings = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_worker_niceness": "0"}
        settings["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # keeps it on loopback
        settings["RAY_prestart_worker_first_driver"] = "0"  # workers that would never get our code
        os.environ.setdefault("RAY_AUTH_TOKEN", settings["RAY_AUTH_TOKEN"])  # Ray reads it once in a process
        for name, value in settings.items():
            patch.setenv(name, os.environ.get(name, value))
        from ray.cluster_utils import Cluster

        node = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
        quiet = {"include_dashboard": False, "include_log_monitor": False, "no_monitor": True}
        made = Cluster(initialize_head=True, head_node_args=node | quiet | {"num_cpus": 0})
        made.add_node(**node, wait=False)
        made.add_node(**node, num_gpus=2, wait=False)
        made.wait_for_nodes()
        yield made
        made.shutdown()
        gc.collect()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    root = tmp_path_factory.mktemp("undisturbed")
    build_all(root)
    return files_of(root)


TROUBLES = {0: "memory", 1: "poison", 2: "stop", 4: "error"}


@pytest.fixture(scope="module")
def troubled(cluster: Any, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """One worker with a GPU after the other makes units until an error; this process goes on from there."""
    root = tmp_path_factory.mktemp("troubled") / "t"
    workers = Workers(address=cluster.address, count=1, gpus=1.0, stall_seconds=8.0)
    with pytest.raises(BadData) as caught:
        build_all(root, workers, troubles=TROUBLES, kind=Telling)
    return SimpleNamespace(error=caught.value, told=read_told(root.parent), built=build_all(root), root=root)


def test_workers_that_are_killed_stopped_or_out_of_memory_cost_one_row_and_no_other_byte(
    troubled: SimpleNamespace, undisturbed: dict[str, bytes]
) -> None:
    commits = troubled.built.manifest.commits

    assert (troubled.root.parent / "stopped").exists()
    assert (troubled.built.made, troubled.built.kept) == (1, UNITS - 1)
    assert [c.care for c in commits] == [MadeDifferently(batch=2), MadeDifferently(lost=(1,)), None, None, None]
    assert (commits[1].rows, commits[1].rejects.reasons) == (1, {"worker_killed": 1})
    changed = {name for name, content in files_of(troubled.root).items() if undisturbed.get(name) != content}
    assert changed == {
        "README.md", "SHA256SUMS", "documents/manifest.json", "documents/commits/00000.json",
        "documents/commits/00001.json", f"documents/{commits[1].file}", f"documents/rejects/{commits[1].rejects.file}",
    }  # fmt: skip


def test_an_error_a_stage_raises_arrives_as_itself(troubled: SimpleNamespace) -> None:
    assert type(troubled.error) is BadData
    assert str(troubled.error) == "unit 4 is broken. Kept: k. Next: mend it"


def test_each_worker_gets_its_gpu_and_runs_the_code_that_was_shipped(troubled: SimpleNamespace) -> None:
    assert len(troubled.told) >= 8  # the first, six after a kill by row 1, one after the stop
    assert {one["gpu"] for one in troubled.told} <= {"0", "1"}
    assert all("runtime_resources" in one["code"] for one in troubled.told)


def test_a_worker_with_another_version_of_a_package_is_refused_in_one_line(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_pool, "versions", lambda: {"numpy": "1.0"})

    with pytest.raises(Mismatch, match=r"worker on .* has numpy .*, this process 1\.0\. Kept: .* install numpy 1\.0"):
        build_all(tmp_path / "t", Workers(address=cluster.address, count=1))


def test_more_gpus_than_any_node_has_are_refused_at_once(cluster: Any, tmp_path: Path) -> None:
    workers = Workers(count=1, gpus=3.0, address=cluster.address)

    with pytest.raises(UsageError, match="no machine has room for a worker of 1 CPU and 3 GPUs"):
        make_shards(FakeStage(folder=tmp_path), [0], workers, lambda _commit: None)


@pytest.mark.parametrize(
    ("address", "kind", "sentence"),
    [
        ("ray://127.0.0.1:10001", UsageError, "not the address of a cluster. Next: give HOST:PORT"),
        ("127.0.0.1:9", WorkersGone, "no Ray cluster at 127.0.0.1:9"),
    ],
)
def test_an_address_without_a_cluster_is_one_line(tmp_path: Path, address: str, kind: type, sentence: str) -> None:
    with pytest.raises(kind, match=sentence):
        make_shards(FakeStage(folder=tmp_path), [0], Workers(count=1, address=address), lambda _commit: None)


STAGES = {"documents": documents_stage, "teachers": teacher_stage, "students": align_stage}


@pytest.mark.parametrize("table", ["students", pytest.param("teachers", marks=pytest.mark.slow)])
def test_a_stage_makes_the_same_table_on_a_cluster_as_in_process(cluster: Any, tmp_path: Path, table: str) -> None:
    cache = small_cache.copied(tmp_path)
    shutil.rmtree(cache / table)

    done = STAGES[table](small_cache.whole_run(cache), Workers(count=1, address=cluster.address))

    assert done.values["made"] == 3
    assert files_of(cache) == files_of(small_cache.made() / "cache")


def test_every_stage_can_be_sent_and_names_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray import cloudpickle

    cache, load, sent = small_cache.copied(tmp_path), scheduler._load, []

    def load_copy(stage: Stage) -> Make:
        copy = cloudpickle.loads(cloudpickle.dumps(stage))
        sent.append([path.name for path in copy.paths()])
        return load(copy)

    monkeypatch.setattr(scheduler, "_load", load_copy)
    for table, stage in STAGES.items():
        shutil.rmtree(cache / table)
        stage(small_cache.whole_run(cache), Workers())

    assert sent == [["documents"], ["T", "documents", "teacher"], ["S", "documents", "T", "student"]]
    assert files_of(cache) == files_of(small_cache.made() / "cache")


def test_a_node_that_goes_in_the_middle_costs_time_and_no_byte(
    cluster: Any, tmp_path: Path, undisturbed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    commit, gone = Store.commit, []

    def committed(store: Store, record: Commit) -> None:
        commit(store, record)
        if not gone:
            gone.append(cluster.list_all_nodes()[1])
            cluster.remove_node(gone[0], allow_graceful=False)

    monkeypatch.setattr(Store, "commit", committed)

    build_all(tmp_path / "t", Workers(count=2, address=cluster.address), troubles={0: "slow"})

    assert len(gone) == 1
    assert files_of(tmp_path / "t") == undisturbed

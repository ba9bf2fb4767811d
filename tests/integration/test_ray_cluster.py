"""A cluster of three nodes on this machine, joined by its address: the real stages, GPUs, and a node that goes."""

import gc
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import fake_stage
import small_cache
from ray_stages import SlowAlign, Telling
from small_cache import files_of
from xkd_pipeline.run import Workers, run_units
from xkd_pipeline.stages import align_stage, documents_stage, teacher_stage
from xkd_pipeline.store import Store
from xkd_schemas.errors import Refused, UsageError, WorkersGone
from xkd_schemas.manifest import Commit

pytestmark = [
    pytest.mark.ray,
    pytest.mark.filterwarnings("default::ResourceWarning", "default::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head and two nodes with one CPU each; the last has two GPUs, if Ray may be believed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        paths = (str(Path(fake_stage.__file__).parent), os.environ.get("PYTHONPATH"))
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
        settings = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_worker_niceness": "0"}
        settings["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # keeps it on loopback
        for name, value in settings.items():
            patch.setenv(name, os.environ.get(name, value))
        from ray.cluster_utils import Cluster

        node = {"num_cpus": 1, "object_store_memory": 80 * 2**20, "include_dashboard": False}
        made = Cluster(initialize_head=True, head_node_args=node)
        del node["include_dashboard"]
        made.add_node(**node, wait=False)
        made.add_node(**node | {"num_cpus": 2}, num_gpus=2, wait=False)
        made.wait_for_nodes()
        yield made
        made.shutdown()
        gc.collect()


def test_parser_and_teacher_make_the_same_cache_on_several_nodes_as_in_process(cluster: Any, tmp_path: Path) -> None:
    source = small_cache.made()
    run = small_cache.run_file(
        tmp_path / "cache",
        documents={"corpus": [str(source / "corpus.jsonl")]},
        teacher={"model": str(source / "teacher")},
        student={"tokenizer": str(source / "student")},
    )

    for stage in (documents_stage, teacher_stage):
        assert stage(run, Workers(count=2, address=cluster.address)).values["made"] == 3
    align_stage(run, small_cache.IN_PROCESS)

    assert files_of(tmp_path / "cache") == files_of(source / "cache")


def test_each_worker_gets_its_gpu_and_runs_the_code_that_was_shipped(cluster: Any, tmp_path: Path) -> None:
    done: list[Commit] = []

    run_units(Telling(folder=tmp_path), range(4), Workers(count=2, gpus=1.0, address=cluster.address), done.append)

    told = {name for commit in done for name in commit.counts}
    assert {name for name in told if name.startswith("gpu ")} == {"gpu 0", "gpu 1"}
    code = [name for name in told if name.startswith("code ")]
    assert code
    assert all("runtime_resources" in name for name in code)


def test_more_gpus_than_any_node_has_are_refused_at_once(cluster: Any, tmp_path: Path) -> None:
    workers = Workers(count=1, gpus=3.0, address=cluster.address)

    with pytest.raises(UsageError, match="no machine has room for a worker of 1 CPU and 3 GPUs"):
        run_units(Telling(folder=tmp_path), [0], workers, lambda _commit: None)


def test_a_node_that_goes_in_the_middle_costs_time_and_no_byte(cluster: Any, tmp_path: Path, monkeypatch) -> None:
    cache = small_cache.copied(tmp_path)
    shutil.rmtree(cache / "students")
    run = small_cache.run_file(cache, student={"tokenizer": str(small_cache.made() / "student")})
    commit, gone = Store.commit, []

    def committed(store: Store, record: Commit) -> None:
        commit(store, record)
        if not gone:
            gone.append(cluster.list_all_nodes()[1])
            cluster.remove_node(gone[0], allow_graceful=False)

    monkeypatch.setattr(Store, "commit", committed)
    monkeypatch.setattr("xkd_pipeline.align.AlignStage", SlowAlign)

    align_stage(run, Workers(count=3, address=cluster.address))

    assert len(gone) == 1
    assert files_of(cache) == files_of(small_cache.made() / "cache")


@pytest.mark.parametrize(
    ("address", "kind", "sentence"),
    [
        ("ray://127.0.0.1:10001", UsageError, "not the address of a cluster. Next: give HOST:PORT"),
        ("127.0.0.1:9", WorkersGone, "no Ray cluster at 127.0.0.1:9"),
    ],
)
def test_an_address_without_a_cluster_is_one_line(tmp_path: Path, address: str, kind: type, sentence: str) -> None:
    with pytest.raises(kind, match=sentence):
        run_units(Telling(folder=tmp_path), [0], Workers(count=1, address=address), lambda _commit: None)


def test_a_cluster_without_authentication_is_not_started(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")

    with pytest.raises(Refused, match="RAY_AUTH_MODE is disabled: any process of this machine could run code as you"):
        run_units(Telling(folder=tmp_path), [0], Workers(count=1), lambda _commit: None)

"""Units on Ray: the same bytes as in this process, through kills and errors, on a cluster of three nodes.

The nodes are started here and joined by their address; test_ray_here.py has what is started for one run.
"""

import gc
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import small_cache
from fake_stage import UNITS, FakeStage, Telling, build_all, search_path
from small_cache import files_of
from xkd_pipeline.stages import teacher_stage
from xkd_pipeline.tables.writer import Store
from xkd_pipeline.workers.contract import Workers
from xkd_pipeline.workers.scheduler import make_shards
from xkd_schemas.cache.manifest import Commit, MadeDifferently
from xkd_schemas.config import RunConfig
from xkd_schemas.errors import BadData, UsageError, WorkersGone
from xkd_trainer.sweep import sweep

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
        os.environ.setdefault("RAY_AUTH_TOKEN", settings["RAY_AUTH_TOKEN"])  # Ray reads it once in a process
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


@pytest.fixture
def undisturbed(tmp_path: Path) -> dict[str, bytes]:
    build_all(tmp_path / "undisturbed")
    return files_of(tmp_path / "undisturbed")


@pytest.mark.parametrize(("trouble", "how"), [("kill", {"count": 2}), ("stop", {"count": 1, "stall_seconds": 8.0})])
def test_a_worker_killed_or_stopped_in_a_shard_is_replaced_and_the_bytes_are_the_same(
    cluster: Any, tmp_path: Path, undisturbed: dict[str, bytes], trouble: str, how: dict[str, Any]
) -> None:
    built = build_all(tmp_path / "t", Workers(address=cluster.address, **how), trouble=trouble)

    assert built.made == UNITS
    assert (tmp_path / "killed").exists()
    assert files_of(tmp_path / "t") == undisturbed


def test_a_row_that_kills_its_worker_each_time_is_found_and_the_rest_is_kept(
    cluster: Any, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    built = build_all(tmp_path / "t", Workers(address=cluster.address, count=1), trouble="poison")

    commits = built.manifest.commits
    assert [c.care for c in commits] == [None, None, MadeDifferently(lost=(1,)), None, None]
    assert (commits[2].rows, commits[2].rejects.reasons) == (2, {"worker_killed": 1})
    changed = {name for name, content in files_of(tmp_path / "t").items() if undisturbed.get(name) != content}
    assert changed == {
        "README.md", "SHA256SUMS", "documents/manifest.json", "documents/commits/00002.json",
        f"documents/{commits[2].file}", f"documents/rejects/{commits[2].rejects.file}",
    }  # fmt: skip


def test_a_shard_out_of_memory_is_made_in_smaller_batches_by_the_worker_it_has(cluster: Any, tmp_path: Path) -> None:
    done: list[Commit] = []

    make_shards(
        FakeStage(folder=tmp_path, trouble="memory", at=1),
        [0, 1],
        Workers(address=cluster.address, count=1),
        done.append,
    )

    assert [(commit.unit, commit.care) for commit in done] == [(0, None), (1, MadeDifferently(batch=2))]


@pytest.mark.parametrize(("trouble", "sentence"), [("error", "unit 2 is broken"), ("load", "the parser is broken")])
def test_an_error_a_stage_raises_arrives_as_itself(cluster: Any, tmp_path: Path, trouble: str, sentence: str) -> None:
    with pytest.raises(BadData) as caught:
        build_all(tmp_path, Workers(address=cluster.address, count=1), trouble=trouble)

    assert type(caught.value) is BadData
    assert str(caught.value) == f"{sentence}. Kept: k. Next: mend it"


def test_the_teacher_makes_the_same_table_on_several_nodes_as_in_process(cluster: Any, tmp_path: Path) -> None:
    cache = small_cache.copied(tmp_path)
    shutil.rmtree(cache / "teachers")
    run = small_cache.run_file(cache, teacher={"model": str(small_cache.made() / "teacher")})

    assert teacher_stage(run, Workers(count=2, address=cluster.address)).values["made"] == 3

    assert files_of(cache) == files_of(small_cache.made() / "cache")


def test_each_worker_gets_its_gpu_and_runs_the_code_that_was_shipped(cluster: Any, tmp_path: Path) -> None:
    done: list[Commit] = []

    make_shards(Telling(folder=tmp_path), range(4), Workers(count=2, gpus=1.0, address=cluster.address), done.append)

    told = {name for commit in done for name in commit.counts}
    assert {name for name in told if name.startswith("gpu ")} == {"gpu 0", "gpu 1"}
    code = [name for name in told if name.startswith("code ")]
    assert code
    assert all("runtime_resources" in name for name in code)


def test_more_gpus_than_any_node_has_are_refused_at_once(cluster: Any, tmp_path: Path) -> None:
    workers = Workers(count=1, gpus=3.0, address=cluster.address)

    with pytest.raises(UsageError, match="no machine has room for a worker of 1 CPU and 3 GPUs"):
        make_shards(Telling(folder=tmp_path), [0], workers, lambda _commit: None)


@pytest.mark.parametrize(
    ("address", "kind", "sentence"),
    [
        ("ray://127.0.0.1:10001", UsageError, "not the address of a cluster. Next: give HOST:PORT"),
        ("127.0.0.1:9", WorkersGone, "no Ray cluster at 127.0.0.1:9"),
    ],
)
def test_an_address_without_a_cluster_is_one_line(tmp_path: Path, address: str, kind: type, sentence: str) -> None:
    with pytest.raises(kind, match=sentence):
        make_shards(Telling(folder=tmp_path), [0], Workers(count=1, address=address), lambda _commit: None)


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

    build_all(tmp_path / "t", Workers(count=3, address=cluster.address), trouble="slow")

    assert len(gone) == 1
    assert files_of(tmp_path / "t") == undisturbed


def test_a_sweep_trains_on_the_cluster(cluster: Any, tmp_path: Path) -> None:
    student = {"model": "new:llama,layers=1,width=8,heads=2", "tokenizer": str(small_cache.made() / "student")}
    train = {"out": str(tmp_path / "out"), "steps": 1, "batch_size": 4, "threads": 1}
    cache = str(small_cache.copied(tmp_path))
    values = {"cache": cache, "student": student, "train": train, "ray_address": cluster.address}

    found = sweep(RunConfig.model_validate(values), ["loss=ce"])

    assert [(row["run"], row["seeds"], row["failed"]) for row in found["rows"]] == [
        ("loss=ce (control of equal steps)", 1, 0)
    ]
    assert (tmp_path / "out/loss=ce/model.safetensors").is_file()

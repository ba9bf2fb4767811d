"""Units on Ray: the same bytes as in this process, through kills and errors."""

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

import fake_stage
from fake_stage import UNITS, FakeStage, build_all
from small_cache import files_of
from xkd_pipeline.run import Workers, run_units
from xkd_schemas.errors import BadData
from xkd_schemas.manifest import Care, Commit

pytestmark = [
    pytest.mark.ray,
    # Ray leaves the processes it started, and its sockets, to the garbage collector.
    pytest.mark.filterwarnings("default::ResourceWarning", "default::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(autouse=True)
def no_cluster_from_outside(monkeypatch) -> Iterator[None]:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    paths = (
        str(Path(fake_stage.__file__).parent),
        os.environ.get("PYTHONPATH"),
    )  # for the workers
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    yield
    gc.collect()  # what Ray left, before a test of another module is blamed for it


@pytest.fixture
def undisturbed(tmp_path: Path) -> dict[str, bytes]:
    build_all(tmp_path / "undisturbed")
    return files_of(tmp_path / "undisturbed")


def test_one_worker_makes_the_same_bytes(tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    built = build_all(tmp_path / "t", Workers(count=1))

    assert (built.made, built.kept) == (UNITS, 0)
    assert files_of(tmp_path / "t") == undisturbed


def test_of_two_workers_one_killed_in_a_unit_is_replaced_and_the_bytes_are_the_same(
    tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    built = build_all(tmp_path / "t", Workers(count=2), trouble="kill")

    assert built.made == UNITS
    assert (tmp_path / "killed").exists()
    assert files_of(tmp_path / "t") == undisturbed


def test_a_row_that_kills_its_worker_each_time_is_found_and_the_rest_is_kept(
    tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    built = build_all(tmp_path / "t", Workers(count=1), trouble="poison")

    commits = built.manifest.commits
    assert [c.care for c in commits] == [None, None, Care(lost=(1,)), None, None]
    assert (commits[2].rows, commits[2].rejects.reasons) == (2, {"worker_killed": 1})
    changed = {name for name, content in files_of(tmp_path / "t").items() if undisturbed.get(name) != content}
    assert changed == {
        "README.md", "SHA256SUMS", "documents/manifest.json", "documents/commits/00002.json",
        f"documents/{commits[2].file}", f"documents/rejects/{commits[2].rejects.file}",
    }  # fmt: skip


def test_a_unit_out_of_memory_is_made_in_smaller_batches_by_the_worker_it_has(tmp_path: Path) -> None:
    done: list[Commit] = []

    run_units(FakeStage(folder=tmp_path, trouble="memory", at=1), [0, 1], Workers(count=1), done.append)

    assert [(commit.unit, commit.care) for commit in done] == [(0, None), (1, Care(batch=2))]


@pytest.mark.parametrize(("trouble", "sentence"), [("error", "unit 2 is broken"), ("load", "the parser is broken")])
def test_an_error_a_stage_raises_arrives_as_itself(tmp_path: Path, trouble: str, sentence: str) -> None:
    with pytest.raises(BadData) as caught:
        build_all(tmp_path, Workers(count=1), trouble=trouble)

    assert type(caught.value) is BadData
    assert str(caught.value) == f"{sentence}. Kept: k. Next: mend it"


def test_a_stopped_worker_is_killed_and_its_unit_made_by_another(
    tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    build_all(tmp_path / "t", Workers(count=1, stall_seconds=8.0), trouble="stop")

    assert (tmp_path / "killed").exists()
    assert files_of(tmp_path / "t") == undisturbed

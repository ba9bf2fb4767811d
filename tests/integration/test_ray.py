"""Units on Ray: the same bytes as in this process, through kills and errors."""

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest

import fake_stage
import small_cache
from fake_stage import UNITS, FakeStage, build_all
from small_cache import IN_PROCESS, files_of, run_file
from xkd_pipeline.run import Workers, run_units
from xkd_pipeline.stages import align_stage, documents_stage, teacher_stage
from xkd_schemas.errors import BadData, WorkersGone
from xkd_schemas.manifest import Commit

pytestmark = [
    pytest.mark.ray,
    # Ray leaves the processes it started, and its sockets, to the garbage collector.
    pytest.mark.filterwarnings("default::ResourceWarning", "default::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(autouse=True)
def no_cluster_from_outside(monkeypatch) -> Iterator[None]:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(Path(fake_stage.__file__).parent))  # workers import the stage from there
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


def test_a_unit_that_kills_its_worker_each_time_ends_the_run_and_the_rest_is_kept(
    tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    with pytest.raises(
        WorkersGone, match=r"workers are gone: .*Kept: every committed unit. Next: run the same"
    ) as caught:
        build_all(tmp_path / "t", Workers(count=1), trouble="die")
    assert caught.value.exit_code == 69

    built = build_all(tmp_path / "t")

    assert (built.made, built.kept) == (UNITS - 2, 2)
    assert files_of(tmp_path / "t") == undisturbed


@pytest.mark.parametrize(("trouble", "sentence"), [("error", "unit 2 is broken"), ("load", "the parser is broken")])
def test_an_error_a_stage_raises_arrives_as_itself(tmp_path: Path, trouble: str, sentence: str) -> None:
    with pytest.raises(BadData) as caught:
        build_all(tmp_path, Workers(count=1), trouble=trouble)

    assert type(caught.value) is BadData
    assert str(caught.value) == f"{sentence}. Kept: k. Next: mend it"


def test_workers_that_hang_are_given_up(tmp_path: Path) -> None:
    done: list[Commit] = []
    stage = FakeStage(folder=tmp_path, trouble="hang", at=1)

    with pytest.raises(WorkersGone, match="no unit finished for 0 s"):
        run_units(stage, [0, 1], Workers(count=1, stall_seconds=0.1), done.append)

    assert [commit.unit for commit in done] in ([], [0])


def test_parser_and_teacher_make_the_same_cache_on_ray_as_in_process(tmp_path: Path) -> None:
    source = small_cache.made()
    run = run_file(
        tmp_path / "cache",
        documents={"corpus": [str(source / "corpus.jsonl")]},
        teacher={"model": str(source / "teacher")},
        student={"tokenizer": str(source / "student")},
    )

    documents_stage(run, Workers(count=1))
    teacher_stage(run, Workers(count=1))
    align_stage(run, IN_PROCESS)

    assert files_of(tmp_path / "cache") == files_of(source / "cache")
    assert not documents_stage(run, IN_PROCESS).values["made"]

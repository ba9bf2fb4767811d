"""Drawn classes: captured, verified, added, and what is refused; test_token_states has every tool."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import small_cache
from small_cache import asked
from xkd_pipeline.capture import capture as capturing
from xkd_pipeline.capture import stage as teachers
from xkd_pipeline.capture.stage import check_top
from xkd_pipeline.maintain import verify_rows as deep
from xkd_pipeline.stages import teacher_stage
from xkd_schemas.cache.table import Table
from xkd_schemas.config import RunConfig
from xkd_schemas.errors import UsageError
from xkd_schemas.signals import Signal
from xkd_trainer.data.cache import Cache
from xkd_trainer.models.loading import load_model

K = 5
COLUMN = f"sampled#{K}"


def run_with(cache: Path, **teacher: Any) -> RunConfig:
    return small_cache.whole_run(cache, teacher={"name": "drawn", "losses": ["rskd"], "samples": K} | teacher)


@pytest.fixture(scope="module")
def captured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small documents with drawn classes, and what their capture said."""
    folder = tmp_path_factory.mktemp("drawn") / "cache"
    shutil.copytree(small_cache.made() / "cache/documents", folder / "documents")
    outcome = teacher_stage(run_with(folder), small_cache.IN_PROCESS)
    (folder.parent / "said.txt").write_text(outcome.line)
    return folder


def test_capture_says_how_far_off_the_draws_are(captured: Path) -> None:
    error = Table(captured, "teachers/drawn").manifest.constants["codec_error"][COLUMN]
    said = (captured.parent / "said.txt").read_text()
    assert f"{COLUMN}: relative error {error:.2g}, right on average" in said
    assert "codec" not in said


def test_more_draws_can_be_added_beside_the_table(captured: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    shutil.copytree(captured, folder)

    code, said = asked("add", folder, "--model", small_cache.made() / "teacher", "--signals", "sampled#9,topk_ids#3")

    assert code == 0, said
    (name,) = (path.name for path in (folder / "signals").iterdir())
    beside, table = Table(folder, f"signals/{name}"), Table(folder, "teachers/drawn")
    assert set(beside.manifest.constants["codec_error"]) == {"sampled#9"}
    assert beside.manifest.constants["codec_error"]["sampled#9"] < table.manifest.constants["codec_error"][COLUMN]
    assert all(len(a["sampled#9"]) == len(b[COLUMN]) for a, b in zip(beside, table, strict=True))
    code, said = asked("verify", folder, "--level", "deep")
    assert (code, said["bad"]) == (0, [])


def test_deep_verification_looks_at_drawn_classes(captured: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deep, "find_class_fault", lambda entries, classes: f"{entries.shape[1]} of {classes > 300}")

    reasons = list(deep.find_faults(captured, Table(captured, "teachers/drawn"), 1))

    assert len(reasons) == 4
    assert f"{COLUMN}: {K} of True" in reasons[0]


def test_only_ids_of_the_tokenizer_are_drawn(captured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "cache"
    shutil.copytree(captured / "documents", folder / "documents")
    monkeypatch.setattr(capturing, "classes_of", lambda model: 50)

    teacher_stage(run_with(folder), small_cache.IN_PROCESS)

    drawn = [row[COLUMN] // 4096 for row in Table(folder, "teachers/drawn")]
    assert max(entries.max() for entries in drawn) == 49


def test_too_many_draws_and_too_many_classes_are_refused(captured: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_with(captured, samples=10**6, name="big")
    with pytest.raises(UsageError, match=r"samples is 1000000, .* has \d+ classes. Next: --samples \d+ at most"):
        teacher_stage(run, small_cache.IN_PROCESS)
    monkeypatch.setattr(teachers, "MOST_CLASSES", 100)
    with pytest.raises(UsageError, match=r"has \d+ classes; sampled#5 can hold numbers of 100. Next: use a loss that"):
        check_top(
            [Signal("sampled", top=5)], load_model(str(small_cache.made() / "teacher"), dtype=torch.float32), "T"
        )


def test_a_cache_without_draws_says_how_to_get_them() -> None:
    cache = Cache(small_cache.made() / "cache", student="S")
    with pytest.raises(UsageError, match=r"loss rskd needs sampled, which .*xkd-cache add .*--signals sampled#16"):
        cache.require("rskd", (Signal("sampled"), Signal("entropy")))

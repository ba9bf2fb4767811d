"""What a worker on another machine refuses to go on without."""

from pathlib import Path

import pytest

from xkd_pipeline.workers import ray_pool
from xkd_pipeline.workers.ray_pool import Place, versions
from xkd_schemas.errors import InputMissing, Mismatch


def here(folder: Path, **changes: object) -> Place:
    (folder / "mark").touch()
    values = {"paths": (folder,), "mark": folder / "mark", "versions": versions()}
    return Place(**{**values, **changes})


def test_the_same_machine_has_all_of_it(tmp_path: Path) -> None:
    here(tmp_path).check()
    assert {"numpy", "torch", "transformers"} <= set(versions())


def test_a_path_that_is_not_there_is_named_with_the_machine(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "node-7")
    with pytest.raises(
        InputMissing, match=r"worker on node-7: .*/model is not there. Next: put it on storage that all"
    ):
        here(tmp_path, paths=(tmp_path, tmp_path / "model")).check()


def test_a_folder_of_the_same_name_that_is_not_the_same_is_refused(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(ray_pool, "LOOK_SECONDS", 0.0)
    with pytest.raises(InputMissing, match=f"{tmp_path} is another folder there"):
        here(tmp_path, mark=tmp_path / "other").check()


def test_another_version_of_what_results_depend_on_is_refused_and_a_package_that_is_not_there_is_not_asked_for(
    tmp_path: Path,
) -> None:
    here(tmp_path, versions={name: version for name, version in versions().items() if name != "spacy"}).check()
    with pytest.raises(
        Mismatch, match=r"has torch .*, this process 1\.0\. Kept: every .* Next: install torch 1\.0 on"
    ):
        here(tmp_path, versions={**versions(), "torch": "1.0"}).check()

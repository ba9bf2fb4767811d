"""The public names of the three packages: imported when used, documented, and enough for a notebook."""

import importlib
import json
import re
import runpy
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from accelerate.state import AcceleratorState

import small_cache
import tiny_models
from xkd_schemas.cache.rows import open_cache
from xkd_schemas.config import RunConfig
from xkd_schemas.errors import InputMissing, UsageError

DOCS = Path(__file__).parents[2] / "docs"
PACKAGES = ("xkd_schemas", "xkd_pipeline", "xkd_trainer")


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_is_there_and_has_a_docstring(package: str) -> None:
    module = importlib.import_module(package)

    assert all(getattr(module, name).__doc__ for name in module.__all__)
    with pytest.raises(AttributeError, match=f"{package}.*no attribute 'nothing'"):
        _ = module.nothing


@pytest.mark.parametrize("package", PACKAGES)
def test_the_documented_names_are_the_public_names(package: str) -> None:
    sections = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", (DOCS / "api.md").read_text(), re.M | re.S))

    assert sorted(re.findall(r"^### `(\w+)`", sections[package], re.M)) == sorted(
        importlib.import_module(package).__all__
    )


@pytest.mark.parametrize(
    "name",
    [
        "xkd_trainer.signals.centrality",
        "xkd_trainer.losses.softdtw.soft_dtw",
        "xkd_schemas.alignment.common_boundaries",
    ],
)
def test_a_stable_name_stays_at_its_old_path(name: str) -> None:
    module, _, function = name.rpartition(".")

    assert callable(getattr(importlib.import_module(module), function))
    assert f"`{name}`" in (DOCS / "api.md").read_text()


def test_a_run_file_is_loaded_with_other_values_for_some_keys(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text('workers = 1\n[teacher]\nmodel = "T"\n[losses.mta]\nhid = "off"\n')

    run = RunConfig.load(path, workers=3, teacher={"codec": "int8"}, losses={"mta": {"gamma": 2}})

    assert (run.workers, run.teacher.model, run.teacher.codec) == (3, "T", "int8")
    assert run.losses == {"mta": {"hid": "off", "gamma": 2}}
    assert RunConfig.load() == RunConfig()
    with pytest.raises(UsageError, match=r"teacher\.codek.*did you mean 'codec'"):
        RunConfig.load(path, teacher={"codek": "int8"})


def test_an_open_cache_has_texts_tokens_and_signals_as_numbers(tmp_path: Path) -> None:
    cache = open_cache(small_cache.copied(tmp_path))
    row = cache[-1]

    assert len(cache) == 12
    assert row.text == cache[11].text
    assert cache[10:][1].text == row.text
    assert row.student.tokens[-3:] == ["l", ".", ""]
    assert "".join(row.teacher.tokens).startswith("11. How")
    assert row.words[0] in row.text
    assert row.phrases[0] == ("NP", "How many birds")
    hidden = row.teacher["hidden_last"]
    assert hidden.dtype == np.float32
    assert np.isfinite(hidden).all()
    assert hidden.shape[1] == 32
    assert row.teacher["token_ids"].dtype == np.int32
    with pytest.raises(IndexError):
        cache[12]


def test_an_open_cache_has_none_for_a_teacher_or_student_that_it_lacks_and_refuses_what_does_not_fit(
    tmp_path: Path,
) -> None:
    root = small_cache.copied(tmp_path)
    with pytest.raises(UsageError, match="aligned with teacher T, not with other"):
        open_cache(root, teacher="other", student="S")
    shutil.rmtree(root / "students")
    assert open_cache(root)[0].student is None
    shutil.rmtree(root / "teachers")
    assert open_cache(root)[0].teacher is None
    with pytest.raises(InputMissing, match="no finished teacher"):
        open_cache(root, student="S")


def test_the_notebook_of_the_docs_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = small_cache.made()
    sections = {
        "documents": {"corpus": [str(made / "corpus.jsonl")], "spacy_model": small_cache.SPACY},
        "teacher": {"model": str(made / "teacher"), "dtype": "float32"},
        "student": {"model": "new:llama,layers=2,width=16", "tokenizer": str(made / "student")},
        "train": {"out": "out", "loss": "mta+sra+dwa", "steps": 1, "batch_size": 2},
    }
    lines = ['cache = "cache"']
    for name, values in sections.items():
        lines += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in values.items())]
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "demo.toml").write_text("\n".join(lines))
    monkeypatch.chdir(tmp_path)

    found = runpy.run_path(str(DOCS / "examples" / "notebook.py"))

    assert found["message"].startswith("cache no/such/cache is not a folder")
    assert (found["findings"], found["trained"].steps) == ([], 1)
    assert "bits_per_byte" in found["scores"]
    assert found["row"].teacher.tokens


@pytest.fixture
def _other_precisions_may_follow() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("_other_precisions_may_follow")
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing. is deprecated:FutureWarning")  # of peft and TRL
@pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")
@pytest.mark.parametrize(
    ("script", "saved"),
    [
        ("bare_loop", "out/student/model.safetensors"),
        ("transformers_trainer", "out/lora/adapter_model.safetensors"),
        ("trl_sft", "out/sft/model.safetensors"),
    ],
)
def test_a_script_of_integrations_runs_and_is_short(
    script: str, saved: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = DOCS / "examples" / f"{script}.py"
    (tmp_path / "student").symlink_to(tiny_models.tiny_cache().student)
    (tmp_path / "cache").symlink_to(tiny_models.tiny_cache().cache)
    monkeypatch.chdir(tmp_path)

    found = runpy.run_path(str(path))

    assert len(path.read_text().splitlines()) < 40
    assert (tmp_path / saved).is_file()
    assert found["terms"].keys() > {"ce.ce"} if script == "bare_loop" else found["trainer"].state.global_step == 3

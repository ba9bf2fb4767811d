"""From a cache to a student on machines that lack things: the teacher, the offline stack, kernels."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import tiny_models as tiny
from forked import begun, wait_for
from xkd_schemas.cache import table
from xkd_trainer.data.sampler import Order
from xkd_trainer.training.loop import train

ALL = "mta+sra+dwa"

TRAIN = """
import sys
from xkd_trainer.cli import main
sys.argv[0] = "xkd-train"
main()
"""
MISSING = ("ray", "spacy", "benepar", "datasets", "xkd_pipeline", "numba")
"""Nothing of the offline stack; kernels are not compiled, which takes as long as all else."""


def flags(root: Path, out: Path, **changed: Any) -> list[str]:
    """A run of xkd-train on the cache in `root`; what it does not say is as in `settings_like_flags`."""
    given = {"shards": root / "cache", "student": root / "student", "loss": ALL, "out": out, "steps": 4, **changed}
    given = {"batch_size": 23, "lr": 1e-4, "projector_lr": 1e-4, **given}
    return [part for name, value in given.items() for part in (f"--{name.replace('_', '-')}", str(value))]


def settings_like_flags(out: Path) -> Any:
    run = tiny.tiny_cache().run(out=str(out), loss=ALL, steps=4, batch_size=23, lr=1e-4, projector_lr=1e-4)
    return run.model_copy(update={"train": run.train.model_copy(update={"log_every": 1, "warmup_ratio": 0.05})})


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The student trained in this process, where everything is there."""
    out = tmp_path_factory.mktemp("reference") / "student"
    train(settings_like_flags(out), quiet=True)
    return out


def assert_weights(out: Path, expected: Path, atol: float) -> None:
    found, wanted = load_file(out / "model.safetensors"), load_file(expected / "model.safetensors")
    assert found.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=0, atol=atol, msg=name)


def moved(out: Path) -> float:
    start, end = (load_file(f / "model.safetensors") for f in (tiny.tiny_cache().student, out))
    return max(float((end[name] - start[name]).abs().max()) for name in start)


def lines(out: Path) -> list[Mapping[str, float]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_without_teacher_corpus_and_offline_stack_the_same_student_is_trained(tmp_path: Path, reference: Path) -> None:
    root = tmp_path / "elsewhere"
    shutil.copytree(tiny.tiny_cache().cache, root / "cache")  # without teacher/ and corpus.jsonl
    shutil.copytree(tiny.tiny_cache().student, root / "student")
    changed = {"micro_batch_size": 8, "save_every": 2}
    away = tiny.tiny_cache().teacher.rename(tmp_path / "teacher-is-away")
    try:
        words = (*flags(root, tmp_path / "away", **changed), "--set", "train.log_every=1", "--json")
        program = begun(TRAIN, tmp_path / "said", *words, without=MISSING)
        (ended,) = wait_for([program], [tmp_path / "said"])
    finally:
        away.rename(tiny.tiny_cache().teacher)

    assert ended.code == 0, ended.err
    told = json.loads(ended.out)
    assert told["steps"] == 4
    assert told["terms"].keys() >= {"loss", "ce.ce", "sra.kd", "dwa.dtw_states", "mta.dsa@2:word"}
    for found, expected in zip(lines(tmp_path / "away"), lines(reference), strict=True):
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-6)
    assert_weights(tmp_path / "away", reference, atol=2e-5)
    assert moved(reference) > 2e-4
    assert sorted(p.name for p in (tmp_path / "away/checkpoints").iterdir()) == ["step-00000002", "step-00000004"]


def test_training_opens_the_shards_of_the_documents_of_its_steps_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tiny.tiny_cache().run(out=str(tmp_path / "out"), loss="sra", steps=1, batch_size=1)
    opened: list[Path] = []
    shard = table.Shard
    monkeypatch.setattr(table, "Shard", lambda path, *more: opened.append(path) or shard(path, *more))

    train(run, quiet=True)

    (row,) = Order(size=24, batch_size=1, seed=run.train.seed).step(0)
    names = ("documents", "teachers/teacher", "students/student")
    needed = {name: table.Table(tiny.tiny_cache().cache, name).path(int(row) // 10) for name in names}
    assert set(needed.values()) <= set(opened)
    extra = {path.parent for path in opened if path not in needed.values()}
    assert extra <= {needed["students/student"].parent}  # how the first rows end is looked at for the export

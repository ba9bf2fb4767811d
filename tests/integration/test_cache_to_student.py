"""From a cache to a student on machines that lack things: the teacher, the offline stack, kernels."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import tiny_models as tiny
from forked import begun, wait_for
from xkd_schemas.cache import table
from xkd_trainer.data.sampler import Order
from xkd_trainer.training.loop import train

TRAIN = """
import sys
from xkd_trainer.cli import main
sys.argv[0] = "xkd-train"
main()
"""
MISSING = ("ray", "spacy", "benepar", "datasets", "xkd_pipeline", "numba")
"""Nothing of the offline stack; kernels are not compiled, which takes as long as all else."""


def lines(out: Path) -> list[Mapping[str, float]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_without_teacher_corpus_and_offline_stack_the_same_student_is_trained(tmp_path: Path) -> None:
    small, root, here, away = tiny.tiny_cache(), tmp_path / "elsewhere", tmp_path / "here", tmp_path / "away"
    given = {"loss": "mta+sra+dwa", "steps": 4, "batch_size": 23, "lr": 1e-4, "projector_lr": 1e-4}
    train(small.run(out=str(here), warmup_ratio=0.05, **given), quiet=True)
    shutil.copytree(small.cache, root / "cache")  # without teacher/ and corpus.jsonl
    shutil.copytree(small.student, root / "student")
    flags = {"shards": root / "cache", "student": root / "student", "out": away, "micro_batch_size": 8, **given}
    words = [word for name, value in flags.items() for word in (f"--{name.replace('_', '-')}", value)]
    teacher = small.teacher.rename(tmp_path / "teacher-is-away")
    try:
        words += ["--save-every", 2, "--set", "train.log_every=1", "--json"]
        program = begun(TRAIN, tmp_path / "said", *words, without=MISSING)
        (ended,) = wait_for([program], [tmp_path / "said"])
    finally:
        teacher.rename(small.teacher)

    assert ended.code == 0, ended.err
    told = json.loads(ended.out)
    assert told["steps"] == 4
    assert told["terms"].keys() >= {"loss", "ce.ce", "sra.kd", "dwa.dtw_states", "mta.dsa@2:word"}
    for found, expected in zip(lines(away), lines(here), strict=True):
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-6)
    start, found, wanted = (load_file(folder / "model.safetensors") for folder in (small.student, away, here))
    assert found.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=0, atol=2e-5, msg=name)
    assert max(float((wanted[name] - start[name]).abs().max()) for name in start) > 2e-4
    assert sorted(path.name for path in (away / "checkpoints").iterdir()) == ["step-00000002", "step-00000004"]


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

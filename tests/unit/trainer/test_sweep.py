"""A grid of runs on one cache: every combination once, failures told, and cross-entropy before and after."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import tiny_models as tiny
import xkd_schemas
import xkd_trainer
from xkd_schemas.config import RunConfig
from xkd_schemas.errors import NonFinite, UsageError, WorkersGone
from xkd_train import xkd_train
from xkd_trainer import sweep as sweeps
from xkd_trainer.run_folder import read_run
from xkd_trainer.sweep import Ended, make_cells, parse_vary, steps_in_equal_time, summarise
from xkd_trainer.training import loop


def names(*vary: str, **train: Any) -> tuple[list[str], list[str]]:
    control, grid = make_cells(RunConfig.model_validate({"train": {"out": "o", **train}}), parse_vary(vary))
    return [cell.name for cell in control], [cell.name for cell in grid]


def test_every_combination_is_a_run_named_by_its_values_and_the_control_is_not_trained_twice() -> None:
    control, grid = names("loss=ce,mta=1+sra", "train.lr=[1e-3]", "--vary=0".removeprefix("--vary=0") + "seed=0,1")

    assert control == ["loss=ce,lr=0.0005,seed=0", "loss=ce,lr=0.0005,seed=1"]
    assert grid == [f"loss={loss},lr=0.001,seed={seed}" for loss in ("ce", "mta=1+sra") for seed in (0, 1)]
    assert names("loss=ce", "loss=dwa") == (["loss=ce"], ["loss=dwa"])
    control, grid = names('student.model=["new:llama,l=2", "new/llama,l=2"]', "losses.mta.hid=off", loss="mta")
    assert [len(control), len(grid)] == [1, 2]
    assert all("/" not in name and name.startswith("loss=mta,model=") for name in grid)
    assert len(set(grid)) == 2


@pytest.mark.parametrize(
    ("vary", "said"),
    [
        ("lr", r"--vary lr: not KEY=VALUE,VALUE"), ("train.out=a,b", "not KEY=VALUE,VALUE"),
        ("train.lrr=1", r"--vary: 'train.lrr' is not a key.*did you mean 'lr'"),
        ("lr=1,-1", r"--vary: train\.lr: Input should be greater than 0, found -1"),
        ("loss=ce,mtaa", "'mtaa' is not a loss"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_one_line_before_anything_is_trained(tmp_path: Path, vary: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        sweeps.sweep(tiny.Tiny(tmp_path).run(out=str(tmp_path / "out")), [vary])
    assert not (tmp_path / "out").exists()


def test_a_cluster_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    run = tiny.Tiny(tmp_path).run(out=str(tmp_path / "out"))

    with pytest.raises(
        WorkersGone, match=r"no Ray cluster at nowhere: .*Next: start it \(docs/cluster\.md\), or leave"
    ):
        sweeps.sweep(run.model_copy(update={"ray_address": "nowhere"}), ["loss=ce"])


def test_runs_are_sent_to_a_cluster_and_one_whose_worker_ends_is_a_failure_of_its_own_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray
    from ray import cloudpickle

    def get(sent: bytes) -> Ended:
        function, (cell, *more) = cloudpickle.loads(sent)
        if cell.run.train.seed:
            raise ray.exceptions.RayError("the node died")
        return cloudpickle.loads(cloudpickle.dumps(function(cell, *more)))

    def remote(**settings: Any) -> Any:
        asked.append(settings)
        return lambda function: SimpleNamespace(remote=lambda *given: cloudpickle.dumps((function, given)))

    asked, closed = list[Any](), list[bool]()
    monkeypatch.setattr(ray, "init", lambda address, **settings: asked.append((address, settings["runtime_env"])))
    monkeypatch.setattr(ray, "remote", remote)
    monkeypatch.setattr(ray, "get", get)
    monkeypatch.setattr(ray, "shutdown", lambda: closed.append(True))
    given = {"out": str(tmp_path / "out"), "steps": 1, "ray_address": "auto", "gpus_per_worker": 0.5}

    found = sweeps.sweep(tiny.tiny_cache().run(**given), ["loss=ce", "seed=0,1"])

    assert [(row["seeds"], row["failed"]) for row in found["rows"]] == [(1, 1)]
    assert [str(error) for _, error in found["failures"]] == ["its worker on Ray ended: the node died."]
    assert (tmp_path / "out/loss=ce,seed=0/model.safetensors").is_file()
    modules = [str(Path(package.__file__).parent) for package in (xkd_schemas, xkd_trainer)]
    assert asked == [("auto", {"py_modules": modules}), {"num_cpus": 1, "num_gpus": 0.5, "max_retries": 0}]
    assert closed == [True]


def ended(name: str, seed: int, **values: Any) -> Ended:
    run = RunConfig.model_validate({"train": {"out": "o"}})
    control, grid = make_cells(run, {"train.loss": [name], "train.seed": [seed]})
    return Ended(cell=[*grid, *control][0], **values)


def test_equal_time_is_the_mean_time_of_the_others_in_steps_of_cross_entropy() -> None:
    control = [ended("ce", seed, steps=10, seconds=seconds) for seed, seconds in ((0, 4.0), (1, 6.0))]
    others = [ended("mta", 0, steps=10, seconds=20.0), ended("sra", 0, steps=10, seconds=30.0)]
    failed = ended("dwa", 0, error=ValueError("no"), seconds=999.0)

    assert steps_in_equal_time(control, [*others, failed, ended("ce", 5, steps=10, seconds=1.0)]) == 50
    assert steps_in_equal_time(control, [failed]) == 0


def test_a_row_has_mean_and_deviation_over_the_seeds_that_were_finished() -> None:
    bits = [ended("mta", seed, steps=4, loss=2.0 + seed, bits_per_byte=1.0 + seed) for seed in (0, 1)]

    row = summarise("mta", [*bits, ended("mta", 2, error=ValueError("no"))])

    assert row["bits per byte"] == {"mean": 1.5, "std": pytest.approx(0.5**0.5)}
    assert row["last loss"] == {"mean": 2.5, "std": pytest.approx(0.5**0.5)}
    assert (row["seeds"], row["failed"], row["steps"]) == (2, 1, {"mean": 4, "std": 0.0})


def test_a_sweep_goes_on_behind_a_failure_and_the_same_command_trains_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = tiny.tiny_cache()
    runfile = tmp_path / "run.toml"
    runfile.write_text(
        f'cache = "{made.cache}"\n[student]\nmodel = "{made.student}"\n[train]\nout = "{tmp_path / "out"}"\n'
        f'steps = 2\nbatch_size = 4\nlog_every = 1\neval_data = "{tiny.corpus_file(tmp_path, tiny.PAIRS[:3])}"\n'
    )
    command = ["sweep", runfile, "--vary", "loss=sra", "--vary", "seed=0,1"]
    go, began = loop._Run.go, list[str]()

    def counted(self: Any, quiet: bool) -> dict[str, float]:
        began.append(self.out.name)
        if self.out.name == "loss=sra,seed=0" and len(began) < 6:
            raise NonFinite("step 1: sra.cos not finite", kept="nothing")
        return go(self, quiet)

    monkeypatch.setattr(loop._Run, "go", counted)
    first = xkd_train(*command)

    assert first.code == NonFinite.exit_code
    assert "1 of 6 runs failed; loss=sra,seed=0: step 1: sra.cos not finite. Kept: the other runs" in first.err
    assert began[:4] == ["loss=ce,seed=0", "loss=ce,seed=1", "loss=sra,seed=0", "loss=sra,seed=1"]
    timed = [re.sub("steps=[0-9]+", "steps=N", name) for name in began[4:]]
    assert timed == ["loss=ce,steps=N,seed=0", "loss=ce,steps=N,seed=1"]
    began[:] = [""] * 9
    second = xkd_train(*command)

    assert second.code == 0, second.err
    assert [name for name in began[9:] if "steps=" not in name] == ["loss=sra,seed=0"]
    rows = json.loads((tmp_path / "out/sweep.json").read_text())["rows"]
    assert rows[0]["run"] == "loss=ce (control of equal steps)"
    assert (rows[1]["run"], rows[1]["seeds"], rows[1]["failed"]) == ("loss=sra", 2, 0)
    assert rows[-1]["run"].endswith("(control of equal time)")
    losses = [read_run(tmp_path / f"out/loss=sra,seed={seed}").metrics[-1]["loss"] for seed in (0, 1)]
    assert rows[1]["last loss"]["mean"] == pytest.approx(sum(losses) / 2)
    table = (tmp_path / "out/sweep.md").read_text()
    assert second.out == table
    assert table.startswith("| run | seeds | steps | bits per byte |")
    page = (tmp_path / "out/sweep.html").read_text()
    for part in ("control of equal time", "loss=sra,seed=1", "sra.cos", "bits per byte"):
        assert part in page

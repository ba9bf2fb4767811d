"""What is seen of a run: times beside the metrics, and trackers that get both and never end it."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate import Accelerator
from accelerate import tracking as trackers
from accelerate.utils import LoggerType
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import tiny_models as tiny
from tiny_run import run, stopped
from xkd_schemas.errors import InputMissing
from xkd_train import xkd_train
from xkd_trainer.data.cache import Cache
from xkd_trainer.data.sampler import Order
from xkd_trainer.run_folder import read_lines
from xkd_trainer.training import loop, tracking
from xkd_trainer.training.loop import train
from xkd_trainer.training.tracking import Meter


def test_waiting_is_the_time_until_a_batch_is_there_and_what_lies_between_steps_counts_as_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = [0.0]
    monkeypatch.setattr(tracking, "perf_counter", lambda: clock[0])

    def passes(seconds: float, item: Any = None) -> Any:
        clock[0] += seconds
        return item

    row = SimpleNamespace(student_valid_BS=tiny.ids_and_valid((5, 2), 9)[1], predict_valid_BN=tiny.torch.ones(2, 1))
    meter = Meter()
    for batches in meter.watch(passes(1.0, [row]) for _ in range(2)):
        passes(3.0)  # the step
        meter.count(batches)
        passes(50.0)  # a checkpoint

    found = meter.take(Accelerator(cpu=True))

    assert (found["steps"], found["seconds_per_step"], found["waiting_share"]) == (2, 4.0, 0.25)
    assert found["tokens_per_second"] == 14 / 8
    assert found["peak_memory_bytes"] > 10**8
    assert meter.take(Accelerator(cpu=True))["steps"] == 0


def test_each_logged_step_has_its_time_and_all_its_tokens_and_a_resumed_run_has_each_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"steps": 6, "log_every": 2, "save_every": 2, "micro_batch_size": 4}
    stopped(run(tmp_path, **settings), monkeypatch, 11)
    before = read_lines(tmp_path / "timing.jsonl")
    train(run(tmp_path, **settings), quiet=True)

    lines = read_lines(tmp_path / "timing.jsonl")
    assert lines[:1] == before[:1]
    assert [(line["step"], line["steps"], line["total"]) for line in lines] == [(2, 2, 6), (4, 2, 6), (6, 2, 6)]
    cache, order = Cache(tiny.tiny_cache().cache, student="student"), Order(size=len(tiny.PAIRS), batch_size=6, seed=0)
    for line in lines:
        tokens = 0
        for step in (line["step"] - 2, line["step"] - 1):
            rows = cache.rows(step // order.steps_per_epoch, 0)[order.share(step, 0, 1, 0)[0]].tolist()
            tokens += sum(len(cache.students[row]["token_ids"]) for row in rows)
        assert line["tokens_per_second"] * line["seconds_per_step"] * 2 == pytest.approx(tokens)
        assert 0 <= line["waiting_share"] <= 1


# Trackers


def tracked(out: Path) -> dict[str, dict[int, float]]:
    """Scalars of tensorboard's files: name to step to value."""
    events = EventAccumulator(str(out / "trackers" / "xkd"))
    events.Reload()
    found: dict[str, dict[int, float]] = {}
    for name in events.Tags()["scalars"]:
        steps = [event.step for event in events.Scalars(name)]
        assert len(steps) == len(set(steps)), f"{name} has a step twice"
        found[name] = {event.step: event.value for event in events.Scalars(name)}
    return found


def test_tensorboard_has_every_value_of_both_files_also_of_a_resumed_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"steps": 6, "save_every": 2, "track": ("tensorboard",), "loss": "sra"}
    stopped(run(tmp_path, **settings), monkeypatch, 5)  # step 3 is logged behind the checkpoint of step 2
    train(run(tmp_path, **settings), quiet=True)

    found = tracked(tmp_path)
    assert {"loss", "sra.cos", "sra.cos.count", "grad_norm", "lr"} <= found.keys()
    for prefix, name in (("", "metrics.jsonl"), ("timing/", "timing.jsonl")):
        for line in read_lines(tmp_path / name):
            for key in line.keys() - {"step", "steps", "total"}:
                assert found[prefix + key].keys() == set(range(1, 7))
                assert found[prefix + key][line["step"]] == pytest.approx(line[key], rel=1e-6), key
    assert list((tmp_path / "trackers").rglob("hparams.yml"))


def test_a_tracker_that_is_not_installed_or_not_known_is_one_line_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr(loop, "set_up", None)
    command = ["--shards", "c", "--student", "s", "--out", tmp_path / "out", "--track"]

    assert xkd_train(*command, "tensorboard,wandb") == (
        InputMissing.exit_code, "", "xkd-train: --track wandb: wandb is not installed. Next: pip install wandb\n"
    )  # fmt: skip
    unknown = xkd_train(*command, "tensorbored")
    assert unknown.code == 2
    assert "'tensorboard', 'trackio', 'wandb' or 'mlflow', found 'tensorbored'" in unknown.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("where", ["start", "log", "finish"])
def test_a_tracker_that_fails_is_a_warning_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], where: str
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(trackers.TensorBoardTracker, where, fail)

    assert train(run(tmp_path, steps=3, track=("tensorboard",)), quiet=True).steps == 3

    assert capsys.readouterr().err.count("no route to host") == 1
    assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def test_wandb_takes_a_resumed_run_up_under_its_own_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[dict[str, Any]] = []
    logged: list[tuple[int, dict[str, Any]]] = []

    def init(**options: Any) -> Any:
        begun.append(options)
        return SimpleNamespace(log=lambda values, step: logged.append((step, values)), finish=lambda: None)

    config = SimpleNamespace(update=lambda *_, **__: None)
    spec = SimpleNamespace()  # what importlib looks for
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, config=config, __spec__=spec))  # type: ignore[arg-type]
    monkeypatch.setattr(trackers, "get_available_trackers", lambda: [LoggerType.WANDB])
    settings = {"steps": 4, "save_every": 2, "track": ("wandb",)}

    stopped(run(tmp_path / "one", **settings), monkeypatch, 3)
    train(run(tmp_path / "one", **settings), quiet=True)
    train(run(tmp_path / "two", **settings), quiet=True)

    assert begun[0] == begun[1]
    assert (begun[0]["project"], begun[0]["name"], begun[0]["resume"]) == ("xkd", "one", "allow")
    assert begun[2]["id"] != begun[0]["id"]
    last = json.loads((tmp_path / "one/metrics.jsonl").read_text().splitlines()[-1])
    assert logged[-5][0] == last.pop("step") == 4
    assert last.items() <= logged[-5][1].items()

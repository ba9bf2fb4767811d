"""The training loop on the tiny cache: it learns, resumes bit for bit, stops at NaN, and does nothing twice."""

import errno
import functools
import itertools
import json
import math
import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import tiny_models as tiny
from faulty_disk import exit_code_of
from tiny_run import assert_same_run, run, stopped
from xkd_schemas.config import TrainSection
from xkd_schemas.console import run as run_app
from xkd_schemas.durable_files import hold_lock
from xkd_schemas.errors import Busy, DiskFailed, Mismatch, NonFinite, OutOfMemory, UsageError
from xkd_train import xkd_train
from xkd_trainer.data import sampler as batches
from xkd_trainer.data.batch import Batch, unwrap
from xkd_trainer.data.collate import batch_of
from xkd_trainer.data.sampler import Order, learning_rate
from xkd_trainer.run_folder import read_lines
from xkd_trainer.training import devices, files, fingerprint, loop
from xkd_trainer.training.files import load_newest
from xkd_trainer.training.loop import train
from xkd_trainer.training.prepare import set_up

ALL = "mta+sra+dwa"


@pytest.fixture(autouse=True)
def _other_precisions_may_follow() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def metrics(out: Path) -> list[dict[str, Any]]:
    return list(read_lines(out / "metrics.jsonl"))


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model.safetensors")


def test_logged_lines_are_means_over_the_steps_since_the_last(tmp_path: Path) -> None:
    train(run(tmp_path / "each", steps=5), quiet=True)
    train(run(tmp_path / "pairs", steps=5, log_every=2), quiet=True)

    each, pairs = metrics(tmp_path / "each"), metrics(tmp_path / "pairs")
    assert [line["step"] for line in pairs] == [2, 4, 5]
    assert pairs[0]["loss"] == pytest.approx((each[0]["loss"] + each[1]["loss"]) / 2)
    assert pairs[1]["ce.ce.count"] == each[2]["ce.ce.count"] + each[3]["ce.ce.count"]
    assert pairs[2]["loss"] == pytest.approx(each[4]["loss"])


@pytest.mark.parametrize(
    "changed",
    [{"micro_batch_size": 4}, {"batch_tokens": 60, "packing": True}, {"mixed_precision": "bf16"}],
)
def test_micro_batches_make_the_same_steps_and_mixed_precision_about_the_same(
    tmp_path: Path, changed: dict[str, Any]
) -> None:
    half = "mixed_precision" in changed
    train(run(tmp_path, loss=ALL, steps=2, **changed), quiet=True)

    for whole, other in zip(metrics(two_steps()), metrics(tmp_path), strict=True):
        assert other == pytest.approx(whole, rel=1e-3) or half
        assert other["loss"] == pytest.approx(whole["loss"], rel=0.02)
        assert other["loss"] != whole["loss"] or not half
    assert {w.dtype for w in weights(tmp_path).values()} == {torch.float32}


@functools.cache
def two_steps() -> Path:
    out = tiny.tiny_cache().root / "two-steps"
    AcceleratorState._reset_state(reset_partial_state=True)
    train(run(out, loss=ALL, steps=2), quiet=True)
    return out


def test_a_second_trainer_in_the_same_folder_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    with hold_lock(tmp_path):
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        with pytest.raises(Busy, match=rf"{tmp_path} is being written by pid \d+"):
            train(run(tmp_path, steps=1), quiet=True)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert train(run(tmp_path, steps=1), quiet=True).steps == 1


@pytest.mark.parametrize(
    ("where", "kept"), [("checkpoint", "nothing of this run: no step"), ("export", "checkpoint of step 2")]
)
def test_a_full_disk_says_which_checkpoint_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, kept: str
) -> None:
    def full(*_args: Any, **_options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    name = "xkd_trainer.training.files.save_tensors" if where == "checkpoint" else "xkd_schemas.durable_files.rename"
    with monkeypatch.context() as patch:
        patch.setattr(name, full)
        with pytest.raises(DiskFailed, match=rf"No space left on device\. Kept: .*{kept}.* Next: free space"):
            train(run(tmp_path, steps=2, save_every=1), quiet=True)
    train(run(tmp_path, steps=2, save_every=1), quiet=True)
    train(run(tmp_path.parent / "undisturbed", steps=2, save_every=1), quiet=True)
    assert_same_run(tmp_path, tmp_path.parent / "undisturbed")


# The schedule


def test_the_rate_warms_up_linearly_and_falls_as_a_cosine_to_its_floor() -> None:
    settings = TrainSection(warmup_ratio=0.25, min_lr_ratio=0.1)

    found = [learning_rate(step, 12, settings) for step in range(12)]

    expected = [(s + 1) / 3 for s in range(3)]
    expected += [0.1 + 0.9 * (1 + math.cos(math.pi * s / 9)) / 2 for s in range(9)]
    assert found == pytest.approx(expected)
    assert learning_rate(0, 1, TrainSection(warmup_ratio=0.0)) == 1.0


def test_the_rate_of_each_step_is_the_logged_one_and_epochs_count_the_corpus(tmp_path: Path) -> None:
    size = len(tiny.PAIRS)
    changed = {"steps": 0, "epochs": 1.5, "batch_size": 7, "lr": 2e-3, "warmup_ratio": 0.5}

    train(run(tmp_path, **changed), quiet=True)

    total = round(1.5 * math.ceil(size / 7))
    settings = TrainSection(warmup_ratio=0.5)
    assert [line["lr"] for line in metrics(tmp_path)] == pytest.approx(
        [2e-3 * learning_rate(step, total, settings) for step in range(total)]
    )


def test_gradients_are_clipped_before_the_update_and_logged_before_clipping(tmp_path: Path) -> None:
    start = load_file(tiny.tiny_cache().student / "model.safetensors")
    train(run(tmp_path / "free", steps=1, weight_decay=0.0), quiet=True)
    train(run(tmp_path / "tight", steps=1, weight_decay=0.0, max_grad_norm=1e-12), quiet=True)

    def moved(out: Path) -> float:
        return max(float((w - start[n]).abs().max()) for n, w in weights(out).items())

    assert moved(tmp_path / "tight") < 1e-3 * moved(tmp_path / "free")
    assert metrics(tmp_path / "tight")[0]["grad_norm"] == metrics(tmp_path / "free")[0]["grad_norm"] > 0.1


def test_each_step_starts_from_no_gradient(tmp_path: Path) -> None:
    train(run(tmp_path, loss=ALL, steps=3, batch_size=24, lr=1e-12, projector_lr=1e-12), quiet=True)

    norms = [line["grad_norm"] for line in metrics(tmp_path)]
    assert norms == pytest.approx([norms[0]] * 3, rel=1e-3)


def test_the_best_student_is_not_promised_under_fsdp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")

    with pytest.raises(UsageError, match=r"FSDP cannot export the best student\. Next: --load-best-at-end false"):
        devices.make_accelerator(TrainSection(eval_data="held.jsonl"))


def test_an_adapter_under_fsdp_is_refused_before_it_is_trained() -> None:
    module, fsdp = SimpleNamespace(student=SimpleNamespace(peft_config={"default": 1})), SimpleNamespace(is_fsdp2=True)

    with pytest.raises(UsageError, match="FSDP cannot save an adapter"):
        devices.prepare(fsdp, module, torch.optim.SGD([torch.zeros(1)]))


# Stopping and going on


def new() -> dict[str, str]:
    """A fresh student with dropout: random numbers must go on, too."""
    tokenizer = str(tiny.tiny_cache().student)
    return {"student__model": "new:gpt2,layers=2,width=16,heads=2", "student__tokenizer": tokenizer}


@functools.cache
def eight_steps() -> Path:
    out = tiny.tiny_cache().root / "eight"
    train(run(out, loss="sra", steps=8, save_every=2, **new()), quiet=True)
    return out


def stopped_after(out: Path, monkeypatch: pytest.MonkeyPatch, batches: int) -> int:
    """The same run, ended by an error; the step of its newest checkpoint."""
    stopped(run(out, loss="sra", steps=8, save_every=2, **new()), monkeypatch, batches)
    return saved_step(out)


def saved_step(out: Path) -> int:
    """That of the newest checkpoint; 0 where there is none."""
    snapshot, _ = load_newest(out)
    return 0 if snapshot is None else snapshot.step


@pytest.mark.parametrize(("batches", "saved", "resumed"), [(1, 0, 0), (7, 6, 4)])
def test_a_stopped_run_goes_on_as_if_nothing_had_happened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, batches: int, saved: int, resumed: int
) -> None:
    assert stopped_after(tmp_path, monkeypatch, batches) == saved
    assert not (tmp_path / "model.safetensors").exists()
    first = (tmp_path / "metrics.jsonl").read_bytes()
    if resumed < saved:  # the newest checkpoint is damaged
        damaged = tmp_path / "checkpoints/step-00000006/optimizer.safetensors"
        damaged.write_bytes(damaged.read_bytes()[:-5])

    trained = train(run(tmp_path, loss="sra", steps=8, save_every=2, **new()), quiet=True)

    assert trained.resumed_at == resumed
    assert_same_run(tmp_path, eight_steps())
    assert resumed or (tmp_path / "metrics-1.jsonl").read_bytes() == first
    said = " ".join(capsys.readouterr().err.split())
    assert ("warning: " in said and "step-00000006 is damaged and was passed over" in said) == (resumed < saved)


def test_settings_of_later_releases_are_named_in_a_run_only_where_they_are_used(tmp_path: Path) -> None:
    """So that a student, or a checkpoint, of an earlier release counts as the same run."""
    used = {"batch_tokens": 60, "packing": True}
    ready = set_up(run(tmp_path), "", quiet=True)
    usual, changed = (fingerprint.fingerprint_of(run(tmp_path, **more), ready, 4)["train"] for more in ({}, used))

    assert changed == {**usual, **used}
    assert set(usual) == fingerprint.FIRST_KEYS


@pytest.mark.parametrize(("operation", "calls", "saved"), [("save_tensors", 5, 2), ("sync_folder", 4, 4)])
def test_a_run_killed_inside_a_save_has_the_metrics_of_an_undisturbed_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: str, calls: int, saved: int
) -> None:
    made, whole, settings = itertools.count(1), getattr(files, operation), {"loss": "sra", "steps": 8, **new()}

    def kill(*given: Any) -> None:
        whole(*given)
        if next(made) == calls:
            os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patch:
        patch.setattr(files, operation, kill)
        assert exit_code_of(lambda: train(run(tmp_path, save_every=2, **settings), quiet=True)) == -signal.SIGKILL
    assert saved_step(tmp_path) == saved
    left = {path.name for path in (tmp_path / "checkpoints").glob(".*")}

    assert train(run(tmp_path, save_every=2, **settings), quiet=True).resumed_at == saved
    assert_same_run(tmp_path, eight_steps())
    assert bool(left) == (operation == "save_tensors")
    assert sorted(path.name for path in tmp_path.rglob("*")) == sorted(path.name for path in eight_steps().rglob("*"))


def test_what_a_run_killed_behind_its_mark_leaves_goes_with_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "SAVE_SECONDS", 0.0)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "tidy_up", lambda *_, **__: None)
        train(run(tmp_path, steps=2), quiet=True)
    assert (tmp_path / "xkd-unfinished.json").exists()
    assert (tmp_path / "checkpoints").exists()

    assert train(run(tmp_path, steps=2), quiet=True).resumed_at == 2
    assert not (tmp_path / "xkd-unfinished.json").exists()
    assert not (tmp_path / "checkpoints").exists()
    assert train(run(tmp_path, steps=2, save_every=1), quiet=True).resumed_at == 2


def test_without_a_setting_a_checkpoint_is_written_at_least_every_ten_minutes_and_none_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[int] = []
    monkeypatch.setattr(loop, "save", lambda _out, snapshot: written.append(snapshot.step))
    quarters = itertools.count(0, 250)
    monkeypatch.setattr(loop, "monotonic", lambda: float(next(quarters)))
    train(run(tmp_path, steps=8, **new()), quiet=True)
    assert written == [3, 6]

    monkeypatch.undo()
    monkeypatch.setattr(loop, "monotonic", lambda: 1000.0 * next(quarters))
    train(run(tmp_path / "two", steps=8, **new()), quiet=True)
    assert not (tmp_path / "two" / "checkpoints").exists()


def test_a_signal_ends_the_run_after_the_step_with_a_checkpoint_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"loss": "sra", "steps": 6, "log_every": 3, "batch_tokens": 60, "packing": True, **new()}
    step = loop._Run._step

    def signalled(self: Any, number: int, batches: list[Batch]) -> Any:
        if number == 3:
            signal.raise_signal(signal.SIGTERM)
        return step(self, number, batches)

    with monkeypatch.context() as patch:
        patch.setattr(loop._Run, "_step", signalled)
        with pytest.raises(SystemExit) as caught:
            run_app("xkd-train", lambda **_: train(run(tmp_path / "a", **settings), quiet=True))
    assert caught.value.code == 143
    said = capsys.readouterr().err
    assert f"terminated. Kept: the checkpoint of step 4 of 6 in {tmp_path / 'a'}. Next: run the same command" in said

    assert train(run(tmp_path / "a", **settings), quiet=True).resumed_at == 4
    train(run(tmp_path / "b", **settings), quiet=True)
    assert_same_run(tmp_path / "a", tmp_path / "b")


def limit_memory(monkeypatch: pytest.MonkeyPatch, rows: int, error: BaseException) -> list[int]:
    """Memory runs out behind a backward pass of more rows; the micro-batches that went through, by their rows."""
    backward, done = loop._Run._backward, list[int]()

    def limited(self: Any, step: int, batch: Batch, *given: Any) -> Any:
        parts = backward(self, step, batch, *given)
        if len(batch.rows) > rows:
            raise error
        done.append(len(batch.rows))
        return parts

    monkeypatch.setattr(loop._Run, "_backward", limited)
    return done


def test_where_memory_runs_out_the_run_is_that_of_half_the_micro_batch_also_when_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"steps": 3, "save_every": 1, **new()}
    train(run(tmp_path / "half", micro_batch_size=3, **settings), quiet=True)
    capsys.readouterr()
    done = limit_memory(monkeypatch, 3, torch.OutOfMemoryError("CUDA out of memory"))
    looked = iter([(0, True), (signal.SIGINT, True)])
    with monkeypatch.context() as patch:
        patch.setattr(loop._Run, "_look_around", lambda *_: next(looked))
        with pytest.raises(KeyboardInterrupt):
            train(run(tmp_path / "full", **settings), quiet=True)
    assert train(run(tmp_path / "full", **settings), quiet=True).resumed_at == 2

    assert done == [3] * 6
    said = capsys.readouterr().err
    assert said.count("step 1: out of memory with micro-batches of 6 documents") == said.count("out of memory") == 1
    assert metrics(tmp_path / "full") == [{**line, "micro_batch_size": 3} for line in metrics(tmp_path / "half")]
    for name, tensor in weights(tmp_path / "half").items():
        assert torch.equal(weights(tmp_path / "full")[name], tensor), name


def test_a_run_that_goes_on_may_have_another_micro_batch_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped(run(tmp_path, steps=3, save_every=1, micro_batch_size=3), monkeypatch, 3)
    assert train(run(tmp_path, steps=3, save_every=1, micro_batch_size=2), quiet=True).resumed_at == 1


def test_where_one_document_does_not_fit_its_row_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit_memory(monkeypatch, 0, RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"))

    with pytest.raises(OutOfMemory, match=r"micro-batch of 1, cache rows \[\d+\]\. .*Next: add --gradient-ch"):
        train(run(tmp_path, steps=1), quiet=True)


@pytest.mark.parametrize(
    ("changed", "field"),
    [
        ({"lr": 1e-3}, "train.lr"), ({"steps": 9}, "steps"), ({}, "order"),
        ({"losses": {"sra": {"geo": 1.0}}}, "losses.sra"),
    ],
)  # fmt: skip
def test_other_settings_do_not_go_on_from_a_checkpoint(
    changed: dict[str, Any], field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fingerprint, "ORDER", fingerprint.ORDER if changed else "a later one")

    with pytest.raises(Mismatch, match=rf"{field}.*: checkpoint has .*, this run has .*Kept: the checkpoint"):
        train(run(eight_steps(), **{"loss": "sra", "steps": 8, "save_every": 2, **new(), **changed}), quiet=True)


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file() and path.name != "LOCK"
    }


def test_a_finished_run_is_not_done_twice() -> None:
    before = contents(eight_steps())

    trained = train(run(eight_steps(), loss="sra", steps=8, save_every=4, log_every=3, **new()), quiet=True)

    assert trained.resumed_at == trained.steps == 8
    assert contents(eight_steps()) == before


def test_a_run_stopped_while_saving_its_student_finishes_when_it_is_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(files, "digest", stop)  # all files are there, and not the mark of a finished student
        with pytest.raises(KeyboardInterrupt):
            train(run(tmp_path, steps=1), quiet=True)
    assert (tmp_path / "model.safetensors").exists()

    with pytest.raises(Mismatch, match="holds a student"):
        train(run(tmp_path, steps=2), quiet=True)
    assert train(run(tmp_path, steps=1), quiet=True).steps == 1
    assert not list(tmp_path.glob("*unfinished*"))
    before = contents(tmp_path)
    with pytest.raises(Mismatch, match=r"else: steps: student has 1, this run has 2; .*Next: choose another --out"):
        train(run(tmp_path, steps=2), quiet=True)
    assert contents(tmp_path) == before


def test_the_student_is_saved_in_the_dtype_it_came_in_unless_another_is_asked_for(tmp_path: Path) -> None:
    made = tiny.tiny_cache()
    begun = shutil.copytree(made.student, tmp_path / "begun")
    AutoModelForCausalLM.from_pretrained(begun, dtype=torch.bfloat16).save_pretrained(begun)
    auto, full = tmp_path / "auto", tmp_path / "full"

    command = ["--shards", made.cache, "--student", begun, "--steps", 2, "--save-every", 3, "--out"]
    assert xkd_train(*command, auto).out.endswith("; saved in bfloat16\n")
    assert "already trained for 2 steps" in xkd_train(*command, auto).out
    assert json.loads(xkd_train(*command, full, "--save-dtype", "fp32", "--json").out)["saved_in"] == "float32"
    state = load_newest(auto)[0]
    for name, tensor in weights(full).items():
        assert tensor.dtype == torch.float32
        assert torch.equal(weights(auto)[name], tensor.bfloat16())
        assert torch.equal(state.student[name], tensor)
    assert AutoModelForCausalLM.from_pretrained(auto).dtype == torch.bfloat16
    assert "bits_per_byte" in xkd_train("eval", auto, "--data", made.corpus, "--no-rouge", "--dtype", "float32").out


def test_a_signal_to_another_process_alone_exports_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop._Run, "_look_around", lambda *_: (signal.SIGINT, False))

    with pytest.raises(KeyboardInterrupt):
        train(run(tmp_path, steps=3), quiet=True)

    assert saved_step(tmp_path) == 1
    assert not (tmp_path / "model.safetensors").exists()


def change_batches(monkeypatch: pytest.MonkeyPatch, change: Callable[[Batch], Batch]) -> None:
    monkeypatch.setattr(batches, "batch_of", lambda *given: change(batch_of(*given)))


def test_terms_that_nothing_qualified_for_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    change_batches(monkeypatch, lambda batch: replace(batch, span_valid_BK=torch.zeros_like(batch.span_valid_BK)))
    train(run(tmp_path, loss="sra", steps=2, log_every=2), quiet=True)

    said = capsys.readouterr().err
    assert "step 2: nothing qualified for sra.cos, sra.geo, sra.kd, sra.spans since the last logged step" in said
    assert "ce.ce" not in said


def test_a_term_that_is_not_finite_stops_the_run_before_the_update(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nan_rows = Order(size=len(tiny.PAIRS), batch_size=6, seed=0).step(2).tolist()

    def spoil(batch: Batch) -> Batch:
        states = torch.full_like(unwrap(batch.teacher_hidden_BRD), math.nan)
        return replace(batch, teacher_hidden_BRD=states) if batch.rows == tuple(nan_rows) else batch

    change_batches(monkeypatch, spoil)
    updates: list[None] = []
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *_: updates.append(None))

    with pytest.raises(NonFinite) as caught:
        train(run(tmp_path, loss="ce+sra", steps=4, save_every=1), quiet=True)

    bad = r"step 3: (?!.*ce\.ce).*sra\.cos, .*gradient norm not finite on cache rows "
    assert re.fullmatch(bad + re.escape(str(nan_rows)) + ".*", str(caught.value))
    assert len(updates) == saved_step(tmp_path) == 2
    assert not (tmp_path / "model.safetensors").exists()
    assert [line["step"] for line in metrics(tmp_path)] == [1, 2]

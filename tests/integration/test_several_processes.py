"""Several processes on CPU train the student that one trains, and all end with one line when one cannot go on."""

import functools
import itertools
import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import tiny_models as tiny
from forked import Ended, launched
from one_step import gradients
from xkd_schemas.errors import BadData
from xkd_trainer.data import sampler as batches
from xkd_trainer.data.batch import Batch
from xkd_trainer.data.collate import batch_of
from xkd_trainer.data.sampler import Order
from xkd_trainer.training import loop
from xkd_trainer.training.files import load_newest
from xkd_trainer.training.prepare import Ready, set_up

BATCH = 23
"""Of 24 documents: every second step has one, and all processes but the first none."""
SETTINGS = {"loss": "mta+sra+dwa", "batch_size": BATCH, "lr": 1e-4, "projector_lr": 1e-4, "save_every": 2}
STEPS = 4


@functools.cache
def ready() -> Ready:
    """Student and losses, and kernels compiled by one batch; every process of a launch has its own by the fork."""
    made = set_up(tiny.tiny_cache().run(**SETTINGS), "", quiet=True)
    batch = batch_of(made.cache, [0, 1], made.wanted)
    gradients(made.distiller, [batch], made.distiller.counts(batch))
    made.distiller.zero_grad(set_to_none=True)
    return made


@functools.cache
def alone() -> Path:
    """The run of one process."""
    out = tiny.tiny_cache().root / "alone"
    (ended,) = launch(1, out)
    assert ended.code == 0, ended.err
    return out


def launch(world: int, out: Path, inside: Callable[[int], None] = lambda rank: None, **changed: Any) -> list[Ended]:
    given = {"shards": tiny.tiny_cache().cache, "student": tiny.tiny_cache().student, "out": out, "steps": STEPS}
    flags = {name.replace("_", "-"): value for name, value in {**given, **SETTINGS, **changed}.items()}
    words = [word for name, value in flags.items() for word in (f"--{name}", value)]
    ready()

    def prepare(rank: int) -> None:
        loop.set_up = lambda *_, **__: ready()
        inside(rank)

    return launched(world, out.parent / f"said by {out.name}", *words, "--set", "train.log_every=1", inside=prepare)


def lines(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def assert_as_alone(out: Path) -> None:
    for found, expected in zip(lines(out), lines(alone()), strict=True):
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-6)
    found, expected = (load_file(folder / "model.safetensors") for folder in (out, alone()))
    start = load_file(tiny.tiny_cache().student / "model.safetensors")
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=2e-5, msg=name)
    assert max(float((expected[name] - start[name]).abs().max()) for name in start) > 2e-4


def assert_one_line(ended: list[Ended], code: int, *words: str) -> None:
    """All end with the code; the first process says one line about it, the others nothing."""
    assert [process.code for process in ended] == [code] * len(ended), ended
    assert [process.err for process in ended[1:]] == [""] * (len(ended) - 1)
    said = [line for line in ended[0].err.splitlines() if line.startswith("xkd-train: ") and " elapsed" not in line]
    assert len(said) == 1, ended[0].err
    assert all(word in said[0] for word in words), said[0]
    assert "Traceback" not in ended[0].err


def at_batch(number: int, act: Callable[[Batch], Batch]) -> None:
    """The batch of that number that this process makes is what `act` makes of it."""
    made = itertools.count(1)
    batches.batch_of = lambda *given: act(batch_of(*given)) if next(made) == number else batch_of(*given)


def fail(error: Exception) -> Callable[[Batch], Batch]:
    def raise_it(_: Batch) -> Batch:
        raise error

    return raise_it


def before_steps(act: Callable[[int, list[Batch]], object]) -> None:
    """This process acts before each step, with its number and batches."""
    step = loop._Run._step

    def acted(self: Any, number: int, batches: list[Batch]) -> Any:
        act(number, batches)
        return step(self, number, batches)

    loop._Run._step = acted


def send(signum: int, *, rank: int, step: int) -> Callable[[int], None]:
    """A process sends itself a signal before a step."""
    return lambda mine: before_steps(lambda number, _: (mine, number) == (rank, step) and signal.raise_signal(signum))


def test_several_processes_train_the_student_of_one_and_the_first_alone_speaks_and_writes(tmp_path: Path) -> None:
    def watch(rank: int) -> None:
        if rank:
            loop.save = loop.export_student = loop.Records = loop.hold_lock = None  # would be called

    ended = launch(3, tmp_path / "out", watch, micro_batch_size=5)

    assert [process.code for process in ended] == [0] * 3, ended
    assert [(process.out, process.err) for process in ended[1:]] == [("", "")] * 2
    assert ended[0].out.count("trained for 4 steps") == ended[0].out.count("loss: ") == 1
    assert_as_alone(tmp_path / "out")


def test_a_killed_process_ends_the_others_and_another_number_of_them_goes_on_in_the_same_order(tmp_path: Path) -> None:
    out, rows = tmp_path / "out", tmp_path / "rows"

    ended = launch(2, out, send(signal.SIGKILL, rank=1, step=3))
    assert ended[1].code == -signal.SIGKILL
    assert_one_line(ended[:1], 69, "another process", "Kept: the checkpoint of step 2 of 4", "Next: run")

    def look_elsewhere(rank: int) -> None:
        loop.load_newest = (lambda _: (None, [])) if rank else load_newest

    said = (
        "process 1 finds the checkpoint of step 0",
        "another process a later one",
        "that all machines of the run share",
    )
    assert_one_line(launch(2, out, look_elsewhere), 78, *said)

    def note(number: int, batches: list[Batch]) -> None:
        with rows.open("a") as stream:
            stream.write(json.dumps([number, [r for b in batches if b.num_predictions for r in b.rows]]) + "\n")

    assert [process.code for process in launch(3, out, lambda _rank: before_steps(note))] == [0, 0, 0]
    assert_as_alone(out)
    order = Order(size=24, batch_size=BATCH, seed=0)
    seen = [json.loads(line) for line in rows.read_text().splitlines()]
    for number in (2, 3):
        assert sorted(row for n, part in seen if n == number for row in part) == sorted(order.step(number).tolist())


def test_a_damaged_shard_and_a_loss_that_is_not_finite_in_one_process_end_all(tmp_path: Path) -> None:
    def damage(rank: int) -> None:
        at_batch(2, fail(BadData("a shard is gone", kept="the rest"))) if rank else None

    assert_one_line(launch(2, tmp_path / "shard", damage), 65, "a shard is gone. Kept: the rest.")

    def crash(rank: int) -> None:
        at_batch(1, fail(ValueError("odd"))) if rank else None

    ended = launch(2, tmp_path / "bug", crash)
    assert "ValueError: odd" in ended[1].err
    assert_one_line(ended[:1], 69, "process 1 failed: ValueError('odd').")
    backward = loop._Run._backward

    def spoil(rank: int) -> None:
        def nan(*given: Any) -> Any:
            return {name: part / (1 - rank if name == "ce.ce" else 1) for name, part in backward(*given).items()}

        loop._Run._backward = nan

    second = Order(size=24, batch_size=BATCH, seed=0).share(0, 1, 2, 0)[0].tolist()
    assert_one_line(launch(2, tmp_path / "nan", spoil), 76, "step 1: ", f"not finite on cache rows {second[:8]}")


def test_a_signal_to_one_process_ends_all_after_the_same_step_with_143(tmp_path: Path) -> None:
    out = tmp_path / "out"
    ended = launch(2, out, send(signal.SIGUSR1, rank=1, step=0))
    assert_one_line(ended, 143, f"terminated. Kept: the checkpoint of step 1 of 4 in {out}")
    assert load_newest(out)[0].step == 1


def test_processes_agree_on_smaller_micro_batches_where_memory_runs_out_in_one(tmp_path: Path) -> None:
    backward = loop._Run._backward

    def fill(rank: int) -> None:
        def full(self: Any, number: int, batch: Batch, *given: Any) -> Any:
            if rank and number == 2 and len(batch.rows) > 4:
                torch.empty(2**50)
            return backward(self, number, batch, *given)

        loop._Run._backward = full

    ended = launch(2, tmp_path / "out", fill)

    assert [process.code for process in ended] == [0, 0]
    assert ended[0].err.count("out of memory") == 2, ended[0].err
    assert [line.pop("micro_batch_size", None) for line in lines(tmp_path / "out")] == [None, None, 3, 3]


def test_fsdp_trains_saves_goes_on_and_exports_the_whole_student(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One process begins, two with FSDP2 go on, and are stopped; three with DDP go on from what they have saved."""
    out = tmp_path / "out"
    alone()  # where no FSDP is asked for
    assert [process.code for process in launch(1, out, send(signal.SIGTERM, rank=0, step=0))] == [143]
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    monkeypatch.setenv("FSDP_AUTO_WRAP_POLICY", "TRANSFORMER_BASED_WRAP")
    assert_one_line(launch(1, out), 2, "FSDP is asked for with one process", "Next: accelerate launch --use_fsdp")
    ended = launch(2, out, send(signal.SIGTERM, rank=0, step=2))
    assert [process.code for process in ended] == [143, 143], ended[0].err[-3000:]
    shutil.copytree(out, tmp_path / "copy")
    ended = launch(2, out)
    assert [process.code for process in ended] == [0, 0], ended[0].err[-3000:]
    assert_as_alone(out)

    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    assert [process.code for process in launch(3, tmp_path / "copy")] == [0, 0, 0]
    assert_as_alone(tmp_path / "copy")

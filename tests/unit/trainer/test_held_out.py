"""Held-out rows while a student is trained: the training is the same, the best is kept, and no gain is the end."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import tiny_models as tiny
from tiny_run import run, stopped
from xkd_schemas.errors import BadData, InputMissing, Mismatch, UsageError
from xkd_train import xkd_train
from xkd_trainer.evaluation import Request, evaluate_student
from xkd_trainer.run_folder import read_lines
from xkd_trainer.training import held_out, loop
from xkd_trainer.training.loop import Trained, train

HELD = (("Who lit the lamp?", "A fisherman lit it."), ("Is it late?", "Yes."), ("", "Nobody knew."))


@pytest.fixture
def held(tmp_path: Path) -> dict[str, Any]:
    """Settings of runs that are evaluated: a fresh student with dropout."""
    return {
        "eval_data": str(tiny.corpus_file(tmp_path, HELD)),
        "student__model": "new:gpt2,layers=1,width=16,heads=2",
        "student__tokenizer": str(tiny.tiny_cache().student),
    }


def evaluations(out: Path) -> dict[int, float]:
    lines = read_lines(out / "metrics.jsonl")
    return {int(line["step"]): line["eval.bits_per_byte"] for line in lines if "eval.bits_per_byte" in line}


def pretend(monkeypatch: pytest.MonkeyPatch, *values: float) -> list[dict[str, torch.Tensor]]:
    """Evaluations find these bits per byte, in turn; the weights that each saw."""
    seen: list[dict[str, torch.Tensor]] = []

    def find(model: Any, _pairs: Any) -> dict[str, float]:
        assert not model.training
        seen.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return {"bytes": 9.0, "bits_per_byte": values[len(seen) - 1]}

    monkeypatch.setattr(held_out, "bits_per_byte", find)
    return seen


def assert_weights(out: Path, expected: dict[str, torch.Tensor]) -> None:
    found = load_file(out / "model.safetensors")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    assert not (out / "best").exists()


def test_evaluations_find_what_eval_finds_and_change_nothing_of_the_training(
    tmp_path: Path, held: dict[str, Any]
) -> None:
    made = tiny.tiny_cache()
    plain = {name: value for name, value in held.items() if name != "eval_data"}
    train(run(tmp_path / "plain", **plain), quiet=True)
    rows = {"eval_data": str(made.corpus), "eval_shards": str(made.cache), "load_best_at_end": False}
    trained = train(run(tmp_path / "seen", **plain, **rows, eval_every=3), quiet=True)

    assert list(evaluations(tmp_path / "seen")) == [3, 4]
    request = Request(student=tmp_path / "seen", data=made.corpus, shards=made.cache, rouge=False, dtype="float32")
    found = evaluate_student(request)
    for name in ("bits_per_byte", "bytes", "agreement", "agreement_pairs"):
        assert trained.evaluation[name] == pytest.approx(found[name], rel=1e-6)
    assert_weights(tmp_path / "seen", load_file(tmp_path / "plain/model.safetensors"))
    steps = [line for line in read_lines(tmp_path / "seen/metrics.jsonl") if "loss" in line]
    assert steps == read_lines(tmp_path / "plain/metrics.jsonl")
    fingerprint = json.loads((tmp_path / "plain/xkd.json").read_text())["run"]  # as of earlier releases
    assert not {"evaluation", "track", "patience", "eval_every"} & {*fingerprint, *fingerprint["train"]}


@pytest.mark.parametrize("best", [True, False])
def test_the_exported_student_is_that_of_the_best_evaluation_unless_the_last_is_asked_for(
    tmp_path: Path, held: dict[str, Any], monkeypatch: pytest.MonkeyPatch, best: bool
) -> None:
    seen = pretend(monkeypatch, 3.0, 2.0, 2.5, 4.0)

    trained = train(run(tmp_path, eval_every=1, load_best_at_end=best, **held), quiet=True)

    assert_weights(tmp_path, seen[1 if best else 3])
    expected = (2, 2.0) if best else (4, 4.0)
    assert (trained.evaluation["step"], trained.evaluation["bits_per_byte"]) == expected


def test_a_run_that_improves_no_more_stops_and_a_resumed_one_stops_at_the_same_step(
    tmp_path: Path, held: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"steps": 9, "eval_every": 1, "patience": 2, "save_every": 3, "log_every": 4, **held}
    values = (3.0, 2.0, 2.0, 1.5, 1.7, 1.5, 1.0)  # as good as the best is no better

    def ended(out: Path) -> Trained:
        return train(run(out, **settings), quiet=True)

    with monkeypatch.context() as patch:
        seen = pretend(patch, *values)
        whole = ended(tmp_path / "whole")
    with monkeypatch.context() as patch:
        pretend(patch, *values)
        stopped(run(tmp_path / "two", **settings), patch, 4)
    monkeypatch.setattr(held_out, "bits_per_byte", None)  # nothing is measured again
    again = ended(tmp_path / "whole")
    pretend(monkeypatch, *values[3:])
    resumed = ended(tmp_path / "two")

    assert (whole.steps, resumed.steps, resumed.resumed_at, again.resumed_at, again.steps) == (6, 6, 3, 6, 6)
    assert whole.evaluation["step"] == again.evaluation["step"] == 4
    logged = [line["step"] for line in read_lines(tmp_path / "whole/metrics.jsonl") if "loss" in line]
    assert logged == [4, 6], "the last stretch is logged, too"
    for out in ("whole", "two"):
        assert_weights(tmp_path / out, seen[3])
    assert (tmp_path / "two/metrics.jsonl").read_bytes() == (tmp_path / "whole/metrics.jsonl").read_bytes()


def test_a_run_stopped_while_it_exports_its_best_student_trains_no_further_when_it_is_run_again(
    tmp_path: Path, held: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    settings = {"steps": 9, "eval_every": 1, "patience": 1, "save_every": 1, **held}
    with monkeypatch.context() as patch:
        seen = pretend(patch, 2.0, 3.0)
        patch.setattr(loop, "export_student", stop)
        with pytest.raises(KeyboardInterrupt):
            train(run(tmp_path / "out", **settings), quiet=True)

    trained = train(run(tmp_path / "out", **settings), quiet=True)

    assert (trained.resumed_at, trained.steps, trained.evaluation["step"]) == (2, 2, 1)
    assert_weights(tmp_path / "out", seen[0])


@pytest.mark.parametrize("damage", ["gone", "damaged"])
def test_a_best_student_that_vanished_is_one_line_and_the_last_can_still_be_had(
    tmp_path: Path, held: dict[str, Any], monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    settings = {"eval_every": 1, "save_every": 2, **held}
    with monkeypatch.context() as patch:
        pretend(patch, 3.0, 2.0, 4.0)
        stopped(run(tmp_path / "out", **settings), patch, 3)
    (left,) = (tmp_path / "out/best").iterdir()
    left.unlink() if damage == "gone" else left.write_bytes(left.read_bytes()[:-1] + b"?")

    seen = pretend(monkeypatch, 4.0, 5.0)
    kept = f"Kept: the checkpoint of step 4 of 4 in {tmp_path / 'out'}. Next: .* --load-best-at-end false"
    with pytest.raises(
        InputMissing, match=f"step-00000002.safetensors, the best student of this run, is {damage}.*{kept}"
    ):
        train(run(tmp_path / "out", **settings), quiet=True)
    assert train(run(tmp_path / "out", **settings, load_best_at_end=False), quiet=True).resumed_at == 4
    assert_weights(tmp_path / "out", seen[1])


def test_weights_are_kept_for_the_best_and_for_the_newest_checkpoint_alone(
    tmp_path: Path, held: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, 6.0, 5.0, 4.0, 3.0, 2.0)

    stopped(run(tmp_path / "out", steps=9, eval_every=1, save_every=3, **held), monkeypatch, 5)

    assert sorted(p.name[-13:] for p in (tmp_path / "out/best").iterdir()) == ["3.safetensors", "5.safetensors"]


def test_held_out_rows_that_cannot_be_used_are_refused_before_a_step_and_other_rows_do_not_resume(
    tmp_path: Path, held: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty.jsonl").write_text('{"prompt": "Why?", "response": ""}\n')
    for changed, error in (
        ({"eval_data": str(tmp_path / "empty.jsonl")}, BadData), ({"eval_data": "nowhere.jsonl"}, InputMissing),
        ({"eval_shards": str(tiny.tiny_cache().cache)}, Mismatch),
    ):  # fmt: skip
        with pytest.raises(error, match=r"no row can be used|nowhere|2 of 3 held-out documents are not in"):
            train(run(tmp_path / "out", **{**held, **changed}), quiet=True)
    assert not (tmp_path / "out").exists()

    stopped(run(tmp_path / "out", save_every=1, **held), monkeypatch, 3)
    (tmp_path / "other").mkdir()
    other = {**held, "eval_data": str(tiny.corpus_file(tmp_path / "other", HELD[:2]))}
    with pytest.raises(Mismatch, match=r"evaluation\.documents"):
        train(run(tmp_path / "out", save_every=1, **other), quiet=True)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"patience": 2, "eval_data": "x"}, "--patience 2 without --eval-every. Next: add --eval-every"),
        ({"eval_every": 5}, "--eval-every 5 without --eval-data"), ({"eval_shards": "c"}, "c without --eval-data"),
    ],
)  # fmt: skip
def test_what_needs_evaluations_is_refused_without_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], said: str
) -> None:
    monkeypatch.setattr(loop, "set_up", None)
    with pytest.raises(UsageError, match=said):
        train(tiny.Tiny(tmp_path).run(out=str(tmp_path / "out"), **settings), quiet=True)


def test_the_command_says_how_good_the_student_is_and_when(tmp_path: Path, held: dict[str, Any]) -> None:
    made = tiny.tiny_cache()
    command = ["--shards", made.cache, "--student", made.student, "--out", tmp_path / "out", "--steps", 2]

    said = xkd_train(*command, "--eval-data", held["eval_data"], "--eval-every", 1)

    best = min(evaluations(tmp_path / "out").items(), key=lambda pair: pair[1])
    assert f"; step {best[0]}, {best[1]:.4f} bits per byte" in said.out

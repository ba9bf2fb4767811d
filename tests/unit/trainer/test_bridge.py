"""XKD's losses in other people's training: one step is xkd-train's, whatever class runs it and however it is cut."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, TrainingArguments

import tiny_models as tiny
from xkd_schemas.errors import Mismatch, UsageError
from xkd_trainer import CacheDataset, Collator, DistillTrainer, train
from xkd_trainer.bridge import PROJECTORS, DistillMixin

ALL = "mta+sra+dwa"


def student() -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny.tiny_cache().student, dtype=torch.float32)


def options(out: Path, **changed: Any) -> dict[str, Any]:
    """Those of `tiny.run` in the words of transformers; the first step of xkd-train has the whole rate."""
    return {
        "output_dir": str(out), "per_device_train_batch_size": 6, "max_steps": 1, "learning_rate": 5e-4,
        "weight_decay": 0.01, "lr_scheduler_type": "constant", "seed": 0, "report_to": "none", "use_cpu": True,
        "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True, **changed,
    }  # fmt: skip


def trainer(out: Path, *, losses: str = ALL, model: Any = None, **changed: Any) -> DistillTrainer:
    args = TrainingArguments(**options(out, **changed))
    return DistillTrainer(model or student(), args, cache=str(tiny.tiny_cache().cache), losses=losses)


def xkd_step(out: Path, **changed: Any) -> dict[str, Tensor]:
    """Weights after one step of xkd-train, from its finished student."""
    train(tiny.tiny_cache().run(out=str(out), loss=ALL, **{"steps": 1, **changed}), quiet=True)
    return load_file(out / "model.safetensors")


def assert_same_weights(model: Any, expected: dict[str, Tensor]) -> None:
    found = model.state_dict()
    start = student().state_dict()
    assert max(float((start[n] - w).abs().max()) for n, w in expected.items()) > 1e-4
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=0, atol=1e-6, msg=name)


def metrics(out: Path) -> dict[str, float]:
    return dict(json.loads((out / "metrics.jsonl").read_text().splitlines()[0]))


@pytest.mark.parametrize(("accumulation", "steps"), [(1, 1), (2, 5)])  # an epoch has 4
def test_steps_of_the_trainer_are_those_of_xkd_train(tmp_path: Path, accumulation: int, steps: int) -> None:
    cut = {"per_device_train_batch_size": 6 // accumulation, "gradient_accumulation_steps": accumulation}
    expected = xkd_step(tmp_path / "xkd", micro_batch_size=6 // accumulation, steps=steps, min_lr_ratio=1.0)

    mine = trainer(tmp_path / "hf", **cut, max_steps=steps)
    mine.train()

    assert_same_weights(mine.student, expected)
    logged, theirs = mine.state.log_history[0], metrics(tmp_path / "xkd")
    terms = [name for name in theirs if "." in name and not name.endswith(".count")]
    assert len(terms) > 5
    assert {n: logged[n] for n in ("loss", "grad_norm", *terms)} == pytest.approx(
        {n: theirs[n] for n in ("loss", "grad_norm", *terms)}, rel=1e-5
    )


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing. is deprecated:FutureWarning")  # of trl
def test_a_step_of_trls_trainer_is_one_of_xkd_train(tmp_path: Path) -> None:
    from trl import SFTConfig, SFTTrainer

    class DistillSFTTrainer(DistillMixin, SFTTrainer):  # type: ignore[misc]
        pass

    cut = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2}
    expected = xkd_step(tmp_path / "xkd", micro_batch_size=3)

    args = SFTConfig(**options(tmp_path / "trl", bf16=False, gradient_checkpointing=True, **cut))
    mine = DistillSFTTrainer(str(tiny.tiny_cache().student), args, cache=str(tiny.tiny_cache().cache), losses=ALL)
    mine.train()

    assert_same_weights(mine.student, expected)


def test_a_training_goes_on_from_its_checkpoint_with_projectors_and_order(tmp_path: Path) -> None:
    several = {"max_steps": 6, "save_strategy": "steps", "save_steps": 5}  # an epoch has 4
    whole = trainer(tmp_path / "one", **several, max_grad_norm=0.5)
    whole.train()
    shutil.copytree(tmp_path / "one" / "checkpoint-5", tmp_path / "two" / "checkpoint-5")

    resumed = trainer(tmp_path / "two", **several, max_grad_norm=0.5)
    resumed.train(resume_from_checkpoint=True)

    ours, theirs = whole.distiller.state_dict(), resumed.distiller.state_dict()
    assert any(name.startswith("losses.") for name in ours)
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    with pytest.raises(Mismatch, match=r"checkpoint-6 is of another training: loss mta\+sra\+dwa, now sra"):
        trainer(tmp_path / "two", losses="sra", **several).train(resume_from_checkpoint=True)


def in_two_processes(*words: Path | str) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    program = [sys.executable, str(Path(__file__).parents[2] / "programs" / "two_trainers.py"), *map(str, words)]
    started = [
        subprocess.Popen(program, env={**os.environ, **common, "RANK": rank, "LOCAL_RANK": rank}, text=True,
                         stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        for rank in "01"
    ]  # fmt: skip
    for process in started:
        _, error = process.communicate(timeout=400)
        assert process.returncode == 0, error


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_processes_train_what_one_trains_and_go_on_inside_an_epoch(tmp_path: Path) -> None:
    expected = xkd_step(tmp_path / "xkd", steps=6, min_lr_ratio=1.0)
    where = (tiny.tiny_cache().cache, tiny.tiny_cache().student)
    in_two_processes(*where, tmp_path / "one")
    found = load_file(tmp_path / "one" / "model.safetensors")

    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=0, atol=1e-5, msg=name)
    shutil.copytree(tmp_path / "one" / "checkpoint-5", tmp_path / "two" / "checkpoint-5")
    in_two_processes(*where, tmp_path / "two", "resume")
    again = load_file(tmp_path / "two" / "model.safetensors")
    assert all(torch.equal(again[name], weight) for name, weight in found.items())


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # of peft
def test_a_peft_model_is_trained_and_saved_as_its_adapter(tmp_path: Path) -> None:
    lora = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    mine = trainer(tmp_path, model=get_peft_model(student(), lora), learning_rate=1e-2)
    frozen = {n: p.clone() for n, p in mine.student.named_parameters() if not p.requires_grad}
    mine.train()
    mine.save_model()

    again = PeftModel.from_pretrained(student(), tmp_path)
    found, learnt = again.state_dict(), mine.student.state_dict()
    assert all(torch.equal(learnt[name], value) for name, value in frozen.items())
    assert all(torch.equal(found[name], value) for name, value in learnt.items())
    assert any(value.abs().sum() > 0 for name, value in found.items() if "lora_B" in name)
    assert load_file(tmp_path / PROJECTORS).keys() == mine.distiller.losses.state_dict().keys()

    other = get_peft_model(student(), LoraConfig(r=2, target_modules=["embed_tokens"], ensure_weight_tying=True))
    with pytest.raises(UsageError, match="this peft model has an adapter on the "):
        trainer(tmp_path, model=other)


def test_held_out_documents_have_the_loss_of_their_batch(tmp_path: Path) -> None:
    mine = trainer(tmp_path, losses="sra")
    mine.eval_dataset = mine.train_dataset
    mine.args.per_device_eval_batch_size = 24

    batch = Collator()([mine.train_dataset[n] for n in range(len(mine.train_dataset))])
    with torch.no_grad():
        expected, _ = mine.distiller.eval()(batch)
    assert mine.evaluate()["eval_loss"] == pytest.approx(float(expected), rel=1e-5)


def test_a_bare_loop_reads_the_cache_in_other_processes_and_as_often_as_its_weight_says() -> None:
    cache, tokenizer = tiny.tiny_cache().cache, tiny.tiny_cache().student
    data = CacheDataset(f"{cache}=0.5", tokenizer, "sra", settings={"sra": {"kd": "mean"}})
    order = data.sampler()
    first = list(order)
    order.set_epoch(1)

    assert (len(data), len(order), len(first)) == (24, 12, 12)
    assert sorted(first) != sorted(order)
    loader = DataLoader(data, batch_size=4, sampler=order, collate_fn=Collator(), num_workers=1)
    batch = next(iter(loader))
    assert batch.rows == tuple(int(data.cache.usable[place]) for place in list(order)[:4])
    loss, terms = data.distiller(student())(batch)
    assert loss.requires_grad
    assert {"ce.ce", "sra.kd"} <= terms.keys()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"train_dataset": [1]}, "train_dataset does not go together with a cache"),
        ({"optimizers": (torch.optim.SGD, None)}, "optimizers does not go together with a cache"),
    ],
)
def test_an_option_that_would_change_the_loss_is_refused(tmp_path: Path, changed: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        DistillTrainer(student(), TrainingArguments(**options(tmp_path)), cache="cache", **changed)


def test_a_student_made_here_needs_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="this student says no tokenizer"):
        trainer(tmp_path, model=tiny.llama("sentencepiece"))

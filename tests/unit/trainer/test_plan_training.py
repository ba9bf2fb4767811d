"""`xkd-train plan`: the same sizes as the student, gradients and optimizer of a run have, and nothing loaded."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import one_tokenizer as one
import tiny_models as tiny
from xkd_schemas.errors import UsageError
from xkd_train import xkd_train
from xkd_trainer.data.cache import Cache
from xkd_trainer.data.collate import batch_of
from xkd_trainer.losses.registry import LOSSES
from xkd_trainer.models import loading
from xkd_trainer.models.architecture import backbone
from xkd_trainer.training import plan
from xkd_trainer.training.distiller import make_optimizer
from xkd_trainer.training.plan import plan_training
from xkd_trainer.training.prepare import set_up


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"lora": {"rank": 4}},
        {"optimizer": "adafactor", "student__dtype": "bfloat16"},
        {"gradient_checkpointing": True, "micro_batch_size": 2},
        {"student__model": "new:gpt2,layers=2,width=32,heads=2"},
    ],
)
def test_planned_sizes_are_those_of_the_run(changed: dict[str, Any]) -> None:
    run = tiny.tiny_cache().run(**{"loss": "sra", "student__tokenizer": str(tiny.tiny_cache().student), **changed})

    planned = plan_training(run)

    ready = set_up(run, "")
    distiller = ready.distiller.train()
    assert planned["parameters"] == sum(p.numel() for p in distiller.student.parameters())
    assert planned["trained"] == sum(p.numel() for p in distiller.student.parameters() if p.requires_grad)
    assert planned["projectors"] == sum(p.numel() for p in distiller.losses.parameters())
    batch = batch_of(ready.cache, [3, 19], ready.wanted)
    distiller(batch, distiller.counts(batch), 0)[0].backward()
    optimizer = make_optimizer(run.train.optimizer, distiller.parameter_groups(lr=1e-3, weight_decay=0.0))
    optimizer.step()
    sizes = planned["bytes"]
    assert sizes["weights"] == sum(p.numel() * p.itemsize for p in distiller.parameters())
    assert sizes["gradients"] == sum(p.grad.numel() * p.itemsize for p in distiller.parameters() if p.grad is not None)
    state = (t for kept in optimizer.state.values() for name, t in kept.items() if name != "step")
    assert sizes["optimizer"] == sum(t.numel() * t.itemsize for t in state)
    assert sizes["activations"] == kept_by(distiller.student, planned["documents"], planned["tokens"])
    assert planned["documents"] == (run.train.micro_batch_size or run.train.batch_size)
    assert planned["tokens"] == max(len(ready.cache.students[row]["token_ids"]) for row in ready.cache.usable)


def kept_by(student: Any, documents: int, tokens: int) -> int:
    """Bytes that a real forward pass keeps, but for parameters, and its last states in float32."""
    own, kept = {p.data_ptr() for p in student.parameters()}, dict[int, torch.Tensor]()

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        ids_BL = torch.zeros(documents, tokens, dtype=torch.int64)
        states_BLD = backbone(student)(input_ids=ids_BL, use_cache=False).last_hidden_state
    return sum(t.untyped_storage().nbytes() for t in kept.values()) + 4 * states_BLD.numel()


def test_no_more_documents_are_planned_than_a_cache_has_or_a_budget_of_tokens_holds() -> None:
    usable = len(Cache(tiny.tiny_cache().cache, student="student").usable)

    for changed, documents in (({"batch_size": 999}, usable), ({"batch_tokens": 100}, 2)):
        assert plan_training(tiny.tiny_cache().run(**changed))["documents"] == documents


def test_a_cache_without_a_document_for_the_student_is_refused_by_plan_and_training(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Cache, "usable", np.zeros(0, np.int64))

    for command in (plan_training, lambda run: set_up(run, "")):
        with pytest.raises(UsageError, match=r"no usable document .* Next: xkd-cache show .* says why"):
            command(tiny.tiny_cache().run())


def test_every_loss_can_be_planned() -> None:
    cache, student = str(one.cache()), one.student(one.SAME)
    run = tiny.tiny_cache().run(cache=cache, loss="+".join(LOSSES), student__model=student, student__name=one.SAME)

    planned = plan_training(run, one.SAME)

    assert planned["total"] == sum(planned["bytes"].values()) > planned["bytes"]["process"]


def test_the_command_prints_each_part_loads_no_weight_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a weight was read")

    made, out = tiny.tiny_cache(), tmp_path / "out"
    monkeypatch.setattr(loading.AutoModelForCausalLM, "from_pretrained", refuse)
    monkeypatch.setattr(plan.Cache, "_tensors", refuse)
    command = ["plan", "--shards", made.cache, "--student", made.student, "--loss", "dwa", "--out", out]

    text, listed = xkd_train(*command), json.loads(xkd_train(*command, "--lora-rank", 2, "--json").out)

    assert text.code == 0
    assert text.out.splitlines()[0].startswith("parameters: ")
    assert text.out.splitlines()[-1].startswith("peak of one process, an estimate: ")
    assert listed["trained"] < listed["parameters"]
    assert listed["bytes"]["teacher's head and embeddings"] > 0
    assert not out.exists()
    assert "settings of LoRA are given without its rank" in xkd_train(*command, "--lora-alpha", 2).err

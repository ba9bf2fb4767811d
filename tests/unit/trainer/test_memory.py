"""Precision and memory: dtypes of weights, checkpointed and compiled blocks, optimizers by name; what is refused."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

import tiny_models as tiny
from one_step import gradients
from xkd_schemas.config import RunConfig
from xkd_schemas.errors import BadData, UsageError
from xkd_trainer.data import sampler as batches
from xkd_trainer.data.collate import batch_of
from xkd_trainer.models import forward
from xkd_trainer.training import files
from xkd_trainer.training.distiller import OPTIMIZERS, Distiller, make_optimizer
from xkd_trainer.training.files import load_newest
from xkd_trainer.training.loop import train
from xkd_trainer.training.prepare import set_up

READS = "mta+sra"  # inner states, attention rows, and every position


@pytest.fixture(autouse=True)
def _accelerate_starts_anew() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def slopes(**changed: Any) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of one batch, in training mode."""
    ready = set_up(tiny.tiny_cache().run(**{"loss": READS, **changed}), "")
    ready.distiller.train()
    batch = batch_of(ready.cache, [3, 19, 0, 11], ready.wanted)
    return gradients(ready.distiller, [batch], ready.distiller.counts(batch))


@pytest.mark.parametrize("changed", [{}, {"lora": {"rank": 4}}, {"student__model": "gpt2"}])
def test_checkpointed_blocks_run_twice_and_give_the_same_gradient(
    changed: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    if "student__model" in changed:
        changed = {"student__model": "new:gpt2,layers=2,width=16,heads=2,attn_pdrop=0,embd_pdrop=0,resid_pdrop=0"}
        changed["student__tokenizer"] = str(tiny.tiny_cache().student)
    plain, expected = slopes(**changed)
    calls: list[str] = []
    product = torch.nn.functional.scaled_dot_product_attention

    def counted(*given: Any, **options: Any) -> Any:
        calls.append("")
        return product(*given, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    slopes(**changed)
    once = len(calls)

    total, found = slopes(gradient_checkpointing=True, **changed)

    assert len(calls) - once == once + 2  # both blocks once more
    assert total == pytest.approx(plain, abs=1e-6)
    for name, slope in expected.items():
        torch.testing.assert_close(found[name], slope, rtol=1e-6, atol=1e-6, msg=name)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch's own, while it looks at what it compiles
def test_compiled_blocks_show_the_same_states_rows_and_gradient_and_serve_batches_of_all_sizes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    graphs = []

    def backend(graph: Any, _inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    def look(model: Any, lengths: tuple[int, ...]) -> list[torch.Tensor]:
        ids_BL, valid_BL = tiny.ids_and_valid(lengths, 200)
        states = forward.run(model, ids_BL, valid_BL, layers=[1, 2], attention=True, attention_layers=[1])
        model.zero_grad()
        (states.layers[1] * states.last_BLD).sum().backward()
        rows = [states.attention_layers[layer] for layer in (1, 2)]
        return [states.layers[1].detach(), states.last_BLD.detach(), *rows, model.model.embed_tokens.weight.grad]

    monkeypatch.setattr(forward, "BACKEND", backend)
    model = tiny.llama(tiny.STUDENT_TOKENIZER).train()
    sizes = (9, 5), (12, 7, 4)
    expected = [look(model, lengths) for lengths in sizes]
    forward.compile_blocks(model)

    for lengths, plain in zip(sizes, expected, strict=True):
        torch.testing.assert_close(look(model, lengths), plain, rtol=1e-5, atol=1e-5)
        assert len(graphs) == 2  # one a block


def test_a_run_compiles_its_student_when_it_is_told_to(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[Any] = []
    monkeypatch.setattr(torch, "compile", lambda function, **_: compiled.append(function) or function)
    set_up(tiny.tiny_cache().run(), "")
    assert compiled == []
    set_up(tiny.tiny_cache().run(compile=True), "")
    assert len(compiled) == 2


def test_a_bfloat16_student_learns_in_bfloat16_and_its_losses_compute_in_float32(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[torch.dtype] = []
    losses = Distiller._losses

    def look(self: Any, batch: Any, passed: Any, *given: Any) -> Any:
        seen.extend((passed.states.last_BLD.dtype, passed.head.weight_VD.dtype))
        return losses(self, batch, passed, *given)

    whole, _ = slopes(loss="mta+sra+dwa")
    monkeypatch.setattr(Distiller, "_losses", look)
    half, found = slopes(loss="mta+sra+dwa", student__dtype="bfloat16")

    assert seen == [torch.float32, torch.float32]
    assert {slope.dtype for name, slope in found.items() if name.startswith("student.")} == {torch.bfloat16}
    assert {slope.dtype for name, slope in found.items() if name.startswith("losses.")} == {torch.float32}
    assert half == pytest.approx(whole, rel=0.02)
    assert half != whole


STATE_OF_EIGHT_ROWS = {"adamw": 2 * 8 * 4 + 1, "adamw_fused": 2 * 8 * 4 + 1, "adafactor": 8 + 4 + 1}


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "adamw_8bit"])
def test_every_optimizer_holds_what_is_said_of_it_and_resumes_bit_for_bit(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    matrix = torch.nn.Parameter(torch.ones(8, 4))
    optimizer = make_optimizer(name, [{"params": [matrix], "lr": 0.1, "weight_decay": 0.0}])
    matrix.sum().backward()
    optimizer.step()
    assert sum(t.numel() for t in optimizer.state[matrix].values()) == STATE_OF_EIGHT_ROWS[name]

    def run(out: str) -> RunConfig:
        made = tiny.tiny_cache()
        return made.run(out=str(tmp_path / out), loss="sra", optimizer=name, student__dtype="bfloat16", save_every=2)

    train(run("whole"), quiet=True)
    made = itertools.chain([batch_of] * 3, itertools.repeat(None))
    with monkeypatch.context() as patch:
        patch.setattr(batches, "batch_of", lambda *given: (next(made) or _fail)(*given))
        with pytest.raises(BadData, match="a shard is gone"):
            train(run("stopped"), quiet=True)
    assert train(run("stopped"), quiet=True).resumed_at == 2

    one, two = (load_file(tmp_path / out / "model.safetensors") for out in ("whole", "stopped"))
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert (tmp_path / "whole/metrics.jsonl").read_bytes() == (tmp_path / "stopped/metrics.jsonl").read_bytes()


def _fail(*_: Any) -> Any:
    raise BadData("a shard is gone")


def test_numbers_that_an_optimizer_keeps_outside_of_tensors_come_back_from_a_checkpoint(tmp_path: Path) -> None:
    state = {0: {"step": 7, "rms": 0.1 + 0.2, "exp_avg": torch.ones(2)}, 1: {"step": 9}}
    snapshot = files.Snapshot(
        step=1, student={"w": torch.ones(1)}, projectors={}, optimizer={"state": state, "param_groups": []},
        fingerprint={},
    )  # fmt: skip

    files.save(tmp_path, snapshot)

    read = load_newest(tmp_path)[0]
    assert read is not None
    found = read.optimizer["state"]
    assert torch.equal(found[0].pop("exp_avg"), torch.ones(2))
    assert found == {0: {"step": 7, "rms": 0.1 + 0.2}, 1: {"step": 9}}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"optimizer": "adamw_8bit"}, "adamw_8bit needs bitsandbytes, which is not installed here. Next: pip install"),
        ({"student__quantization": "4bit", "lora": {"rank": 2}}, "4bit needs bitsandbytes and a GPU"),
        ({"student__quantization": "4bit"}, "weights of four bits cannot learn by themselves. Next: --lora-rank"),
        (
            {"student__dtype": "bfloat16", "mixed_precision": "bf16"},
            "the weights that learn stay float32, and student.dtype is bfloat16. Next: leave out",
        ),
        (
            {"student__model": "new:mamba,layers=2,width=16", "gradient_checkpointing": True, "loss": "none"},
            "cannot be trained with gradient checkpointing",
        ),
    ],
)
def test_what_this_machine_or_student_cannot_is_one_line(
    changed: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if changed.pop("loss", ""):
        monkeypatch.setattr("transformers.MambaForCausalLM.supports_gradient_checkpointing", False)
    changed["student__tokenizer"] = str(tiny.tiny_cache().student)
    with pytest.raises(UsageError) as caught:
        train(tiny.tiny_cache().run(out=str(tmp_path / "out"), **changed), quiet=True)

    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "out").glob("*model*"))

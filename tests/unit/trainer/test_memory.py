"""Precision and memory: dtypes of weights, checkpointed and compiled blocks, optimizers by name, and LoRA."""

import importlib.util
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import tiny_models as tiny
from one_step import gradients
from tiny_run import assert_same_run, run, stopped
from xkd_schemas.errors import Mismatch, UsageError
from xkd_train import xkd_train
from xkd_trainer.data.collate import batch_of
from xkd_trainer.models import forward
from xkd_trainer.models.lora import load_student, trained
from xkd_trainer.training import files
from xkd_trainer.training.distiller import Distiller, make_optimizer
from xkd_trainer.training.files import load_newest
from xkd_trainer.training.loop import train
from xkd_trainer.training.prepare import Ready, set_up

READS = "mta+sra"  # inner states, attention rows, and every position


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


STATE_OF_EIGHT_ROWS = {"adamw_fused": 2 * 8 * 4 + 1, "adafactor": 8 + 4 + 1}


@pytest.mark.parametrize("name", ["adamw_fused", "adafactor"])
def test_an_optimizer_holds_what_is_said_of_it_and_resumes_bit_for_bit(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    matrix = torch.nn.Parameter(torch.ones(8, 4))
    optimizer = make_optimizer(name, [{"params": [matrix], "lr": 0.1, "weight_decay": 0.0}])
    matrix.sum().backward()
    optimizer.step()
    assert sum(t.numel() for t in optimizer.state[matrix].values()) == STATE_OF_EIGHT_ROWS[name]

    whole, half = (
        run(tmp_path / out, loss="sra", optimizer=name, student__dtype="bfloat16", save_every=2)
        for out in ("whole", "stopped")
    )
    train(whole, quiet=True)
    stopped(half, monkeypatch, 3)
    assert train(half, quiet=True).resumed_at == 2

    assert_same_run(tmp_path / "whole", tmp_path / "stopped")


def test_numbers_that_an_optimizer_keeps_outside_of_tensors_come_back_from_a_checkpoint(tmp_path: Path) -> None:
    state = {0: {"step": 7, "rms": 0.1 + 0.2, "exp_avg": torch.ones(2)}, 1: {"step": 9}}
    snapshot = files.Snapshot(
        step=1, student={"w": torch.ones(1)}, projectors={}, optimizer={"state": state, "param_groups": []},
        fingerprint={},
    )  # fmt: skip

    files.save(tmp_path, snapshot)

    read = load_newest(tmp_path)[0]
    found = read.optimizer["state"]
    assert torch.equal(found[0].pop("exp_avg"), torch.ones(2))
    assert found == {0: {"step": 7, "rms": 0.1 + 0.2}, 1: {"step": 9}}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"optimizer": "adamw_8bit"}, "adamw_8bit needs bitsandbytes, which is not installed here. Next: pip install"),
        ({"student__quantization": "4bit", "lora": {"rank": 2}}, "4bit needs bitsandbytes and a GPU"),
        ({"student__quantization": "4bit"}, "weights of four bits cannot learn by themselves. Next: --lora-rank"),
        ({"student__dtype": "bfloat16", "mixed_precision": "bf16"},
         "the weights that learn stay float32, and student.dtype is bfloat16. Next: leave out"),
        ({"student__model": "new:mamba,layers=2,width=16", "gradient_checkpointing": True},
         "cannot be trained with gradient checkpointing"),
        ({"lora": {"rank": 2}, "student__model": "new:llama"}, "new:llama is a new one. Next: leave out --lora-rank"),
        ({"lora": {"target": ["q_proj"]}}, "settings of LoRA are given without its rank. Next: --lora-rank 16"),
        ({"lora": {"rank": 2, "target": ["c_attn"]}}, "use all-linear, or of down_proj, gate_proj, k_proj"),
        ({"lora": {"rank": 2, "target": ["lm_head"]}}, "--lora-target lm_head: student "),
        ({"lora": {"rank": 2}}, "LoRA needs peft, which is not installed here. Next: pip install 'xkd-toolkit[lora]'"),
    ],
)  # fmt: skip
def test_what_this_machine_or_student_cannot_is_one_line(
    changed: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    if "needs peft" in message:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "peft" else find(name))
    monkeypatch.setattr("transformers.MambaForCausalLM.supports_gradient_checkpointing", False)
    changed = {"student__tokenizer": str(tiny.tiny_cache().student), **changed}
    with pytest.raises(UsageError, match=re.escape(message)):
        train(tiny.tiny_cache().run(out=str(tmp_path / "out"), **changed), quiet=True)

    assert not list((tmp_path / "out").glob("*model*"))


# LoRA: the adapter's gradient, its checkpoints and folder, the merged student, and what is refused


ALL = "mta+sra+dwa"


def adapted(loss: str = ALL, **lora: Any) -> Ready:
    """The tiny cache's student with an adapter that is not zero."""
    ready = set_up(tiny.tiny_cache().run(loss=loss, lora={"rank": 16, "alpha": 24.0, **lora}), "")
    generator = torch.Generator().manual_seed(0)
    for name, parameter in trained(ready.distiller.student).items():
        if "lora_B" in name:
            parameter.data = 0.05 * torch.randn(parameter.shape, generator=generator)
    return ready


def test_an_adapter_of_full_rank_gives_the_whole_gradient_projected_on_it() -> None:
    ready, scale = adapted(), 24.0 / 16
    whole = set_up(tiny.tiny_cache().run(loss=ALL), "").distiller
    batch = batch_of(ready.cache, [3, 19, 0, 11], ready.wanted)
    counts = whole.counts(batch)
    parts = {name: p.detach() for name, p in trained(ready.distiller.student).items()}
    pairs = {name: (a_RI, parts[name.replace("lora_A", "lora_B")]) for name, a_RI in parts.items() if "lora_A" in name}
    weights = dict(whole.student.named_parameters())
    with torch.no_grad():
        for name, (a_RI, b_OR) in pairs.items():
            weights[name.replace("lora_A.default.", "")] += scale * b_OR @ a_RI

    total, found = gradients(ready.distiller, [batch], counts)
    expected_total, expected = gradients(whole, [batch], counts)

    assert total == pytest.approx(expected_total, rel=1e-5)
    assert len(pairs) == 14
    for name, (a_RI, b_OR) in pairs.items():
        slope_OI = expected["student." + name.replace("lora_A.default.", "")]
        size = {"rtol": 1e-3, "atol": 1e-4 * float(slope_OI.abs().max())}
        slope_OR = found["student." + name.replace("lora_A", "lora_B")]
        torch.testing.assert_close(slope_OR, scale * slope_OI @ a_RI.T, **size)
        torch.testing.assert_close(found["student." + name], scale * b_OR.T @ slope_OI, **size)
    for name in (name for name in expected if name.startswith("losses.")):
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-5)


def test_a_stopped_adapter_goes_on_bit_for_bit_and_its_checkpoint_holds_it_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora = {"rank": 2, "dropout": 0.2}  # random numbers must go on, too

    def go(out: str, **changed: Any) -> Any:
        return train(run(tmp_path / out, loss="sra", lora=lora, save_every=2, **changed), quiet=True)

    go("whole")
    stopped(run(tmp_path / "stopped", loss="sra", lora=lora, save_every=2), monkeypatch, 3)
    snapshot, _ = load_newest(tmp_path / "stopped")
    assert snapshot.step == 2
    assert {name.split(".")[-3] for name in snapshot.student} == {"lora_A", "lora_B"}
    assert go("stopped").resumed_at == 2

    assert_same_run(tmp_path / "whole", tmp_path / "stopped", "adapter_model.safetensors")
    shutil.rmtree(tmp_path / "stopped/checkpoints")
    with pytest.raises(Mismatch, match=r"train\.lr: student has .*, this run has 0\.001"):
        go("stopped", lr=1e-3)


def test_an_adapter_is_evaluated_merged_and_refused_on_other_weights(tmp_path: Path) -> None:
    made, out, merged = tiny.tiny_cache(), tmp_path / "adapter", tmp_path / "merged"
    base = shutil.copytree(made.student, tmp_path / "base")
    command = ["--shards", made.cache, "--student", base, "--steps", 2, "--batch-size", 6, "--lr", 0.05]

    assert xkd_train(*command, "--lora-rank", 3, "--lora-target", "q_proj,down_proj", "--out", out).code == 0
    held = xkd_train("eval", out, "--data", made.corpus, "--no-rouge", "--dtype", "float32", "--json").out
    assert xkd_train("export", out, "--merge", "--to", merged).out == f"{merged}: a whole student; saved in float32\n"

    assert sorted(path.name for path in out.glob("*.safetensors")) == ["adapter_model.safetensors"]
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["r"]) == (str(base), 3)
    ids_BL, _ = tiny.ids_and_valid((20, 20), 200)
    loaded = AutoModelForCausalLM.from_pretrained(merged).eval()
    adapter = load_student(str(out), dtype=torch.float32)
    torch.testing.assert_close(loaded(ids_BL).logits, adapter(ids_BL).logits, rtol=0, atol=1e-5)
    before = AutoModelForCausalLM.from_pretrained(base).eval()
    assert float((before(ids_BL).logits - loaded(ids_BL).logits).detach().abs().max()) > 0.1
    assert loaded.generation_config.eos_token_id == adapter.generation_config.eos_token_id
    again = xkd_train("eval", merged, "--data", made.corpus, "--no-rouge", "--dtype", "float32", "--json").out
    assert json.loads(held)["bits_per_byte"] == pytest.approx(json.loads(again)["bits_per_byte"], rel=1e-5)

    for words, line in (
        (["export", merged, "--merge", "--to", tmp_path / "new"], "holds no adapter"),
        (["export", out, "--merge", "--to", merged], "is there already. Kept: it as it is."),
        (["export", out, "--to", tmp_path / "new"], f"Next: xkd-train export {out} --merge --to"),
        ([*command, "--out", tmp_path / "b", "--student", out], "--merge --to FOLDER, then --student FOLDER"),
    ):
        ended = xkd_train(*words)
        assert (ended.code, line in ended.err) == (2, True), ended.err
    tiny.llama(tiny.STUDENT_TOKENIZER, seed=7).save_pretrained(base)
    assert "whose weights are not those it was trained on" in xkd_train("eval", out, "--data", made.corpus).err
    shutil.rmtree(base)
    assert "is not there. Next: put that model there" in xkd_train("eval", out, "--data", made.corpus).err

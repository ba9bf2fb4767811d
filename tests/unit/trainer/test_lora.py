"""LoRA: the adapter's gradient, its checkpoints and folder, the merged student, and what is refused."""

import importlib.util
import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import tiny_models as tiny
from one_step import gradients
from xkd_schemas.errors import BadData, Mismatch, UsageError
from xkd_train import xkd_train
from xkd_trainer.data.collate import batch_of
from xkd_trainer.losses.registry import parse_loss
from xkd_trainer.models.lora import load_student, trained
from xkd_trainer.training import batches
from xkd_trainer.training.distiller import Distiller
from xkd_trainer.training.files import load_newest
from xkd_trainer.training.fingerprint import FIRST_KEYS, fingerprint_of
from xkd_trainer.training.loop import train
from xkd_trainer.training.prepare import Ready, set_up

ALL = "mta+sra+dwa"


@pytest.fixture(autouse=True)
def _accelerate_starts_anew() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


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


def test_the_optimizer_holds_two_floats_of_each_trained_number_and_projectors_learn_at_their_own_rate() -> None:
    ready = set_up(
        tiny.tiny_cache().run(loss="sra", projector_lr=3e-3, lora={"rank": 4, "target": ["q_proj", "v_proj"]}), ""
    )
    batch = batch_of(ready.cache, [3, 19], ready.wanted)
    groups = ready.distiller.parameter_groups(lr=1e-4, weight_decay=0.0)
    optimizer = torch.optim.AdamW(groups)

    ready.distiller(batch, ready.distiller.counts(batch), 0)[0].backward()
    optimizer.step()

    learnt = 2 * 4 * (16 + 16) + 2 * 4 * (16 + 8)  # two blocks: queries 16 wide, two heads of values of 4 each
    assert sum(p.numel() for p in trained(ready.distiller.student).values()) == learnt
    projectors = sum(p.numel() for p in ready.distiller.losses.parameters() if p.requires_grad)
    held = [t for state in optimizer.state.values() for name, t in state.items() if name != "step"]
    assert sum(t.numel() * t.itemsize for t in held) == 8 * (learnt + projectors)
    assert [group["lr"] for group in groups] == [1e-4, 1e-4, 3e-3]


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")  # peft asks transformers so
def test_peft_s_own_wrapper_around_a_student_trains_the_same() -> None:
    import peft

    ready, weights = adapted("ce"), parse_loss("ce")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    wrapped = peft.get_peft_model(tiny.llama(tiny.STUDENT_TOKENIZER), config)

    distiller = Distiller(wrapped, dict(ready.distiller.losses), weights)

    batch = batch_of(ready.cache, [3], ready.wanted)
    _, found = gradients(distiller, [batch], distiller.counts(batch))
    assert sum(float(slope.abs().sum()) > 0 for name, slope in found.items() if "lora_B" in name) == 2


def stop_after(whole: int, patch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise BadData("a shard is gone")

    made = itertools.chain([batch_of] * whole, itertools.repeat(fail))
    patch.setattr(batches, "batch_of", lambda *given: next(made)(*given))


def test_a_stopped_adapter_goes_on_bit_for_bit_and_its_checkpoint_holds_it_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora = {"rank": 2, "dropout": 0.2}  # random numbers must go on, too

    def go(out: str, **changed: Any) -> Any:
        return train(
            tiny.tiny_cache().run(out=str(tmp_path / out), loss=ALL, lora=lora, save_every=2, **changed), quiet=True
        )

    go("whole")
    with monkeypatch.context() as patch:
        stop_after(3, patch)
        with pytest.raises(BadData, match="a shard is gone"):
            go("stopped")
    snapshot, _ = load_newest(tmp_path / "stopped")
    assert snapshot is not None
    assert snapshot.step == 2
    assert {name.split(".")[-3] for name in snapshot.student} == {"lora_A", "lora_B"}
    assert go("stopped").resumed_at == 2

    one, two = (load_file(tmp_path / out / "adapter_model.safetensors") for out in ("whole", "stopped"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    lines = [(tmp_path / out / "metrics.jsonl").read_bytes() for out in ("whole", "stopped")]
    assert lines[0] == lines[1]
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


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"lora": {"rank": 2}, "student__model": "new:llama"}, "new:llama is a new one. Next: leave out --lora-rank"),
        ({"lora": {"target": ["q_proj"]}}, "settings of LoRA are given without its rank. Next: --lora-rank 16"),
        ({"lora": {"rank": 2, "target": ["c_attn"]}}, "use all-linear, or of down_proj, gate_proj, k_proj"),
        ({"lora": {"rank": 2, "target": ["lm_head"]}}, "--lora-target lm_head: student "),
        ({"lora": {"rank": 2}}, "LoRA needs peft, which is not installed here. Next: pip install 'xkd-toolkit[lora]'"),
    ],
)
def test_lora_that_does_not_fit_is_one_line(
    changed: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    if "needs peft" in message:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "peft" else find(name))
    run = tiny.tiny_cache().run(**changed | {"student__tokenizer": str(tiny.tiny_cache().student)})

    with pytest.raises(UsageError) as caught:
        set_up(run, "")

    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_run_without_new_settings_is_known_by_the_keys_that_earlier_checkpoints_have() -> None:
    run = tiny.tiny_cache().run(out="x")
    assert set(fingerprint_of(run, set_up(run, ""), 4)["train"]) == FIRST_KEYS

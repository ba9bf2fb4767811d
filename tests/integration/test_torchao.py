"""A teacher in torchao's int8 weights from documents to a trained student, where torchao is installed."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

import small_cache
import tiny_models as tiny
from small_cache import made
from xkd_pipeline.maintain.recompute import recompute
from xkd_pipeline.maintain.verify import verify
from xkd_pipeline.stages import align_stage, teacher_stage
from xkd_schemas.cache.table import Table
from xkd_trainer.training.loop import train

pytestmark = pytest.mark.filterwarnings("default")  # torchao's own


def int8(folder: Path, *, head: bool) -> PreTrainedModel:
    """The small teacher with int8 weights, maybe those of the head too, as it would be saved for others."""
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    config = TorchAoConfig(Int8WeightOnlyConfig(), include_input_output_embeddings=head)
    model = AutoModelForCausalLM.from_pretrained(made() / "teacher", dtype=torch.float32, quantization_config=config)
    model.save_pretrained(folder)
    for path in (made() / "teacher").iterdir():
        if not (folder / path.name).exists():
            shutil.copy(path, folder / path.name)
    return model


@pytest.mark.parametrize("head", [False, True])
def test_int8_weights_teach_a_student_and_their_price_is_told(head: bool, tmp_path: Path) -> None:
    model, cache = int8(tmp_path / "teacher", head=head), tmp_path / "cache"
    shutil.copytree(made() / "cache/documents", cache / "documents")
    student = tiny.saved(tiny.llama(tiny.STUDENT_TOKENIZER), tiny.STUDENT_TOKENIZER, tmp_path / "student")
    run = small_cache.run_file(
        cache, teacher={"model": str(tmp_path / "teacher"), "losses": ["mta", "kl"]}, student={"model": str(student)},
        train={"out": str(tmp_path / "out"), "loss": "mta", "steps": 2, "batch_size": 4},
    )  # fmt: skip

    said = teacher_stage(run, small_cache.IN_PROCESS)
    align_stage(run, small_cache.IN_PROCESS)
    train(run, quiet=True)

    table = Table(cache, "teachers/T")
    assert table.manifest.spec["quantization"]["quant_method"] == "torchao"
    assert ("; quantised head kept as plain numbers" in said.line) == head
    stored = load_file(table.folder / "head.safetensors")["weight"].float()
    assert torch.equal(stored, model.lm_head.weight.dequantize() if head else model.lm_head.weight)
    assert (verify(cache, "deep"), recompute(cache, "teachers/T", str(tmp_path / "teacher"), 2).bad) == ([], [])
    price = recompute(cache, "teachers/T", str(made() / "teacher"), 12).price
    assert price is not None
    assert 0 < price.kl_nats < 0.1
    assert 0 < price.state_error < 0.1

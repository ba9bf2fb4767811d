"""A teacher whose weights are spread over memory and a disk gives the files of one that is in memory."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import small_cache
from xkd_pipeline.capture import stage
from xkd_pipeline.maintain.recompute import recompute
from xkd_pipeline.stages import device_map_of, teacher_stage
from xkd_pipeline.workers.contract import Workers
from xkd_schemas.cache.table import Table
from xkd_schemas.config import load_run
from xkd_schemas.errors import UsageError
from xkd_trainer.models.architecture import is_tied
from xkd_trainer.models.loading import load_model, place_weights

SPREAD = {
    "model.embed_tokens": "disk", "model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "cpu",
    "model.layers.3": "disk", "model.norm": "disk", "model.rotary_emb": "cpu", "lm_head": "disk",
}  # fmt: skip


def captured(cache: Path, **teacher: object) -> dict[str, bytes]:
    shutil.copytree(small_cache.made() / "cache" / "documents", cache / "documents")
    teacher_stage(small_cache.run_file(cache, teacher=teacher), small_cache.IN_PROCESS)
    return small_cache.files_of(cache / "teachers")


def test_an_untied_teacher_on_cpu_and_disk_gives_the_same_cache_byte_for_byte(tmp_path: Path) -> None:
    model = str(small_cache.made() / "teacher")
    (tmp_path / "map.json").write_text(json.dumps(SPREAD))

    spread = captured(tmp_path / "a", model=model, device_map=str(tmp_path / "map.json"))

    (loaded,) = stage._loaded.values()
    assert {loaded.get_input_embeddings().weight.device.type, loaded.lm_head.weight.device.type} == {"meta"}
    assert spread == small_cache.files_of(small_cache.made() / "cache" / "teachers")
    assert recompute(tmp_path / "a", "teachers/T", model, 2).bad == []


def test_a_tied_teacher_with_little_memory_gives_the_same_cache_byte_for_byte(tmp_path: Path) -> None:
    model = str(small_cache.llama(tmp_path / "tied", tied=True))

    spread = captured(tmp_path / "a", model=model, max_memory=["cpu=60KB"], losses=["kl"])

    (loaded,) = stage._loaded.values()
    assert (set(loaded.hf_device_map.values()), is_tied(loaded)) == ({"disk"}, True)
    manifest = Table(tmp_path / "a", "teachers/T").manifest
    assert (manifest.constants["tied"], "head.safetensors" in manifest.files) == (True, True)
    assert "embeddings.safetensors" not in {*manifest.files, *(path.name for path in tmp_path.rglob("*"))}
    assert spread == captured(tmp_path / "b", model=model, losses=["kl"])

    asked = ("--signals", "logsumexp", "--max-memory", "cpu=60KB")
    code, said = small_cache.asked("add", tmp_path / "a", "--model", model, *asked)
    assert (code, said["signals"]) == (0, ["logsumexp"])
    (loaded,) = stage._loaded.values()
    assert set(loaded.hf_device_map.values()) == {"disk"}


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("device_map", "{half of", "--device-map {half of: no map of modules to devices"),
        ("device_map", '{"model.embed": "disk"}', "cannot be loaded as a causal language model"),
        ("max_memory", "0=much", "--max-memory"),
        ("max_memory", "20GiB", "--max-memory"),
    ],
)
def test_a_place_that_cannot_be_is_one_line(key: str, value: str, message: str) -> None:
    def loaded() -> None:
        where = load_run(None, [], [(f"--{key.replace('_', '-')}", f"teacher.{key}", value)]).teacher
        placed = place_weights(where.device_map, where.max_memory)
        load_model(str(small_cache.made() / "teacher"), dtype=torch.float32, placed=placed)

    with pytest.raises(UsageError) as caught:
        loaded()

    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_worker_with_several_gpus_spreads_the_weights_unless_told_otherwise() -> None:
    run = load_run(None)
    several, asked = Workers(count=1, gpus=2.0), load_run(None, ["teacher.device_map=sequential"])

    assert [device_map_of(run, Workers(count=1, gpus=g)) for g in (0.0, 0.5, 1.0)] == ["", "", ""]
    assert (device_map_of(run, several), device_map_of(asked, several)) == ("auto", "sequential")
    assert place_weights("", ("0=20GiB",)) | {"offload_folder": ""} == {
        "device_map": "auto", "max_memory": {0: "20GiB"}, "offload_folder": "",
    }  # fmt: skip

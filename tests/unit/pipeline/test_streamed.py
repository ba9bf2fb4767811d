"""A teacher whose blocks are read one after another: the same bytes in little memory, and damaged checkpoints."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import small_cache
from small_cache import files_of, made
from xkd_pipeline.capture import capture as capturing
from xkd_pipeline.capture import passes
from xkd_pipeline.capture.stage import _loaded, teacher_of
from xkd_pipeline.stages import teacher_stage
from xkd_schemas.cache.manifest import Plan, read_record
from xkd_schemas.cache.table import Table
from xkd_schemas.errors import DiskFailed, InputMissing, UsageError
from xkd_trainer.models import streaming
from xkd_trainer.models.streaming import Stream, load_streamed, stream_of


@pytest.fixture(autouse=True)
def loaded_afresh() -> None:
    _loaded.clear()


def begun(tmp_path: Path) -> Path:
    """The session's cache without its teacher."""
    cache = small_cache.copied(tmp_path)
    shutil.rmtree(cache / "teachers")
    return cache


def stage(cache: Path, said: list[str] | None = None, **teacher: object) -> None:
    settings = {"model": str(made() / "teacher"), **teacher}
    run = small_cache.run_file(cache, teacher=settings)
    teacher_stage(run, small_cache.IN_PROCESS, [].append if said is None else said.append)


def in_memory(stream: Stream) -> list[int]:
    """Blocks that have weights, from 1, and last the embeddings."""
    parts = enumerate([*stream._blocks, stream._table], 1)
    return [n for n, part in parts if any(not p.is_meta and p.stride() != (0, 0) for p in part.parameters())]


def in_shards(folder: Path) -> Path:
    """A copy of the teacher whose weights are in several files."""
    shutil.copytree(made() / "teacher", folder)
    (folder / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(made() / "teacher").save_pretrained(folder, max_shard_size="20KB")
    return folder


def test_a_streamed_teacher_gives_the_same_bytes_with_two_blocks_in_memory(tmp_path: Path, monkeypatch) -> None:
    there, plain = [], Stream.step

    def step(stream: Stream, number: int, *rest: Any) -> Any:
        there.append(in_memory(stream))
        assert number in there[-1]
        return plain(stream, number, *rest)

    monkeypatch.setattr(Stream, "step", step)
    cache, said = begun(tmp_path), list[str]()

    stage(cache, said, stream_layers=True)

    assert "the teacher's blocks are read from disk one after another: as asked for" in said
    assert files_of(cache) == files_of(made() / "cache")
    (model,) = _loaded.values()
    assert len(there) > 12
    assert max(map(len, there)) <= 2
    assert model.stream.embeddings in there[0]
    assert in_memory(model.stream) == []


def test_a_shard_for_whose_next_block_memory_runs_out_is_made_in_smaller_batches(tmp_path: Path, monkeypatch) -> None:
    tried, plain, load = [], Stream.step, streaming.convert_and_load_state_dict_in_model

    def step(stream: Stream, number: int, *rest: Any) -> Any:
        tried.append(number)
        return plain(stream, number, *rest)

    def fail_once(*given: Any, **options: Any) -> Any:
        if tried.count(1) > 1 and "full" not in tried:  # the first is that of the check
            tried.append("full")
            raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")
        return load(*given, **options)

    monkeypatch.setattr(Stream, "step", step)
    monkeypatch.setattr(streaming, "convert_and_load_state_dict_in_model", fail_once)
    stage(cache := begun(tmp_path), stream_layers=True)

    care = json.loads((cache / "teachers/T/commits/00000.json").read_text())["care"]
    assert care["batch"] == 128
    smaller, rows = Table(cache, "teachers/T"), Table((made() / "cache"), "teachers/T")
    assert np.array_equal(smaller[0]["token_ids"], rows[0]["token_ids"])
    np.testing.assert_allclose(smaller[0]["entropy"], rows[0]["entropy"], rtol=1e-4)


UP, HEAD = "model.layers.2.mlp.up_proj.weight", "lm_head.weight"


def damage(what: str, folder: Path) -> None:
    """Spoil a model folder whose weights are in several files; the name of a tensor takes it out."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    places = index["weight_map"]
    path = folder / places[HEAD if what == HEAD else UP]
    if what == "a missing file":
        path.unlink()
    elif what == "half a file":
        path.write_bytes(path.read_bytes()[:-9])
    elif what == "a wrong index":
        places[UP] = places["model.norm.weight"]
    else:
        tensors = load_file(path)
        taken = tensors.pop(what if what in places else UP)
        if what == "a shape of another model":
            tensors[UP] = taken[:-1]
        else:
            del places[what]
        save_file(tensors, path, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("a missing file", r"model-0000\d-of-0000\d\.safetensors is not there"),
        ("half a file", r"model-0000\d-of-0000\d\.safetensors cannot be read"),
        ("a wrong index", r"index\.json says that .* has model\.layers\.2\.mlp\.up_proj\.weight"),
        (UP, r"its files lack model\.layers\.2\.mlp\.up_proj\.weight"),
        ("a shape of another model", r"lack model\.layers\.2\.mlp\.up_proj\.weight, or have it in another shape"),
        (HEAD, r"its files lack lm_head\.weight"),
    ],
)
def test_a_damaged_checkpoint_is_one_line_before_a_table_is_begun(what: str, message: str, tmp_path: Path) -> None:
    damage(what, folder := in_shards(tmp_path / "model"))
    cache = begun(tmp_path)

    for streamed in (True, False) if what in (UP, HEAD) else (True,):
        with pytest.raises(InputMissing, match=f"{message}.* Next: copy the model folder again") as caught:
            stage(cache, model=str(folder), stream_layers=streamed)

        assert "\n" not in str(caught.value)
        assert not (cache / "teachers").exists()


def test_no_room_for_states_is_one_line_and_a_whole_teacher_finishes_the_table(tmp_path: Path, monkeypatch) -> None:
    seen: list[Path] = []

    def usage(folder: Path) -> Any:
        seen.append(folder)
        return shutil._ntuple_diskusage(10**9, 0, 10**9 if len(seen) == 1 else 5000)

    monkeypatch.setattr(passes, "SHARE", 0.0)  # states lie in a file
    monkeypatch.setattr(passes, "disk_usage", usage)
    cache = begun(tmp_path)

    with pytest.raises(DiskFailed, match=r"teachers/T has 0\.0 GB free, the states .*Kept: .*Next: free space") as why:
        stage(cache, stream_layers=True)

    assert "\n" not in str(why.value)
    assert len(list((cache / "teachers/T/commits").iterdir())) == 1
    assert len(list((cache / "teachers/T").iterdir())) == len(("plan.json", "commits", "one shard"))
    assert "stream_layers" not in read_record(cache / "teachers/T/plan.json", Plan).spec
    stage(cache, stream_layers=False)
    assert files_of(cache) == files_of(made() / "cache")


@pytest.mark.parametrize(
    ("memory", "asked", "why"),
    [
        (10_000, None, "its weights take 0.0 GB, there is memory for 0.0 GB"),
        (10_000, False, ""),
        (10**12, None, ""),
        (10**12, True, "as asked for"),
    ],
)
def test_a_teacher_is_streamed_where_its_weights_do_not_fit_or_as_asked_for(
    memory: int, asked: bool | None, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(passes, "memory_for", lambda _device: memory)
    settings = capturing.TeacherSettings(
        model=str(made() / "teacher"), dtype="float32", device="cpu", stream_layers=asked
    )

    assert passes.why_streamed(settings, torch.float32, "cpu") == why
    assert (stream_of(teacher_of(settings)) is not None) == bool(why)


def test_limits_of_control_groups_count_as_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own, job = tmp_path / "own", tmp_path / "slurm/job"
    job.mkdir(parents=True)
    own.write_text("4:memory:/old\n0::/slurm/job\n")
    for folder, most, taken in ((tmp_path, "max", 900), (job, "1000", 300), (job.parent, "5000", 6000)):
        (folder / "memory.max").write_text(f"{most}\n")
        (folder / "memory.stat").write_text(f"anon {taken}\nfile 80\n")

    assert [*passes.free_of_groups(tmp_path, own)] == [700, 0]
    assert [*passes.free_of_groups(tmp_path / "slurm", tmp_path / "none")] == [0]
    monkeypatch.setattr(passes, "free_of_groups", lambda: [700])
    assert passes.memory_for("cpu") == 700


def test_what_cannot_be_streamed_is_refused_if_asked_for_or_loaded_whole(tmp_path: Path, monkeypatch) -> None:
    folder = tmp_path / "quantised"
    shutil.copytree(made() / "teacher", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    monkeypatch.setattr(passes, "memory_for", lambda _device: 0)

    with pytest.raises(UsageError, match=r"quantised weights cannot be read block by block. Next: --no-stream-layers"):
        load_streamed(str(folder), dtype=torch.float32, device="cpu")

    for name in (str(folder), str(tmp_path / "some.gguf")):
        teacher = capturing.TeacherSettings(model=name, dtype="float32")
        assert passes.why_streamed(teacher, torch.float32, "cpu") == ""

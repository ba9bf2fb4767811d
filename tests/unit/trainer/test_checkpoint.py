"""What a run leaves on disk while it goes on: checkpoints, metrics, the finished folder."""

import json
import resource
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import tiny_models as tiny
from damages import flipped
from faulty_disk import injected
from xkd_schemas.durable_files import digest, sha256_of
from xkd_schemas.errors import BadData, DiskFailed
from xkd_trainer.models.forward import run
from xkd_trainer.models.loading import load_model, load_tokenizer
from xkd_trainer.run_folder import read_lines
from xkd_trainer.training.files import FILES, KEPT, Snapshot, export_student, is_finished, load_newest, save, tidy_up
from xkd_trainer.training.tracking import Metrics

FINGERPRINT = {"train": {"seed": 1}, "steps": 8}


def snapshot(step: int, *, tied: bool = True) -> Snapshot:
    model, projector = tiny.llama("byte_level", seed=step, tied=tied), torch.nn.Linear(3, 4)
    optimizer = torch.optim.AdamW([*model.parameters(), *projector.parameters()], lr=1e-3)
    model(input_ids=torch.arange(8)[None]).logits.square().mean().backward()
    optimizer.step()
    return Snapshot(
        step=step,
        student=model.state_dict(),
        projectors=projector.state_dict(),
        optimizer=optimizer.state_dict(),
        fingerprint=FINGERPRINT,
        metrics=b'{"step": 1}\n',
    )


@pytest.mark.parametrize("tied", [True, False])
def test_a_checkpoint_comes_back_bit_for_bit_and_one_of_the_same_step_replaces_it(tmp_path: Path, tied: bool) -> None:
    wrote = snapshot(3, tied=tied)

    for one in (snapshot(3, tied=not tied), wrote):
        save(tmp_path, one)
    read, skipped = load_newest(tmp_path)

    assert (read.step, skipped) == (3, [])
    assert dict(read.fingerprint) == FINGERPRINT
    other = tiny.llama("byte_level", seed=99, tied=tied)
    other.load_state_dict(dict(read.student), strict=False)
    groups = json.loads(json.dumps(wrote.optimizer["param_groups"]))  # tuples come back as lists
    torch.testing.assert_close(
        [dict(read.projectors), read.optimizer["state"], dict(other.state_dict())],
        [dict(wrote.projectors), wrote.optimizer["state"], dict(wrote.student)], rtol=0, atol=0,
    )  # fmt: skip
    assert read.optimizer["param_groups"] == groups
    assert ("lm_head.weight" in read.student and "model.embed_tokens.weight" in read.student) != tied


def test_a_checkpoint_that_holds_random_numbers_and_no_micro_batch_size_as_earlier_ones_do_comes_back(
    tmp_path: Path,
) -> None:
    wrote = snapshot(3)
    folder = save(tmp_path, wrote)
    optimizer, state = folder / "optimizer.safetensors", json.loads((folder / "state.json").read_text())
    save_file({**load_file(optimizer), "random": torch.get_rng_state()}, optimizer)
    del state["micro_batch_size"]
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "COMPLETE").write_text(json.dumps({name: sha256_of(folder / name) for name in FILES}))

    read, _ = load_newest(tmp_path)
    assert (read.micro_batch_size, read.optimizer["state"].keys()) == (0, wrote.optimizer["state"].keys())


def test_only_the_newest_stay_and_no_file_is_a_pickle(tmp_path: Path) -> None:
    for step in (1, 2, 10, 9):
        save(tmp_path, snapshot(step))

    folders = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert folders == ["step-00000009", "step-00000010"][:KEPT]
    names = {path.name for path in (tmp_path / "checkpoints/step-00000010").iterdir()}
    assert names == {
        *(f"{n}.safetensors" for n in ("student", "projectors", "optimizer")),
        "state.json",
        "metrics.jsonl",
        "COMPLETE",
    }


def test_a_damaged_checkpoint_is_passed_over_with_a_line(tmp_path: Path) -> None:
    _, newer = (save(tmp_path, snapshot(step)) for step in (4, 6))
    for path in sorted(newer.iterdir()):
        content = path.read_bytes()
        for damaged in (flipped(content, 4 * len(content)), content[: len(content) // 2], b"", b"{}", None):
            path.unlink() if damaged is None else path.write_bytes(damaged)
            read, skipped = load_newest(tmp_path)
            assert read.step == 4
            if damaged is None and path.name == "COMPLETE":
                assert skipped == []  # as after a kill between writing and renaming
            else:
                assert [line.partition(": ")[0] for line in skipped] == [f"{newer} is damaged and was passed over"]
        path.write_bytes(content)


def test_a_damaged_newer_checkpoint_does_not_count_as_one_of_those_that_stay(tmp_path: Path) -> None:
    for step in (1, 2):
        save(tmp_path, snapshot(step))
    (tmp_path / "checkpoints/step-00000002/state.json").write_text("{}")
    newest = save(tmp_path, snapshot(3))
    assert sorted(path.name for path in newest.parent.iterdir()) == ["step-00000001", "step-00000003"]


# metrics.jsonl


@pytest.mark.parametrize("damage", [b'{"step": 8, "lo', b"\xff\xfe", b'{"step": 3}\n'])
def test_metrics_are_appended_and_a_resumed_run_takes_those_of_its_checkpoint(tmp_path: Path, damage: bytes) -> None:
    first = Metrics(tmp_path, before=None)
    for step in (2, 4):
        first.write(step=step, loss=1.0 / step)
    save(tmp_path, replace(snapshot(4), metrics=first.path.read_bytes()))
    first.write(step=6)
    first.path.write_bytes(damage + first.path.read_bytes() + damage)  # killed while writing, or by a bad disk

    read, _ = load_newest(tmp_path)
    Metrics(tmp_path, before=read.metrics).write(step=6, loss=0.5)

    assert read_lines(first.path) == [{"step": 2, "loss": 0.5}, {"step": 4, "loss": 0.25}, {"step": 6, "loss": 0.5}]


def test_a_run_from_the_start_begins_a_new_file_and_keeps_those_of_before(tmp_path: Path) -> None:
    for run_number in range(3):
        Metrics(tmp_path, before=None).write(step=run_number)

    found = {path.name: read_lines(path)[0]["step"] for path in tmp_path.iterdir()}
    assert found == {"metrics-1.jsonl": 0, "metrics-2.jsonl": 1, "metrics.jsonl": 2}


# The finished folder


@pytest.mark.parametrize("tied", [True, False])
def test_the_finished_folder_loads_with_transformers_and_says_the_same(tmp_path: Path, tied: bool) -> None:
    student, tokenizer = tiny.llama("sentencepiece", seed=3, tied=tied), tiny.tokenizer_of("sentencepiece")
    ids_BL, valid_BL = tiny.ids_and_valid((9,), 500)
    run(student, ids_BL, valid_BL, attention=True)  # as SRA does; the folder must not ask for it
    expected = student(input_ids=ids_BL).logits
    student.generation_config.eos_token_id, student.generation_config.pad_token_id = 7, 8  # of a base model

    export_student(tmp_path, student, tokenizer, FINGERPRINT, [])

    loaded, words = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert torch.equal(loaded.eval()(input_ids=ids_BL).logits, expected)
    assert words("Who lit the lamp?")["input_ids"] == tokenizer("Who lit the lamp?")["input_ids"]
    assert loaded.generation_config.eos_token_id == sorted({tokenizer.eos_token_id, 7})
    assert loaded.generation_config.pad_token_id == tokenizer.pad_token_id
    assert "xkd" not in (tmp_path / "config.json").read_text()
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"}
    stored = json.loads((tmp_path / "xkd.json").read_text())
    assert stored["run"] == FINGERPRINT
    assert set(stored["versions"]) == {"torch", "transformers", "python"}


def exported(out: Path, kind: str = "sentencepiece") -> Path:
    export_student(out, tiny.llama(kind), tiny.tokenizer_of(kind), FINGERPRINT, [])
    tidy_up(out, keep_checkpoints=True)
    return out


def test_a_missing_or_changed_file_of_a_student_is_found_by_training_again_and_by_loading(tmp_path: Path) -> None:
    finished, folder = exported(tmp_path), str(tmp_path)
    for path in sorted(path for path in finished.iterdir() if path.is_file()):
        content = path.read_bytes()
        for damaged in (bytes(len(content)), *[None] * (path.name != "xkd.json")):
            path.unlink() if damaged is None else path.write_bytes(damaged)
            reads = [lambda: is_finished(finished, FINGERPRINT), lambda: load_model(folder, dtype=torch.float32)]
            for read in (*reads, *[lambda: load_tokenizer(folder)] * (path.suffix != ".safetensors")):
                with pytest.raises(BadData, match=rf"{path.name} .*delete {finished} and train again"):
                    read()
        path.write_bytes(content)
    assert is_finished(finished, FINGERPRINT)
    (finished / "xkd.json").unlink()
    assert not is_finished(finished, FINGERPRINT)


@pytest.mark.parametrize("key", ["files", "run"])
def test_an_xkd_json_that_lies_with_its_own_digest_right_is_one_line(tmp_path: Path, key: str) -> None:
    data: dict[str, Any] = {key: ["config.json"]}
    (tmp_path / "xkd.json").write_text(json.dumps({**data, "digest": digest(data)}))
    with pytest.raises(BadData, match=r"xkd\.json does not match"):
        load_tokenizer(str(tmp_path))


def test_every_file_of_a_student_is_durable_before_the_mark_that_it_is_finished(tmp_path: Path) -> None:
    with injected("*:0:count") as fault:
        exported(tmp_path)

    mark = max(at for at, point in enumerate(fault.points) if point == "file.create")
    before = fault.points[:mark]
    files = json.loads((tmp_path / "xkd.json").read_text())["files"]
    assert sum(point in ("file.fsync", "tensors.fsync") for point in before) >= len(files)
    assert before[-1] == "folder.sync"
    assert fault.points[mark:].count("file.fsync") == 1


@pytest.fixture
def full_disk() -> Iterator[None]:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**14, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.usefixtures("full_disk")
def test_a_full_disk_while_tensors_are_written_is_one_line_and_leaves_no_half_file(tmp_path: Path) -> None:
    for write in (lambda: save(tmp_path, snapshot(1)), lambda: exported(tmp_path, "byte_level")):
        with pytest.raises(DiskFailed, match=r"File too large\. Kept: .* Next: free space, run again"):
            write()

    assert [path.name for path in tmp_path.rglob("*") if path.suffix == ".safetensors" or ".tmp" in path.name] == []

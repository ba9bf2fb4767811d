"""What a run leaves on disk: checkpoints while it goes on, then the finished student.

    OUT/checkpoints/step-00000200/  student.safetensors  projectors.safetensors  optimizer.safetensors
                                    state.json  metrics.jsonl  COMPLETE (sha256 of the others)
A checkpoint appears whole, by rename, or not at all. The student lies in OUT itself, a folder that
AutoModelForCausalLM and AutoTokenizer load, with `xkd.json`, which says where it came from.
"""

import json
import os
import platform
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Final

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from xkd_schemas.cache.manifest import OWN
from xkd_schemas.durable_files import digest, disk_errors, own_folder, replace, save_folder, sha256_of, sync_folder
from xkd_schemas.errors import UsageError
from xkd_schemas.tokens import Tokens
from xkd_trainer.models.generation import find_turn_ends
from xkd_trainer.models.loading import check_student, load_tokenizer, save_tensors, stored_dtype, tensor_errors
from xkd_trainer.models.lora import base_of, load_student
from xkd_trainer.run_folder import BEST, METRICS, PROVENANCE, UNFINISHED, read_provenance

CARD: Final = "README.md"
KEPT = 2  # newest whole checkpoints that stay
FILES: Final = ("student.safetensors", "projectors.safetensors", "optimizer.safetensors", "state.json", METRICS)
_IN_JSON: Final = ("step", "fingerprint", "window", "micro_batch_size", "evaluated")  # of a snapshot, in state.json


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """Everything a run needs to go on as if it had not stopped.

    The order of documents and the seed of its random numbers are formulas of the step.
    """

    step: int  # optimizer steps done
    student: Mapping[str, Tensor]
    projectors: Mapping[str, Tensor]
    optimizer: Mapping[str, Any]  # `state_dict()` of the optimizer
    fingerprint: Mapping[str, Any]  # what must be the same to resume: cache root, losses, batch size, seed, ...
    window: Mapping[str, Any] = field(default_factory=dict)  # what was measured since the last logged step
    metrics: bytes = b""  # the file of what was logged
    micro_batch_size: int = 0  # documents of a forward pass, fewer than asked for where memory ran out; 0 for all
    evaluated: Mapping[str, Any] = field(default_factory=dict)  # the best evaluation, and how many came after it


def make_contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as safetensors takes them: each once, whole, on the CPU."""
    seen: set[int] = set()
    unique: dict[str, Tensor] = {}
    for name, tensor in tensors.items():  # tied weights appear twice in a state dict and once on disk
        if not tensor.numel() or tensor.data_ptr() not in seen:
            unique[name] = tensor.detach().cpu().contiguous()
        seen.add(tensor.data_ptr())
    return unique


def save(out: Path, snapshot: Snapshot) -> Path:
    """Write a checkpoint and drop all but the newest KEPT that are whole; DiskFailed leaves earlier ones untouched."""
    folder = out / "checkpoints"
    target = folder / f"step-{snapshot.step:08d}"
    with disk_errors(target):
        folder.mkdir(parents=True, exist_ok=True)
        with own_folder(folder, ".tmp-step-") as temporary:
            _write(temporary, snapshot)
            shutil.rmtree(target, ignore_errors=True)
            temporary.rename(target)
        sync_folder(folder)
        found = _find_checkpoints(out)
        whole = (path for path in reversed(found) if path == target or not _find_fault(path))
        for old in set(found) - set(islice(whole, KEPT)):
            shutil.rmtree(old)
    return target


def _write(folder: Path, snapshot: Snapshot) -> None:
    states = snapshot.optimizer["state"].items()
    optimizer = {f"{index}.{key}": value for index, values in states for key, value in values.items()}
    plain = {key: optimizer.pop(key) for key, value in list(optimizer.items()) if not isinstance(value, Tensor)}
    tensors = snapshot.student, snapshot.projectors, optimizer
    for name, content in zip(FILES, tensors, strict=False):
        save_tensors(make_contiguous(content), folder / name)
    state = {name: getattr(snapshot, name) for name in _IN_JSON}
    state["optimizer"] = {"groups": snapshot.optimizer["param_groups"], "plain": plain}
    (folder / "state.json").write_text(json.dumps(state))  # terms stay in the order that they are logged in
    (folder / METRICS).write_bytes(snapshot.metrics)
    sums = {name: sha256_of(folder / name) for name in FILES}
    (folder / "COMPLETE").write_text(json.dumps(sums, sort_keys=True))
    for path in folder.iterdir():
        with path.open("rb+") as stream:
            os.fsync(stream.fileno())
    sync_folder(folder)


def _find_checkpoints(out: Path) -> list[Path]:
    return sorted(path for path in (out / "checkpoints").glob("step-[0-9]*") if (path / "COMPLETE").is_file())


def load_newest(out: Path) -> tuple[Snapshot | None, list[str]]:
    """The newest checkpoint that is whole, and a line for each newer one that is not."""
    skipped: list[str] = []
    for path in reversed(_find_checkpoints(out)):
        if not (fault := _find_fault(path)):
            return _load(path), skipped
        skipped.append(f"{path} is damaged and was passed over: {fault}")
    return None, skipped


def _find_fault(path: Path) -> str:
    """What is wrong with the files of a checkpoint; nothing where they are whole."""
    try:
        sums = json.loads((path / "COMPLETE").read_text())
        wrong = [name for name in FILES if sha256_of(path / name) != sums[name]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return repr(error)
    return f"{wrong[0]} does not match its digest" if wrong else ""


def _load(path: Path) -> Snapshot:
    state = json.loads((path / "state.json").read_text())
    tensors = load_file(path / "optimizer.safetensors")
    tensors.pop("random", None)  # written by versions before 0.2
    values: dict[int, dict[str, Any]] = {}
    for key, value in {**tensors, **state["optimizer"].get("plain", {})}.items():
        index, name = key.split(".", 1)
        values.setdefault(int(index), {})[name] = value
    return Snapshot(
        student=load_file(path / "student.safetensors"), projectors=load_file(path / "projectors.safetensors"),
        optimizer={"state": values, "param_groups": state["optimizer"]["groups"]},
        metrics=(path / METRICS).read_bytes(), **{name: state[name] for name in _IN_JSON if name in state},
    )  # fmt: skip


def export_student(
    out: Path, student: PreTrainedModel, tokenizer: Any, fingerprint: Mapping[str, Any], rows: Iterable[Tokens],
    card: str = "",
) -> None:  # fmt: skip
    """Save weights (safetensors), configuration, tokenizer, and last `xkd.json`, the mark of a finished folder.

    Every file is durable before the mark is made, which holds their digests and its own, but not that of the card:
    people edit it. A generation stops at the ends that `find_turn_ends` finds in `rows`.
    """
    ends = find_turn_ends(student, tokenizer, rows)
    replace(out / UNFINISHED, _mark(fingerprint))
    student.generation_config.eos_token_id = ends if len(ends) > 1 else ends[0]
    student.generation_config.pad_token_id = (
        tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    )

    _mend_sampling(student)

    def save(folder: Path) -> None:
        with tensor_errors():
            student.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    names = save_folder(out, save)
    if card:
        replace(out / CARD, card.encode())
    provenance: dict[str, Any] = {
        "files": {name: sha256_of(out / name) for name in names},
        "run": dict(fingerprint),
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }
    provenance[OWN] = digest(provenance)
    replace(out / PROVENANCE, (json.dumps(provenance, indent=1, sort_keys=True) + "\n").encode())


def export_merged(folder: Path, to: Path) -> torch.dtype:
    """Write the whole student that an adapter's folder stands for to a new folder; in the dtype of the model below it.

    UsageError where there is no adapter, or the folder is not empty.
    """
    base = base_of(str(folder))
    if base == str(folder):
        raise UsageError(f"{folder} holds no adapter", fix="name a folder that xkd-train --lora-rank R finished")
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise UsageError(f"--to {to} is there already", kept="it as it is", fix="name a new folder")
    dtype = stored_dtype(base)
    student = load_student(str(folder), dtype=torch.float32, merged=True).to(dtype)
    run = {**read_provenance(folder).get("run", {}), "merged": sha256_of(folder / "adapter_model.safetensors")}
    export_student(to, student, load_tokenizer(str(folder)), run, ())
    tidy_up(to, keep_checkpoints=True)
    return dtype


def _mend_sampling(student: PreTrainedModel) -> None:
    """Settings of sampling, as hubs have them without `do_sample`, switch it on: transformers would not save them."""
    config = student.generation_config
    try:
        config.validate(strict=True)
    except ValueError:
        config.update(do_sample=True)


def tidy_up(out: Path, *, keep_checkpoints: bool) -> None:
    """Remove what a run whose student is just finished needs no more; a killed one leaves it to the next."""
    with disk_errors(out):
        if (out / UNFINISHED).exists():
            shutil.rmtree(out / BEST, ignore_errors=True)
            if not keep_checkpoints:
                shutil.rmtree(out / "checkpoints", ignore_errors=True)
            (out / UNFINISHED).unlink()


def is_finished(out: Path, fingerprint: Mapping[str, Any]) -> bool:
    """True where `out` holds the finished student of exactly this run; BadData where a file is not as it was saved."""
    check_student(out, weights=True)
    return bool(read_provenance(out).get("run") == json.loads(json.dumps(dict(fingerprint))))


def was_exporting(out: Path, fingerprint: Mapping[str, Any]) -> bool:
    """True where exactly this run was stopped while it saved its student to `out`."""
    path = out / UNFINISHED
    return path.is_file() and path.read_bytes() == _mark(fingerprint)


def _mark(fingerprint: Mapping[str, Any]) -> bytes:
    return json.dumps({"run": dict(fingerprint)}, sort_keys=True).encode()

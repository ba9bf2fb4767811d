"""A training state on disk: safetensors and JSON in a folder that appears whole, by rename, or not at all.

    OUT/checkpoints/step-00000200/  student.safetensors  projectors.safetensors  optimizer.safetensors
                                    state.json  COMPLETE (sha256 of the others)
The finished student lies in OUT itself, as transformers saves it.
"""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from xkd_schemas.durable_files import disk_errors, own_folder, sha256_of, sync_folder
from xkd_schemas.errors import BadData
from xkd_trainer.models.student_files import save_tensors

KEPT = 2
"""Newest whole checkpoints that stay."""
FILES: Final = ("student.safetensors", "projectors.safetensors", "optimizer.safetensors", "state.json")


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """Everything a run needs to go on as if it had not stopped. The order of documents is a formula of the step."""

    step: int
    """Optimizer steps done."""
    student: Mapping[str, Tensor]
    projectors: Mapping[str, Tensor]
    optimizer: Mapping[str, Any]
    """`state_dict()` of the optimizer."""
    random: Tensor
    """torch's CPU generator state, uint8."""
    fingerprint: Mapping[str, Any]
    """What must be the same to resume: cache root, losses, batch size, seed, ..."""
    window: Mapping[str, Any] = field(default_factory=dict)
    """What was measured since the last logged step."""


def _make_contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    seen: set[int] = set()
    unique: dict[str, Tensor] = {}
    for name, tensor in tensors.items():  # tied weights appear twice in a state dict and once on disk
        if not tensor.numel() or tensor.data_ptr() not in seen:
            unique[name] = tensor.detach().cpu().contiguous()
        seen.add(tensor.data_ptr())
    return unique


def _optimizer_tensors(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split an optimizer's state dict into tensors by "index.key" and the plain rest."""
    tensors: dict[str, Tensor] = {}
    plain: dict[str, dict[str, Any]] = {}
    for index, values in state["state"].items():
        for key, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{key}"] = value.detach().cpu().contiguous()
            else:
                plain.setdefault(str(index), {})[key] = value
    return tensors, {"groups": state["param_groups"], "state": plain}


def save(out: Path, snapshot: Snapshot) -> Path:
    """Write a checkpoint and drop all but the newest KEPT that are whole; DiskFailed leaves earlier ones untouched."""
    folder = out / "checkpoints"
    target = folder / f"step-{snapshot.step:08d}"
    tensors, plain = _optimizer_tensors(snapshot.optimizer)
    with disk_errors(target):
        folder.mkdir(parents=True, exist_ok=True)
        with own_folder(folder, ".tmp-step-") as temporary:
            _write(temporary, snapshot, tensors, plain)
            shutil.rmtree(target, ignore_errors=True)
            temporary.rename(target)
        sync_folder(folder)
        found = _find_checkpoints(out)
        if len(found) > KEPT:
            whole = [path for path in found if path == target or _is_whole(path)]
            for old in set(found) - set(whole[-KEPT:]):
                shutil.rmtree(old)
    return target


def _write(folder: Path, snapshot: Snapshot, tensors: dict[str, Tensor], plain: dict[str, Any]) -> None:
    save_tensors(_make_contiguous(snapshot.student), folder / "student.safetensors")
    save_tensors(_make_contiguous(snapshot.projectors), folder / "projectors.safetensors")
    save_tensors({**tensors, "random": snapshot.random}, folder / "optimizer.safetensors")
    state = {
        "step": snapshot.step, "fingerprint": dict(snapshot.fingerprint), "optimizer": plain,
        "window": dict(snapshot.window),
    }  # fmt: skip
    (folder / "state.json").write_text(json.dumps(state, sort_keys=True))
    sums = {path.name: sha256_of(path) for path in sorted(folder.iterdir())}
    (folder / "COMPLETE").write_text(json.dumps(sums, sort_keys=True))
    for path in folder.iterdir():
        with path.open("rb+") as stream:
            os.fsync(stream.fileno())
    sync_folder(folder)


def _find_checkpoints(out: Path) -> list[Path]:
    return sorted(path for path in (out / "checkpoints").glob("step-[0-9]*") if (path / "COMPLETE").is_file())


def drop_checkpoints(out: Path) -> None:
    """Remove every checkpoint, after the student was exported."""
    with disk_errors(out):
        shutil.rmtree(out / "checkpoints", ignore_errors=True)


def load_newest(out: Path) -> tuple[Snapshot | None, list[str]]:
    """The newest checkpoint that is whole, and a line for each newer one that is not."""
    skipped: list[str] = []
    for path in reversed(_find_checkpoints(out)):
        try:
            return _load(path), skipped
        except UNREADABLE as error:
            skipped.append(f"{path} is damaged and was passed over: {error}")
    return None, skipped


UNREADABLE: Final = (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError, BadData)


def _is_whole(path: Path) -> bool:
    try:
        _check(path)
    except UNREADABLE:
        return False
    return True


def _check(path: Path) -> None:
    sums = json.loads((path / "COMPLETE").read_text())
    for name in FILES:
        if sha256_of(path / name) != sums[name]:
            raise BadData(f"{name} does not match its digest")


def _load(path: Path) -> Snapshot:
    _check(path)
    state = json.loads((path / "state.json").read_text())
    tensors = load_file(path / "optimizer.safetensors")
    random = tensors.pop("random")
    values: dict[int, dict[str, Any]] = {int(i): dict(v) for i, v in state["optimizer"]["state"].items()}
    for key, tensor in tensors.items():
        index, name = key.split(".", 1)
        values.setdefault(int(index), {})[name] = tensor
    return Snapshot(
        step=int(state["step"]),
        student=load_file(path / "student.safetensors"),
        projectors=load_file(path / "projectors.safetensors"),
        optimizer={"state": values, "param_groups": state["optimizer"]["groups"]},
        random=random.to(torch.uint8),
        fingerprint=state["fingerprint"],
        window=state.get("window", {}),
    )

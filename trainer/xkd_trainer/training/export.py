"""The finished student: a folder that AutoModelForCausalLM and AutoTokenizer load, and where it came from."""

import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from xkd_schemas.cache.manifest import OWN
from xkd_schemas.digests import digest
from xkd_schemas.durable_files import disk_errors, replace, save_folder, sha256_of
from xkd_schemas.text.templates import AUTO
from xkd_trainer.models.provenance import PROVENANCE, _provenance, check_student
from xkd_trainer.models.tensor_files import tensor_errors

UNFINISHED = "xkd-unfinished.json"
"""Names the run while its student is being saved."""


def export_student(
    out: Path, student: PreTrainedModel, tokenizer: Any, fingerprint: Mapping[str, Any], *, ends: Sequence[int]
) -> None:
    """Save weights (safetensors), configuration, tokenizer, and last `xkd.json`, the mark of a finished folder.

    Every file is durable before the mark is made, which holds their digests and its own.

    `ends` are the tokens at which a generation stops (`turn_ends`).
    """
    replace(out / UNFINISHED, json.dumps({"run": dict(fingerprint)}).encode())
    student.generation_config.eos_token_id = list(ends) if len(ends) > 1 else ends[0]
    student.generation_config.pad_token_id = (
        tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    )

    def save(folder: Path) -> None:
        with tensor_errors():
            student.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    names = save_folder(out, save)
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
    with disk_errors(out):
        (out / UNFINISHED).unlink()


def is_finished(out: Path, fingerprint: Mapping[str, Any]) -> bool:
    """True where `out` holds the finished student of exactly this run.

    Raises:
        BadData: A file of a finished student is not there or not as it was saved.
    """
    check_student(out, weights=True)
    return _names_run(out / PROVENANCE, fingerprint)


def was_exporting(out: Path, fingerprint: Mapping[str, Any]) -> bool:
    """True where exactly this run was stopped while it saved its student to `out`."""
    return _names_run(out / UNFINISHED, fingerprint)


def _names_run(path: Path, fingerprint: Mapping[str, Any]) -> bool:
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return bool(stored.get("run") == json.loads(json.dumps(dict(fingerprint))))


def template_of(folder: Path) -> str:
    """The template a student was trained with; "auto" for a folder that was not made here."""
    return str(_run_of(folder).get("template", AUTO))


def thinking_of(folder: Path) -> bool | None:
    """What its chat template was given as `enable_thinking`; None where it was given nothing."""
    found: bool | None = _run_of(folder).get("enable_thinking")
    return found


def _run_of(folder: Path) -> dict[str, Any]:
    run: dict[str, Any] = _provenance(folder).get("run", {})
    return run

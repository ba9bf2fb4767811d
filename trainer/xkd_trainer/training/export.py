"""The finished student: a folder that AutoModelForCausalLM and AutoTokenizer load, and where it came from."""

import json
import platform
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from xkd_schemas.cache.manifest import OWN
from xkd_schemas.durable_files import digest, disk_errors, replace, save_folder, sha256_of
from xkd_schemas.text.templates import AUTO
from xkd_schemas.tokens import END, Bools, Int32s
from xkd_trainer.models.student_files import PROVENANCE, check_student, read_provenance, tensor_errors

UNFINISHED = "xkd-unfinished.json"
"""Names the run while its student is being saved."""


def export_student(
    out: Path, student: PreTrainedModel, tokenizer: Any, fingerprint: Mapping[str, Any], *, ends: Sequence[int]
) -> None:
    """Save weights (safetensors), configuration, tokenizer, and last `xkd.json`, the mark of a finished folder.

    Every file is durable before the mark is made, which holds their digests and its own.

    `ends` are the tokens at which a generation stops (`find_turn_ends`).
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
    """True where `out` holds the finished student of exactly this run; BadData where a file is not as it was saved."""
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


def find_learnt_ends(rows: Iterable[tuple[Int32s, Any, Bools]]) -> set[int]:
    """The ids of the end tokens that are targets, of (ids, kinds, targets) of each row.

    A chat template may end a turn with another token than the tokenizer's end token (`<|im_end|>`, `<end_of_turn>`,
    `<|eot_id|>`). A generation that stops at the latter alone runs on behind the answer.
    """
    found: set[int] = set()
    for ids_T, kinds_T, targets_T in rows:
        found.update(ids_T[(kinds_T == END) & targets_T].tolist())
    return found


def find_turn_ends(model: PreTrainedModel, tokenizer: Any, learnt: Iterable[int]) -> list[int]:
    """All ids that end a turn, ascending: what was learnt, the tokenizer's, and the model's generation config's."""
    own = model.generation_config.eos_token_id
    before = own if isinstance(own, (list, tuple)) else [] if own is None else [own]
    return sorted({int(i) for i in (*before, *learnt, tokenizer.eos_token_id)})


def template_of(folder: Path) -> str:
    """The template a student was trained with; "auto" for a folder that was not made here."""
    return str(read_provenance(folder).get("run", {}).get("template", AUTO))


def thinking_of(folder: Path) -> bool | None:
    """What its chat template was given as `enable_thinking`; None where it was given nothing."""
    found: bool | None = read_provenance(folder).get("run", {}).get("enable_thinking")
    return found

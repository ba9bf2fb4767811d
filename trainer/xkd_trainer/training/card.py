"""The model card of a finished student, README.md, and the way to the Hugging Face hub.

Names, paths and settings are a user's texts: they stand in indented blocks, which no text can leave.
"""

import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCardData, get_token

from xkd_schemas.cache.manifest import Plan, read_record
from xkd_schemas.config import RunConfig
from xkd_schemas.durable_files import replace
from xkd_schemas.errors import InputMissing, UsageError
from xkd_trainer.data.cache import Cache
from xkd_trainer.models.loading import check_student, short
from xkd_trainer.run_folder import PROVENANCE, read_provenance
from xkd_trainer.training.files import CARD

_START, _END = "<!-- evaluation -->\n", "<!-- end of evaluation -->\n"

_CARD = f"""---
{{yaml}}
---

# A student distilled with XKD

It was trained from a cache of what a teacher knew about a corpus. `xkd.json` has the digest of every file, all
settings and versions. `AutoModelForCausalLM.from_pretrained` opens this folder; its template is the tokenizer's.

## Evaluation

{_START}Not measured yet: `xkd-train eval FOLDER --data HELD_OUT --card` writes it here.
{_END}
## Command

{{command}}

## Cache, losses and settings

{{details}}
"""


def card_text(run: RunConfig, cache: Cache, fingerprint: Mapping[str, Any], last: Mapping[str, float]) -> str:
    """README.md: what the hub reads, then command, cache, losses and settings; `last` are the last logged means."""
    named = run.student.model
    is_public = re.fullmatch(r"[\w.-]+/[\w.-]+", named) and not Path(named).exists()
    metadata = ModelCardData(
        base_model=named if is_public else None, library_name="transformers", pipeline_tag="text-generation",
        tags=["xkd", "knowledge-distillation"],
    )  # fmt: skip
    keys = ("student", "template", "losses", "weights", "projectors", "steps", "train")
    about = {"caches": [_describe(each) for each in getattr(cache, "caches", [cache])]}
    about |= {key: fingerprint[key] for key in keys if key in fingerprint} | {"last logged means": dict(last)}
    details = json.dumps(about, indent=2, sort_keys=True)
    return _CARD.format(yaml=metadata.to_yaml(), command=_indent(command_of(run)), details=_indent(details))


def _indent(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())


def _describe(cache: Cache) -> dict[str, Any]:
    """Roots of a cache's tables, and which rows it was made of; of a path only the name."""
    tables = (cache.documents, cache.teachers, *cache.beside, cache.students)
    sources = {unit.source for unit in read_record(cache.documents.folder / "plan.json", Plan).units}
    return {
        "roots": {table.name: table.manifest.root for table in tables},
        "documents": len(cache.usable),
        "data": sorted(Path(name).name if Path(name).is_absolute() else name for name in sources),
    }


def command_of(run: RunConfig) -> str:
    """The command that trains the same student.

    >>> command_of(RunConfig(cache="c", student={"model": "S"}, train={"loss": "mta", "out": "a b", "lr": 1e-4}))
    "xkd-train --student S --shards c --out 'a b' --loss mta --lr 0.0001"
    """
    flags: list[tuple[str, Any]] = [("student", run.student.model)]
    flags += [("student-tokenizer", run.student.tokenizer)] if run.student.tokenizer else []
    flags += [("shards", shards) for shards in run.train.shards or [run.cache]]
    changed = {n: v for n, v in run.train.model_dump(exclude_defaults=True).items() if n != "shards"}
    flags += [(name.replace("_", "-"), value) for name, value in changed.items() if not isinstance(value, dict)]
    tables = {f"train.{n}": v for n, v in changed.items() if isinstance(v, dict)}
    tables |= {f"losses.{n}": v for n, v in run.losses.items()}
    flags += [("set", f"{n}.{key}={json.dumps(v)}") for n, values in tables.items() for key, v in values.items()]
    return shlex.join(["xkd-train", *(word for name, value in flags for word in (f"--{name}", str(value)))])


def write_evaluation(folder: Path, result: Mapping[str, Any]) -> None:
    """Put what `eval` found in its place of the card; UsageError where the card has none."""
    path = folder / CARD
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    before, start, rest = text.partition(_START)
    _, end, after = rest.partition(_END)
    if not (start and end):
        raise UsageError(f"{path} has no place for an evaluation", kept="it as it is", fix=f"put {_START.strip()} "
                         f"and {_END.strip()} on lines of their own, or leave --card out")  # fmt: skip
    block = _indent(json.dumps(dict(result), indent=2, sort_keys=True))
    replace(path, f"{before}{start}{block}\n{end}{after}".encode())


def push(folder: Path, name: str) -> str:
    """Upload a finished student to the hub, where it is private unless it is there already; its address.

    Raises:
        BadData: A file is not as it was saved.
        UsageError, InputMissing: There is no finished student, or the hub did not take it; the folder is as it was.
    """
    check_student(folder, weights=True)
    files = sorted(read_provenance(folder).get("files", {}))
    if not files:
        raise UsageError(f"{folder} holds no finished student to push", fix="train it first")
    try:
        api = HfApi()
        api.create_repo(name, private=True, exist_ok=True)
        api.upload_folder(
            repo_id=name, folder_path=folder, allow_patterns=[*files, CARD, PROVENANCE],
            commit_message="A student distilled with XKD",
        )  # fmt: skip
    except Exception as error:  # of the hub's library, of the network below it, of a disk
        said = getattr(error, "server_message", None) or short(error)
        said = said.replace(get_token() or "\0", "...")
        again = shlex.join(["hf", "upload", name, str(folder), ".", "--exclude", "checkpoints/*"])
        raise InputMissing(f"{name} was not pushed: {said}", kept=f"the student in {folder}", fix=again) from None
    return f"{api.endpoint}/{name}"

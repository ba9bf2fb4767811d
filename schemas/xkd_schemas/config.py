"""The run file: one TOML that says what is cached and what is trained. Unknown keys are errors.

`--set teacher.dtype=float32` overrides one value; flags of a command override both.
"""

import difflib
import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from xkd_schemas.dtypes import AUTO, DtypeName
from xkd_schemas.errors import InputMissing, UsageError

TemplateName = Literal["auto", "none", "alpaca", "chat"]
"""auto: chat where the tokenizer has a chat template, none elsewhere."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DocumentsSection(_Section):
    """What is read and how it is parsed."""

    corpus: tuple[str, ...] = ()
    """Files, folders or data set names."""
    form: Literal["auto", "prompt_response", "alpaca", "messages", "text"] = "auto"
    columns: dict[str, str] = {}
    """Our field name -> the corpus's column name."""
    parser: Literal["spacy", "benepar"] = "spacy"
    spacy_model: str = "en_core_web_sm"
    """spaCy pipeline: an installed package or a folder."""
    parser_model: str | None = None
    """Folder of the benepar model."""
    max_words: int = Field(default=12, ge=0)
    """Longest phrase in words, 0 for no limit."""
    drop_contained: bool | None = None
    """Drop phrases inside other phrases; None is the parser's default."""
    max_prompt_tokens: int = Field(default=0, ge=0)
    """Longer prompts lose the end of their text; template tokens count, 0 for no limit."""
    prompt_tokenizer: str = ""
    """Folder or hub name of the tokenizer that counts them."""
    prompt_template: Literal["none", "alpaca", "chat"] = "none"
    """Template around the prompts that are counted."""
    rows_per_shard: int = Field(default=0, ge=0)
    """0: as many as the teacher reads in about a minute, decided when the cache is begun."""
    max_chars: int = Field(default=1_000_000, ge=1)
    max_reject: float = Field(default=0.01, ge=0, le=1)
    """Share of rows that may be unusable before the run stops."""


class TeacherSection(_Section):
    """Which teacher runs, and what is kept of it."""

    model: str = ""
    name: str = ""
    """Name of its table; empty for the model's own name."""
    template: TemplateName = "auto"
    enable_thinking: bool | None = None
    """Handed to the chat template; None leaves it to the template."""
    max_tokens: int = Field(default=1024, ge=8)
    dtype: DtypeName = AUTO
    """auto: that of a table that is begun, otherwise what this machine computes fast."""
    codec: Literal["bf16", "bf16-planes", "int8"] = "bf16"
    """How states and span vectors are stored; bf16-planes is exact and smaller, int8 half the size."""
    batch_tokens: int = Field(default=4096, ge=8)
    topk: int = Field(default=64, ge=1)
    """Classes kept of each prediction, where a loss needs the largest logits."""
    samples: int = Field(default=16, ge=1)
    """Classes drawn of each prediction, where a loss needs a sample of the distribution."""
    threads: int = Field(default=1, ge=1)
    """CPU threads of one worker."""
    losses: tuple[str, ...] = ("mta", "sra", "dwa")
    """Losses whose signals are kept."""
    word_layers: tuple[int, ...] = ()
    """Teacher layers read on words; empty for half of the depth."""
    phrase_layers: tuple[int, ...] = ()
    """Teacher layers read on phrases; empty for three quarters of the depth and the last."""


class StudentSection(_Section):
    """Which student learns."""

    model: str = ""
    """Folder, hub name, or `new:FAMILY,layers=4,width=256`."""
    tokenizer: str = ""
    """Folder or hub name; empty for the model's own."""
    name: str = ""
    """Name of its table; empty for the tokenizer's own name."""
    template: TemplateName = "auto"
    enable_thinking: bool | None = None
    """Handed to the chat template; None leaves it to the template."""
    max_tokens: int = Field(default=1024, ge=8)


class TrainSection(_Section):
    """How the student is trained."""

    out: str = ""
    shards: tuple[str, ...] = ()
    """Caches of one teacher that are read as one, CACHE or CACHE=WEIGHT; empty for `cache`."""
    loss: str = "ce"
    """`NAME+NAME`, weighed as in their papers; ce is cross-entropy on the corpus's own responses."""
    epochs: float = Field(default=3.0, gt=0)
    steps: int = Field(default=0, ge=0)
    """Optimizer steps; 0 means `epochs` decides."""
    batch_size: int = Field(default=16, ge=1)
    """Documents of an optimizer step, over all processes."""
    micro_batch_size: int = Field(default=0, ge=0)
    """Documents of one forward pass on one process; 0 means the whole share of the step."""
    lr: float = Field(default=5e-4, gt=0)
    projector_lr: float | None = Field(default=None, gt=0)
    """Of all projectors; None for what each loss's paper has. `losses.NAME.projector_lr` is a loss's own."""
    min_lr_ratio: float = Field(default=0.0, ge=0, le=1)
    """The cosine ends at this share of the learning rate."""
    warmup_ratio: float = Field(default=0.05, ge=0, lt=1)
    weight_decay: float = Field(default=0.01, ge=0)
    """Not applied to biases and norms."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    seed: int = Field(default=0, ge=0)
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    threads: int = Field(default=0, ge=0)
    """CPU threads; 0 leaves torch's choice."""
    log_every: int = Field(default=10, ge=1)
    save_every: int = Field(default=0, ge=0)
    """Checkpoint every so many steps; 0 every ten minutes, and none is left at the end."""


class RunConfig(_Section):
    """Everything one experiment needs."""

    cache: str = "cache"
    workers: int = Field(default=0, ge=0)
    """Ray actors; 0 works in this process. Changes no byte."""
    documents: DocumentsSection = DocumentsSection()
    teacher: TeacherSection = TeacherSection()
    student: StudentSection = StudentSection()
    train: TrainSection = TrainSection()
    losses: dict[str, dict[str, Any]] = {}
    """Settings of single losses, checked by the loss: `[losses.mta] hid = "off"`."""

    @classmethod
    def load(cls, path: str | Path | None = None, **changed: Any) -> "RunConfig":
        """Read a run file, with other values for some keys: `RunConfig.load(path, teacher={"codec": "int8"})`.

        Args:
            path: A TOML file; None for the defaults.
            changed: Values by key; those of a section as a dict, which leaves its other keys as they are.

        Raises:
            InputMissing: The file is not there or not TOML.
            UsageError: A key or value is wrong.
        """
        return _checked(_merged(_read(path), changed), path or "RunConfig.load")


def default_of(key: str) -> str:
    """What `section.key` is where nobody sets it, for the help of a flag.

    >>> default_of("teacher.losses"), default_of("train.lr"), default_of("cache")
    ('mta,sra,dwa', '0.0005', 'cache')
    """
    value: Any = RunConfig()
    for part in key.split("."):
        value = getattr(value, part)
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def load_run(path: Path | None, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run file and apply `section.key=value` overrides; without a path, defaults and overrides only.

    Raises:
        InputMissing: The file is not there or not TOML.
        UsageError: A key or value is wrong; the message names it and suggests the nearest known key.
    """
    data = _read(path)
    for override in overrides:
        _apply(data, override)
    return _checked(data, path or "--set")


def _read(path: str | Path | None) -> dict[str, Any]:
    """The keys of a run file; none without a path."""
    if path is None:
        return {}
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputMissing(f"run file {path}: {error.strerror}", fix="give the path of a .toml file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputMissing(f"run file {path} is not TOML: {error}", fix="mend that line") from None


def _checked(data: dict[str, Any], where: str | Path) -> RunConfig:
    try:
        return RunConfig.model_validate(data)
    except ValidationError as error:
        raise _explained(str(where), error) from None


def _merged(data: Mapping[str, Any], changed: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of both; sections are merged, other values are those of `changed`.

    >>> _merged({"a": {"b": 1, "c": 2}}, {"a": {"c": 3}})
    {'a': {'b': 1, 'c': 3}}
    """
    sections = {key for key in changed if isinstance(data.get(key), dict) and isinstance(changed[key], Mapping)}
    return {**data, **changed, **{key: _merged(data[key], changed[key]) for key in sections}}


def _apply(data: dict[str, Any], override: str) -> None:
    dotted, equals, text = override.partition("=")
    if not equals:
        raise UsageError(f"--set {override}: no '='", fix="write --set section.key=value")
    *sections, key = dotted.strip().split(".")
    for section in sections:
        data = data.setdefault(section, {})
        if not isinstance(data, dict):
            raise UsageError(f"--set {override}: {section} is not a section", fix="write --set section.key=value")
    data[key] = toml_value(text.strip())


def toml_value(text: str) -> Any:
    """A TOML value; what is not one is taken as a plain string.

    >>> toml_value("0.5"), toml_value("chat")
    (0.5, 'chat')
    """
    try:
        return tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        return text


def toml_text(value: Any) -> str:
    """A value of a flag as TOML text; `toml_value` gives it back, whatever characters a path may hold.

    >>> toml_text(["a b", 2, True])
    '["a b", 2, true]'
    """
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(toml_text(item) for item in value) + "]"
    plain = value if isinstance(value, (bool, int, float)) else str(value)
    return json.dumps(plain, ensure_ascii=False).replace("\x7f", "\\u007f")  # JSON's escapes are TOML's


def _explained(where: str, error: ValidationError) -> UsageError:
    first = error.errors()[0]
    dotted = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(first["loc"][-1]), _known(first["loc"][:-1]), n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"use one of: {', '.join(_known(first['loc'][:-1]))}"
        return UsageError(f"{where}: {dotted!r} is not a key", fix=hint)
    return UsageError(f"{where}: {dotted}: {first['msg']}, found {first['input']!r}", fix=f"change {dotted}")


def _known(path: Sequence[int | str]) -> list[str]:
    model: Any = RunConfig
    for part in path:
        field = model.model_fields.get(str(part))
        model = field.annotation if field is not None else None
        if not (isinstance(model, type) and issubclass(model, BaseModel)):
            return []
    return list(model.model_fields)


def settings_error(loss: str, error: ValidationError, fields: Mapping[str, Any]) -> UsageError:
    """One line for settings of a loss that do not fit."""
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, list(fields), n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(fields)}"
        return UsageError(f"losses.{loss}: {key!r} is not a setting", fix=hint)
    choices = get_args(fields[key].annotation) if key in fields else ()
    known = f" (one of {', '.join(map(str, choices))})" if choices else ""
    return UsageError(f"losses.{loss}.{key}: {first['msg']}{known}, found {first['input']!r}", fix=f"change {key}")

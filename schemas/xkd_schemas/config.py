"""The run file: one TOML that says what is cached and what is trained. Unknown keys are errors.

A field is declared once: its name is the key in the run file and the flag of a command (`batch_size` is
`--batch-size`), and its docstring is the help of that flag. A flag wins over `--set teacher.dtype=float32`, and that
over the run file.
"""

import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from xkd_schemas.errors import InputMissing, UsageError, run_error

AUTO: Final = "auto"
_DTYPES: Final = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def dtype_name(name: Any) -> Any:
    """The full name of a dtype; anything else as it is."""
    return _DTYPES.get(name, name) if isinstance(name, str) else name


DtypeName = Annotated[Literal["auto", "bfloat16", "float16", "float32"], BeforeValidator(dtype_name)]
TemplateName = Literal["auto", "none", "alpaca", "chat"]
"""auto: chat where the tokenizer has a chat template, none elsewhere."""


def _split(value: Any) -> Any:
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def _known_codec(name: str) -> str:
    from xkd_schemas.codecs import CODECS  # pyarrow, for those alone who name a codec

    if name not in CODECS:
        raise ValueError(f"Input should be {' or '.join(CODECS)}")
    return name


MEMORY: Final = r"^(\d+|cpu|mps|xpu:\d+)=\d+(\.\d+)?[KMGT]i?B$"
"""A device and a size."""
COMMAS: Final = BeforeValidator(_split)
"""Marks a tuple that may also be written as one text, `a,b`."""


class Section(BaseModel):
    """A table of the run file."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class DocumentsSection(Section):
    """What is read and how it is parsed."""

    corpus: tuple[str, ...] = ()
    """Files, folders, addresses or data set names."""
    form: str = "auto"
    """Form of the rows: auto, prompt_response, alpaca, messages or text."""
    columns: dict[str, str] = {}
    """Name of a field of the form, and the corpus's column that holds it, as prompt=question."""
    parser: str = "spacy"
    """What finds words and phrases: spacy (noun chunks and verb groups) or benepar (constituents NP and VP)."""
    spacy_model: str = "en_core_web_sm"
    """spaCy pipeline: an installed package or a folder; for benepar it cuts words and sentences."""
    parser_model: str | None = None
    """Folder of the benepar model; only for benepar."""
    max_words: int = Field(default=12, ge=0)
    """Longest phrase in words; 0 for no limit."""
    drop_contained: bool | None = None
    """Drop phrases inside other phrases; spacy does and benepar does not unless this is given."""
    max_prompt_tokens: int = Field(default=0, ge=0)
    """Longer prompts lose the end of their text; template tokens count, 0 for no limit."""
    prompt_tokenizer: str = ""
    """Folder or hub name of the tokenizer that counts the tokens of prompts; only for a limit."""
    prompt_template: Literal["none", "alpaca", "chat"] = "none"
    """Template around the prompts that are counted."""
    rows_per_shard: int = Field(default=0, ge=0)
    """Rows of a shard; 0 for as many as the teacher reads in about a minute, decided when the cache is begun."""
    max_chars: int = Field(default=1_000_000, ge=1)
    """Longest text in characters; longer ones are rejected."""
    max_reject: float = Field(default=0.01, ge=0, le=1)
    """Share of rows that may be unusable before the run stops."""


class TeacherSection(Section):
    """Which teacher runs, and what is kept of it."""

    model: str = ""
    """Folder, .gguf file or hub name of the teacher; needed wherever it runs."""
    name: str = ""
    """Name of the teacher's table: a new one is named after its model, and of several one has to be named."""
    template: TemplateName = "auto"
    """Template around the teacher's texts; auto is chat where its tokenizer has a chat template."""
    enable_thinking: bool | None = None
    """Handed to the chat template, which decides unless this is given."""
    max_tokens: int = Field(default=1024, ge=8)
    """Longest document in tokens; a longer one is cut at a word border."""
    dtype: DtypeName = AUTO
    """auto is that of a table that is begun, otherwise what this machine computes fast."""
    codec: Annotated[str, AfterValidator(_known_codec)] = "bf16"
    """How states and span vectors are stored: bf16, bf16-planes (exact and smaller) or int8 (half the size)."""
    batch_tokens: int = Field(default=4096, ge=8)
    """Tokens of a forward pass, padding included; a longer document runs alone."""
    topk: int = Field(default=64, ge=1)
    """Classes kept of each prediction, where a loss needs the largest logits."""
    samples: int = Field(default=16, ge=1)
    """Classes drawn of each prediction, where a loss needs a sample of the distribution."""
    threads: int = Field(default=1, ge=1)
    """CPU threads of one worker; the last bits of results depend on it."""
    stream_layers: bool | None = None
    """Read the teacher's blocks from disk one after another, each for all documents of a shard; done where its weights
    do not fit unless this is given. Changes no result."""
    device_map: str = ""
    """Where the weights go if one device does not hold them: auto, balanced, sequential, a JSON file or one line of
    JSON. auto where a worker has several GPUs."""
    max_memory: Annotated[tuple[Annotated[str, Field(pattern=MEMORY)], ...], COMMAS] = ()
    """Weights that a device takes at most, e.g. 0=20GiB,cpu=60GiB; the rest goes to the next one, at last to disk."""
    losses: Annotated[tuple[str, ...], COMMAS] = ("mta", "sra", "dwa")
    """Losses whose signals are kept."""
    word_layers: Annotated[tuple[int, ...], COMMAS] = ()
    """Teacher layers read on words, e.g. 15; half of the depth unless given."""
    phrase_layers: Annotated[tuple[int, ...], COMMAS] = ()
    """Teacher layers read on phrases, e.g. 22,30; three quarters of the depth and the last unless given."""


class ServedSection(Section):
    """A teacher that runs elsewhere."""

    url: str = ""
    """Address of an OpenAI-compatible server, as http://localhost:8000/v1; - writes the prompts and asks nobody."""
    model: str = ""
    """Name of the model on the server; the only one that it lists unless given."""
    tokenizer: str = ""
    """Folder or hub name of the served teacher's tokenizer; that of its model unless given."""
    key_variable: str = "XKD_API_KEY"
    """Environment variable with the server's key; no key is sent where it is not set."""
    requests: int = Field(default=16, ge=1)
    """Requests that are open at a time."""
    timeout: float = Field(default=120.0, gt=0)
    """Seconds after which a request is given up and sent again."""
    retries: int = Field(default=8, ge=0)
    """Times that a request is sent again before the command ends."""
    echo: bool = False
    """Ask with echo and logprobs, for servers that do not know prompt_logprobs."""


class StudentSection(Section):
    """Which student learns."""

    model: str = ""
    """Folder, hub name, or new:FAMILY as in new:llama,layers=4,width=256; always needed for training."""
    tokenizer: str = ""
    """Folder or hub name of the student's tokenizer; the student's own unless given."""
    name: str = ""
    """Name of the student's table; the tokenizer's own name unless given."""
    template: TemplateName = "auto"
    """Template around the student's texts; auto is chat where its tokenizer has a chat template."""
    enable_thinking: bool | None = None
    """Handed to the chat template, which decides unless this is given."""
    max_tokens: int = Field(default=1024, ge=8)
    """Longest document in tokens; a longer one is cut at a word border."""
    dtype: Annotated[Literal["float32", "bfloat16"], BeforeValidator(dtype_name)] = "float32"
    """Of the weights while they are trained; with train.mixed_precision and without LoRA float32 alone."""
    quantization: Literal["none", "4bit"] = "none"
    """4bit keeps the frozen weights under LoRA in four bits; needs bitsandbytes and a GPU."""


class LoraSection(Section):
    """A LoRA adapter: small matrices beside frozen weights are trained, and nothing else of the student."""

    rank: int = Field(default=0, ge=0)
    """Inner width of the adapter; 0 trains the whole student."""
    alpha: float = Field(default=16.0, gt=0)
    """The adapter is multiplied by alpha / rank."""
    target: Annotated[tuple[str, ...], COMMAS] = ("all-linear",)
    """Names of the linear modules that are adapted, e.g. q_proj,v_proj; all-linear for all but the head."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of the adapter's inputs that are dropped in training."""


class TrainSection(Section):
    """How the student is trained."""

    out: str = ""
    """Folder of the trained student; always needed."""
    shards: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """CACHE, CACHE=WEIGHT or CACHE:STUDENT_TABLE=WEIGHT; several are read as one, and where they have the same
    documents each brings its teacher. The run file's unless given."""
    loss: str = "ce"
    """NAME+NAME, weighed as in their papers, of xkd-train losses; ce is cross-entropy on the corpus's responses."""
    epochs: float = Field(default=3.0, gt=0)
    """Passes over the cache."""
    steps: int = Field(default=0, ge=0)
    """Optimizer steps; 0 for as many as the epochs have."""
    batch_size: int = Field(default=16, ge=1)
    """Documents of an optimizer step, over all processes."""
    micro_batch_size: int = Field(default=0, ge=0)
    """Documents of one forward pass on one process; 0 for its whole share of the step."""
    batch_tokens: int = Field(default=0, ge=0)
    """Student tokens of one forward pass on one process, padding included; a longer document runs alone. Documents of
    like length go together, and a step has the same documents as without. 0 for no limit."""
    packing: bool = False
    """Several documents in one row of the student's forward pass, kept apart, so that little padding is computed."""
    lr: float = Field(default=5e-4, gt=0)
    """Peak learning rate of the student."""
    projector_lr: float | None = Field(default=None, gt=0)
    """Of all projectors; each loss's paper decides unless given. `losses.NAME.projector_lr` is a loss's own."""
    min_lr_ratio: float = Field(default=0.0, ge=0, le=1)
    """The cosine ends at this share of the learning rate."""
    warmup_ratio: float = Field(default=0.05, ge=0, lt=1)
    """Share of the steps in which the learning rate rises."""
    weight_decay: float = Field(default=0.01, ge=0)
    """Not applied to biases and norms."""
    optimizer: Literal["adamw", "adamw_fused", "adafactor", "adamw_8bit"] = "adamw"
    """adamw_fused is faster, adafactor holds next to nothing for each weight, adamw_8bit needs bitsandbytes."""
    gradient_checkpointing: bool = False
    """Compute each block a second time in the backward pass instead of keeping what is inside it."""
    compile: bool = False
    """Compile the student's blocks with torch.compile; the first steps take minutes."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Longer gradients are scaled down to this norm."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Of order, new weights and dropout."""
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    """Forward passes in a shorter dtype; weights stay float32."""
    save_dtype: DtypeName = AUTO
    """Of the finished student's weights, which are trained in float32; auto is that of the model it began as."""
    lora: LoraSection = LoraSection()
    threads: int = Field(default=0, ge=0)
    """CPU threads; 0 leaves torch's choice."""
    log_every: int = Field(default=10, ge=1)
    """Steps between two lines of metrics.jsonl."""
    save_every: int = Field(default=0, ge=0)
    """Steps between two checkpoints; 0 for one every ten minutes, and none is left at the end."""
    eval_data: str = ""
    """Held-out rows, in the form of [documents]: a file, folder, address or data set name."""
    eval_shards: str = ""
    """Cache of the held-out rows, or CACHE:STUDENT_TABLE: adds agreement with the teacher."""
    eval_every: int = Field(default=0, ge=0)
    """Steps between two evaluations on eval_data; 0 for one at the end."""
    patience: int = Field(default=0, ge=0)
    """Training stops after so many evaluations without a better one; 0 for never."""
    load_best_at_end: bool = True
    """Export the student with the fewest bits per byte on eval_data; false for that of the last step."""
    track: Annotated[tuple[Literal["tensorboard", "trackio", "wandb", "mlflow"], ...], COMMAS] = ()
    """Trackers that get every logged value: tensorboard, trackio, wandb, mlflow."""


class GenerationSection(Section):
    """How answers are generated, and which of them are kept."""

    n: int = Field(default=1, ge=1)
    """Answers to each prompt."""
    temperature: float = Field(default=1.0, ge=0)
    """Divides the logits; 0 takes the likeliest token each time."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Only the likeliest tokens that have this probability together; 1 for all."""
    top_k: int = Field(default=0, ge=0)
    """Only so many likeliest tokens; 0 for all."""
    max_new_tokens: int = Field(default=512, ge=1)
    """Longest answer in tokens."""
    seed: int = Field(default=0, ge=0)
    """With the number of the row and of the answer it decides each draw."""
    batch_size: int = Field(default=16, ge=1)
    """Answers that are generated together; the last bits of scores, and so single tokens, depend on it."""
    threads: int = Field(default=1, ge=1)
    """CPU threads of one worker; single tokens may depend on it."""
    min_tokens: int = Field(default=1, ge=0)
    """Shorter answers are dropped; the end token is not counted."""
    max_repeat: int = Field(default=32, ge=0)
    """Answers that end in one piece three times or more, so many tokens together, are dropped; 0 keeps them."""
    keep_cut: bool = False
    """Keep answers that max_new_tokens cut; in training they would be learnt with an end."""
    policy: Annotated[str, Field(max_length=40)] = ""
    """Field `policy` of every row, which losses.ce.skip can name."""


class RunConfig(Section):
    """Everything one experiment needs; the workers change no byte."""

    cache: str = "cache"
    """Cache folder."""
    workers: int = Field(default=0, ge=0)
    """Ray actors; 0 works in this process."""
    gpus_per_worker: float = Field(default=0.0, ge=0)
    """GPUs of each actor."""
    ray_address: str | None = None
    """Ray cluster to join; one is started here unless given."""
    stall_timeout: float | None = Field(default=None, ge=1)
    """Seconds after which a shard hangs; 5 times the median and at least 300 unless given."""
    documents: DocumentsSection = DocumentsSection()
    teacher: TeacherSection = TeacherSection()
    served: ServedSection = ServedSection()
    student: StudentSection = StudentSection()
    generation: GenerationSection = GenerationSection()
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
        return _check(_merge(_read(path), changed), path, {})


def load_run(
    path: Path | None, overrides: Iterable[str] = (), flags: Iterable[tuple[str, str, Any]] = ()
) -> RunConfig:
    """Read a run file, then apply `section.key=value` overrides, then flags as (flag, key, value).

    Errors as `RunConfig.load`; the message names the flag and suggests the nearest known key.
    """
    data = _read(path)
    typed: dict[str, str] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise UsageError(f"--set {override}: no '='", fix="write --set section.key=value")
        _put(data, key.strip(), toml_value(text.strip()), f"--set {override}")
        typed[key.strip()] = "--set"
    for flag, key, value in flags:
        _put(data, key, value, flag)
        typed[key] = flag
    return _check(data, path, typed)


def change_values(run: RunConfig, values: Mapping[str, Any], flag: str) -> RunConfig:
    """The run file with other values by dotted key; UsageError names the flag that asked for them."""
    data = run.model_dump(exclude_unset=True)
    for key, value in values.items():
        _put(data, key, value, flag)
    return _check(data, None, dict.fromkeys(values, flag))


def _check(data: dict[str, Any], path: str | Path | None, typed: Mapping[str, str]) -> RunConfig:
    try:
        return RunConfig.model_validate(data)
    except ValidationError as error:
        raise run_error(str(path or "run file"), typed, error, RunConfig) from None


def _merge(data: Mapping[str, Any], changed: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of both; sections are merged, other values are those of `changed`.

    >>> _merge({"a": {"b": 1, "c": 2}}, {"a": {"c": 3}})
    {'a': {'b': 1, 'c': 3}}
    """
    sections = {key for key in changed if isinstance(data.get(key), dict) and isinstance(changed[key], Mapping)}
    return {**data, **changed, **{key: _merge(data[key], changed[key]) for key in sections}}


def _read(path: str | Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise InputMissing(f"run file {path}: {error.strerror}", fix="give the path of a .toml file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputMissing(f"run file {path} is not TOML: {error}", fix="fix that line") from None


def _put(data: dict[str, Any], dotted: str, value: Any, typed: str) -> None:
    *sections, key = dotted.split(".")
    for section in sections:
        data = data.setdefault(section, {})
        if not isinstance(data, dict):
            raise UsageError(f"{typed}: {section} is not a section", fix="write --set section.key=value")
    data[key] = value


def toml_value(text: str) -> Any:
    """A TOML value; what is not one is taken as a plain string."""
    try:
        return tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        return text

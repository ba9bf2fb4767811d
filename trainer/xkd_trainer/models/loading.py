"""Load causal language models from a folder, a hub name or a GGUF file; refuse what could run foreign code.

A finished student's folder has `xkd.json`, which says where it came from and holds the digest of every file beside it.
"""

import contextlib
import errno
import functools
import json
import logging
import os
import re
import tempfile
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.utils import logging as hub_logging
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.quantizers import AutoHfQuantizer
from transformers.utils import logging as transformers_logging

from xkd_schemas.cache.table import check_tokenizer
from xkd_schemas.config import AUTO
from xkd_schemas.console import note
from xkd_schemas.durable_files import sha256_of
from xkd_schemas.errors import BadData, InputMissing, Refused, UsageError
from xkd_schemas.text.tokenizers import encode_texts
from xkd_trainer.run_folder import PROVENANCE, read_provenance, refusal

COPY_AGAIN: Final = "copy the model folder again"
DEVICE_MAPS: Final = (AUTO, "balanced", "balanced_low_0", "sequential")
_SUSPECT: Final = frozenset({"auto_map", "_attn_implementation_internal", "trust_remote_code", "custom_code"})


def _find_suspects(value: Any) -> set[str]:
    if isinstance(value, dict):  # keys that choose how a part is computed; with a slash, by a kernel of the hub
        kernels = {key for key in value if key.endswith("_implementation") and "/" in json.dumps(value[key])}
        return kernels.union(_SUSPECT & value.keys(), *map(_find_suspects, value.values()))
    return set[str]().union(*map(_find_suspects, value)) if isinstance(value, list) else set()


def _read_json(path: Path) -> Any:
    """What a file says, None where there is none; of half a tokenizer.json the tokenizers library says less."""
    try:
        return json.loads(path.read_bytes()) if path.is_file() else None
    except (ValueError, RecursionError) as error:
        raise InputMissing(f"{path} is not JSON: {error}", fix=COPY_AGAIN) from error


def check_config(folder: Path) -> None:
    """Refuse a model folder whose settings ask for code of their own; InputMissing where a file is not JSON."""
    for path in (folder / f"{name}.json" for name in ("config", "tokenizer_config", "generation_config")):
        if found := _find_suspects(_read_json(path)):
            raise Refused(
                f"{path} has {', '.join(sorted(found))}, which can run code that came with the model",
                fix="use a model of a built-in architecture, or remove the key after reading what it does",
            )


def check_student(folder: Path, *, weights: bool) -> None:
    """Compare the files of a finished student with their digests; without `weights` all but safetensors.

    A folder without `xkd.json` was not made here, or is not finished, and is left alone. BadData where a file is not
    there or not as it was saved.
    """
    for name, expected in read_provenance(folder).get("files", {}).items():
        path = folder / name
        if path.suffix == ".safetensors" and not weights:
            continue
        if not path.is_file() or sha256_of(path) != expected:
            what = "does not match its digest" if path.is_file() else "is not there"
            raise BadData(f"{path} {what} in {PROVENANCE}", fix=refusal(folder))


def short(error: BaseException) -> str:
    """First sentence of a library's long error message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:200] if lines else type(error).__name__


def split_gguf(name: str) -> tuple[str, str | None]:
    """`folder/file.gguf` as (folder, file); any other name as (name, None)."""
    path = Path(name)
    return (str(path.parent), path.name) if path.suffix == ".gguf" else (name, None)


def check_model_name(name: str) -> None:
    """Refuse what is no model, before anything of it is loaded; raises as `load_model`."""
    source, options = model_source(name, weights=False)
    if not Path(source).is_dir():
        with load_errors(name, source):
            AutoConfig.from_pretrained(source, **options)


def stored_dtype(name: str) -> torch.dtype:
    """The dtype of a model that can be loaded, by its configuration; float32 where that says none."""
    source, options = model_source(name, weights=False)
    return AutoConfig.from_pretrained(source, **options).dtype or torch.float32


@contextlib.contextmanager
def load_errors(name: str, source: str) -> Iterator[None]:
    """Turn whatever a library raises for a model that it cannot make into InputMissing, UsageError or Refused."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except OSError as error:
        raise _explain_missing(name, source, error) from error
    except SafetensorError as error:
        raise InputMissing(f"model {name}: broken weights: {short(error)}", fix=COPY_AGAIN) from error
    except ImportError as error:  # a package for this way of quantising, or for this family
        raise InputMissing(f"model {name}: {short(error)}", fix="install it, or use another model") from error
    except Exception as error:
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            raise  # the words are torch's on a CPU
        if split_gguf(name)[1]:  # a damaged one: struct.error, OverflowError and others
            raise InputMissing(
                f"model {name}: this GGUF file cannot be read: {short(error)}",
                fix="copy the file again, or use a model that transformers can read from GGUF",
            ) from error
        raise UsageError(f"model {name} cannot be loaded as a causal language model: {short(error)}") from error


def model_source(name: str, *, weights: bool) -> tuple[str, dict[str, Any]]:
    """`source_of` a model, which has a configuration."""
    source, options = source_of(name, weights=weights)
    if Path(source).is_dir() and "gguf_file" not in options and not (Path(source) / "config.json").is_file():
        raise InputMissing(f"model {name}: the folder has no config.json", fix="give a folder that holds a model")
    return source, options


def source_of(name: str, *, weights: bool) -> tuple[str, dict[str, Any]]:
    """What `from_pretrained` is given for a folder, a .gguf file or a hub name; the only way to it.

    Its settings were read before and ask for no code. A hub name is loaded at the commit that they are of. The files
    of a finished student are compared with their digests; with `weights` those of the weights too.

    Raises:
        InputMissing: There is no such file or hub name.
        Refused: The settings name code that comes with the model, or a kernel of the hub.
        BadData: A finished student is damaged.
    """
    folder, gguf = split_gguf(name)
    options: dict[str, Any] = {"trust_remote_code": False}
    if gguf is not None:
        if not Path(name).is_file():
            raise InputMissing(f"model {name} is not there", fix="give the path of a .gguf file")
        options["gguf_file"] = gguf
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    hub_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    if Path(folder).is_dir():
        check_student(Path(folder), weights=weights)
        check_config(Path(folder))
        return folder, options
    if not Path(folder).exists():  # without a network the hub takes a while to fail
        note(f"{folder}: no such folder here, asking the Hugging Face hub")
    try:
        settings = Path(snapshot_download(folder, allow_patterns=["*.json"]))
    except (OSError, ValueError) as error:
        raise _explain_missing(name, folder, error) from error
    check_config(settings)
    return folder, options | {"revision": settings.name}


def quantization_of(name: str, known: tuple[str, dict[str, Any]] | None = None) -> dict[str, Any]:
    """How the weights of a checkpoint are quantised, as its configuration says; {} where they are not.

    Early checkpoints of bitsandbytes name no method. `known` is the model's `model_source`, where it was asked before.
    UsageError for a method that this transformers does not know: it would skip those weights.
    """
    source, options = known or model_source(name, weights=False)
    if "gguf_file" in options:  # numbers of such a file are made plain, and its header takes a while to read
        return {}
    with load_errors(name, source):
        config = AutoConfig.from_pretrained(source, **options)
    named = (getattr(part, "quantization_config", None) for part in (config, config.get_text_config()))
    found: dict[str, Any] = next(filter(None, named), {})
    if found and not AutoHfQuantizer.supports_quant_method(found):
        raise UsageError(
            f"model {name} is quantised by {found.get('quant_method')!r}, which this transformers does not know",
            fix="pip install --upgrade transformers, or use a checkpoint that is quantised another way",
        )
    return {"quant_method": "bitsandbytes", **found} if found else {}


def place_weights(device_map: str, max_memory: Sequence[str]) -> dict[str, Any]:
    """What `from_pretrained` is told of where a model's weights go; {} for one device. A map is one of JSON.

    >>> place_weights("", ("0=20GiB", "cpu=60GiB"))["max_memory"]
    {0: '20GiB', 'cpu': '60GiB'}
    """
    if not device_map and not max_memory:
        return {}
    given: Any = device_map or AUTO
    if given not in DEVICE_MAPS:
        with contextlib.suppress(ValueError):
            given = json.loads(device_map)
        if not isinstance(given, dict) or not given:
            raise UsageError(
                f"--device-map {' '.join(device_map.split())[:80]}: no map of modules to devices",
                fix=f'use {", ".join(DEVICE_MAPS)}, a JSON file, or a line as {{"model": 0, "lm_head": "cpu"}}',
            )
    memory = {int(key) if key.isdigit() else key: size for key, _, size in (m.partition("=") for m in max_memory)}
    logging.getLogger("accelerate.big_modeling").setLevel(logging.ERROR)  # it warns of what was asked for
    found = {"device_map": given, "offload_folder": _offload_folder().name}
    return found | ({"max_memory": memory} if memory else {})


@functools.cache
def _offload_folder() -> tempfile.TemporaryDirectory[str]:
    """For weights that are on a disk in another form than in the checkpoint; removed when this process ends."""
    return tempfile.TemporaryDirectory(prefix="xkd-offload-")


def load_model(
    name: str, *, dtype: torch.dtype, quantization: Any = None, placed: Mapping[str, Any] | None = None
) -> PreTrainedModel:
    """A causal language model in evaluation mode, from a folder, a `.gguf` file, or a name on the hub.

    `quantization` is a configuration of transformers, for weights that are made smaller while they are read; `placed`
    is what `place_weights` gives.

    Raises:
        InputMissing: There is no such folder, file or hub name, it cannot be reached, lacks weights, or needs another
            package.
        UsageError: It is there but no causal language model that this transformers knows.
        Refused: It wants to run code of its own, or has only pickled weights.
    """
    folder, options = model_source(name, weights=True)
    quantization_of(name, (folder, options))  # which may refuse it
    if "gguf_file" in options:
        from transformers import GgufConfig

        options["quantization_config"] = GgufConfig(dequantize=True)
    else:
        options["use_safetensors"] = True
    if quantization is not None:
        options |= {"quantization_config": quantization, "device_map": {"": 0}}
    options |= placed or {}
    model: PreTrainedModel
    with load_errors(name, folder):
        model, found = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True, **options)
    if "quantization_config" not in options:
        refuse_missing(name, found["missing_keys"])
    return model.eval()


def refuse_missing(name: str, weights: Collection[str]) -> None:
    """InputMissing where a checkpoint lacks these weights, which transformers draws at random."""
    if weights:
        more = f" and {len(weights) - 1} others" if len(weights) > 1 else ""
        raise InputMissing(
            f"model {name}: its files lack {min(weights)}{more}, or have it in another shape than config.json says",
            fix=COPY_AGAIN,
        )


def _explain_missing(name: str, folder: str, error: OSError | ValueError) -> InputMissing | Refused:
    if Path(folder).is_dir() and "safetensors" in str(error):
        return Refused(
            f"model {name} has no safetensors weights; pickled weights are not opened",
            fix="convert it: from_pretrained(...).save_pretrained(..., safe_serialization=True) on a trusted machine",
        )
    return InputMissing(
        f"model {name} is neither a model folder here nor a name the hub answers for: {short(error)}",
        fix="give a folder with config.json and model.safetensors, a .gguf file, or a hub name with a network",
    )


@functools.lru_cache(maxsize=2)
def _gguf_tokenizer(folder: str, file: str, _state: tuple[int, ...]) -> Any:
    """Built once in this process while the file is the same: it can take a minute."""
    return AutoTokenizer.from_pretrained(folder, gguf_file=file, trust_remote_code=False)


def load_tokenizer(name: str) -> Any:
    """A fast tokenizer from a folder, from FOLDER/FILE.gguf, or by its name on the Hugging Face hub.

    Raises:
        InputMissing: Nothing of that name, or the folder holds no tokenizer that can be read.
        BadData: It lies in a cache and is not what the table's manifest says.
        Refused: The tokenizer brings its own code.
        UsageError: It is a slow tokenizer, without character offsets.
    """
    source, gguf = split_gguf(name)
    folder = Path(source)
    looks_local = gguf or folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1
    if (gguf and not Path(name).is_file()) or (looks_local and not folder.is_dir()):
        raise InputMissing(f"{name} is not there", fix="name a model folder, FOLDER/FILE.gguf or a hub model")
    if folder.is_dir():
        check_tokenizer(folder)
    source, options = source_of(name, weights=False)
    _read_json(folder / "tokenizer.json")
    try:
        if gguf:
            state = Path(name).stat()
            tokenizer = _gguf_tokenizer(source, gguf, (state.st_ino, state.st_size, state.st_mtime_ns))
        else:
            tokenizer = AutoTokenizer.from_pretrained(source, **options)
    except Exception as error:  # the tokenizers library raises nothing narrower for what it cannot read
        if "trust_remote_code" in str(error):
            raise Refused(
                f"{name}: this tokenizer runs code of its own", fix="use a tokenizer with a tokenizer.json"
            ) from error
        place = "in this file" if gguf else "in this folder" if folder.is_dir() else "here or on the hub"
        fix = "copy the file again" if gguf else "check the name and the connection"
        raise InputMissing(f"{name}: no tokenizer {place} that can be read ({short(error)})", fix=fix) from error
    encode_texts(tokenizer, [""])
    if "local_files_only" in tokenizer.init_kwargs:  # saved with it, and otherwise True where HF_HUB_OFFLINE is set
        tokenizer.init_kwargs["local_files_only"] = False
    return tokenizer


def new_model(
    spec: str, *, vocab_size: int, special: dict[str, int | None], dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """A fresh model from `FAMILY,key=value,...`, with random weights from torch's current seed.

    `spec` is e.g. "llama,layers=4,width=256". Families are transformers' model types. `layers`, `width`, `heads`,
    `kv_heads` and `inner` (feed-forward width) are translated; other keys are configuration names, and what is not
    given is as the family has it (`head_dim` of Qwen 3 and Gemma, experts). `special` holds bos_token_id, eos_token_id
    and pad_token_id of the student's tokenizer. UsageError for an unknown family or key, or numbers that do not fit
    together.
    """
    family, *pairs = [part.strip() for part in spec.split(",")]
    try:
        config = _config(family, dict(_pair(pair) for pair in pairs), {**special, "vocab_size": vocab_size})
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    except Exception as error:
        raise UsageError(
            f"--student new:{spec}: {short(error.__cause__ or error)}",
            fix="e.g. new:llama,layers=4,width=256 or new:gpt2,layers=4",
        ) from error
    return model


def _pair(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"{text!r} is not key=value")
    try:
        return key.strip(), json.loads(value)
    except ValueError:
        return key.strip(), value.strip()


_SIZES: Final = {
    "layers": ("num_hidden_layers",),
    "width": ("hidden_size",),
    "heads": ("num_attention_heads",),
    "kv_heads": ("num_key_value_heads",),
    "inner": ("intermediate_size", "n_inner", "ffn_dim"),
}
"""Our short names -> what configurations call them."""


def _config(family: str, given: dict[str, Any], fixed: dict[str, Any]) -> Any:
    """The configuration; ValueError for a key that the family does not have or a size that is no number from 1 on."""
    known = AutoConfig.for_model(family)
    for key in given:
        if not any(hasattr(known, name) for name in _SIZES.get(key, (key,))):
            raise ValueError(f"{family} has no setting {key!r}")
    sizes = {key: value for key, value in given.items() if key in _SIZES}
    for key, value in sizes.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{key}={value} is not a number from 1 on")
    width = sizes.get("width", 256)
    heads = sizes.get("heads", max(1, width // 64))
    sizes = {"layers": 4, "width": width, "heads": heads, "kv_heads": heads, "inner": 4 * width} | sizes
    named = {name: value for key, value in sizes.items() for name in _SIZES[key] if hasattr(known, name)}
    others = {key: value for key, value in given.items() if key not in _SIZES}
    return AutoConfig.for_model(family, **{"tie_word_embeddings": True, **named, **others, **fixed})


@contextlib.contextmanager
def tensor_errors() -> Iterator[None]:
    """Turn what safetensors raises while it writes into an OSError with the system's number."""
    try:
        yield
    except SafetensorError as error:
        found = re.search(r"\(os error (\d+)\)", str(error))
        number = int(found[1]) if found else errno.EIO
        raise OSError(number, os.strerror(number) if found else str(error)) from error


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a safetensors file; OSError where the disk is full or fails."""
    with tensor_errors():
        save_file(dict(tensors), path)

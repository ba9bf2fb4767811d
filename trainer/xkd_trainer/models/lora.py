"""LoRA through peft: an adapter beside frozen weights, its folder, and the whole model that both make together.

peft puts its layers into the model itself, so that whoever reads the model finds its parts where they were.
"""

import importlib.util
import json
import warnings
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from xkd_schemas.config import LoraSection
from xkd_schemas.durable_files import digest, sha256_of
from xkd_schemas.errors import InputMissing, Mismatch, Refused, UsageError
from xkd_trainer.models.loading import load_errors, load_model, source_of, split_gguf
from xkd_trainer.run_folder import read_provenance

ADAPTER: Final = "adapter_config.json"
ALL_LINEAR: Final = "all-linear"


def import_peft() -> Any:
    """UsageError where peft is not installed."""
    if importlib.util.find_spec("peft") is None:
        raise UsageError("LoRA needs peft, which is not installed here", fix="pip install 'xkd-toolkit[lora]'")
    import peft

    return peft


def quantization(name: str) -> Any:
    """What `load_model` is told for 4bit, None for none; UsageError where it cannot be had."""
    if name == "none":
        return None
    if importlib.util.find_spec("bitsandbytes") is None or not torch.cuda.is_available():
        raise UsageError(
            "student.quantization=4bit needs bitsandbytes and a GPU, which are not both here",
            fix="pip install bitsandbytes, or --student-dtype bfloat16 with --lora-rank",
        )
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip


def add_adapter(model: PreTrainedModel, settings: LoraSection, name: str) -> None:
    """Freeze a model and put an adapter beside its linear modules, float32, random by torch's current seed.

    It changes no state before it is trained. `name` is what the model was loaded by, which the adapter's folder says.
    UsageError where peft is missing or the model has no such modules.
    """
    peft = import_peft()
    _check_target(model, settings.target, name)
    target = ALL_LINEAR if ALL_LINEAR in settings.target else list(settings.target)
    config = peft.LoraConfig(
        r=settings.rank, lora_alpha=settings.alpha, target_modules=target, lora_dropout=settings.dropout,
        task_type="CAUSAL_LM",
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the modules of GPT-2 lie the other way round
        model.add_adapter(config)
    config.base_model_name_or_path = str(Path(name).resolve()) if Path(name).exists() else name
    for parameter in trained(model).values():
        parameter.data = parameter.data.float()


def _check_target(model: PreTrainedModel, target: tuple[str, ...], name: str) -> None:
    head, found = model.get_output_embeddings(), set[str]()
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and module is not head:
            found.add(path.rpartition(".")[2])
    if missing := [part for part in target if part not in {ALL_LINEAR, *found}]:
        raise UsageError(
            f"--lora-target {missing[0]}: student {name} has no such linear module below its head",
            fix=f"use {ALL_LINEAR}, or of {', '.join(sorted(found))}",
        )


def is_adapted(model: nn.Module) -> bool:
    """Whether an adapter is trained, and not the model's own weights."""
    return bool(getattr(model, "_hf_peft_config_loaded", False))


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that learn, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """What a checkpoint holds of a student: all, or what is trained of it beside frozen weights."""
    state, names = model.state_dict(keep_vars=True), trained(model)  # so that tied weights are seen to be
    return {name: tensor for name, tensor in state.items() if name in names} if is_adapted(model) else state


def cast(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The model with what is saved of it in this dtype: all weights, or those of its adapter."""
    if not is_adapted(model):
        return model.to(dtype)
    for parameter in trained(model).values():
        parameter.data = parameter.data.to(dtype)
    return model


def weights_identity(name: str) -> str:
    """What an adapter says of the weights that it was trained on: digests of the files, or a commit of the hub."""
    source, options = source_of(name, weights=False)
    if "revision" in options:
        return str(options["revision"])
    file = split_gguf(name)[1]
    return digest({path.name: sha256_of(path) for path in sorted(Path(source).glob(file or "*.safetensors"))})


def base_of(name: str) -> str:
    """The model below a folder with an adapter in peft's format; of any other model the name itself."""
    path = Path(name) / ADAPTER
    if not path.is_file() or (Path(name) / "config.json").is_file():
        return name
    source_of(name, weights=True)
    try:
        config = json.loads(path.read_bytes())
        base, kind, foreign = config["base_model_name_or_path"], config["peft_type"], config.get("megatron_config")
    except (ValueError, TypeError, KeyError) as error:
        raise InputMissing(f"{path} is no adapter's configuration: {error!r}", fix="copy the folder again") from None
    if kind != "LORA" or foreign or not (Path(name) / "adapter_model.safetensors").is_file():
        raise Refused(
            f"{name} is no plain LoRA adapter with adapter_model.safetensors", fix="use a merged model instead"
        )
    if Path(base).is_absolute() and not Path(base).exists():
        raise InputMissing(
            f"{name} is an adapter of {base}, which is not there",
            fix=f"put that model there, or xkd-train export {name} --merge --to FOLDER where it is",
        )
    return str(base)


def load_student(name: str, *, dtype: torch.dtype, merged: bool = False) -> PreTrainedModel:
    """`load_model`, also of an adapter's folder, whose adapter may be `merged` into the weights.

    Mismatch where the model below an adapter is not what it was trained on.
    """
    base = base_of(name)
    if base == name:
        return load_model(name, dtype=dtype)
    peft = import_peft()
    known = read_provenance(Path(name)).get("run", {}).get("base")
    if known not in (None, weights_identity(base)):
        raise Mismatch(
            f"{name} is an adapter of {base}, whose weights are not those it was trained on",
            kept="both as they are",
            fix=f"put the weights back that {base} had then",
        )
    model = load_model(base, dtype=dtype)
    with load_errors(name, name):
        wrapped = peft.PeftModel.from_pretrained(model, name)
        model = wrapped.merge_and_unload(safe_merge=True) if merged else wrapped.get_base_model()
        if (Path(name) / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(name)
    return model.eval()

"""What is known of a teacher as a whole: identity, sizes, constants, and the files that are kept beside its table."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import snapshot_download
from transformers import PreTrainedModel

from xkd_schemas.cache.manifest import Commit
from xkd_schemas.durable_files import save_file, save_folder, sha256_of
from xkd_schemas.errors import UsageError
from xkd_schemas.tokens import Tokens, kept_rows, predictors
from xkd_trainer.models.architecture import blocks_of, head_of, is_packed, is_tied, num_layers, read_weights
from xkd_trainer.models.forward import empty_model
from xkd_trainer.models.loading import load_tokenizer, quantization_of, save_tensors, split_gguf
from xkd_trainer.models.streaming import read_embeddings


def weight_files(name: str) -> list[Path]:
    """The weight files and config.json of a local model; for a hub name, those of its resolved commit."""
    folder, gguf = split_gguf(name)
    path = Path(folder)
    if not path.is_dir():
        path = Path(snapshot_download(folder, local_files_only=True, allow_patterns=["*.safetensors", "*.json"]))
    return [path / gguf] if gguf else sorted([*path.glob("*.safetensors"), *path.glob("config.json")])


def weights_identity(name: str) -> dict[str, str]:
    """sha256 of each of `weight_files`, by name."""
    return {file.name: sha256_of(file) for file in weight_files(name)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """What a plan needs to know of a model."""

    architecture: str
    layers: int
    width: int
    embeddings: int  # rows of their table
    classes: int  # rows of the head
    inner: int  # width of the feed-forward part
    weights: int  # numbers, a tied head counted once
    block: int  # of them in the largest block; 0 where no list of blocks was found
    file_numbers: int  # numbers in head.safetensors and embeddings.safetensors
    number_bytes: int  # bytes of a number in the checkpoint, as its configuration says
    quantization: dict[str, Any]  # how its weights are quantised, as that says too
    stored_bytes: int  # of quantised weights; 0 where they are not, or not on this machine


def sizes_of(name: str) -> Sizes:
    """Sizes of the model of that name; raises as `empty_model`, and UsageError where it has no linear head."""
    model = empty_model(name)
    head = head_of(model)
    embeddings = model.get_input_embeddings().weight
    config, quantization = model.config.get_text_config(), quantization_of(name)
    files = Path(name).glob("*.safetensors") if quantization else ()
    width = int(head.weight_VD.shape[1])
    block = 0
    numbers = head.weight_VD.numel() + (0 if head.bias_V is None else head.bias_V.numel())
    with contextlib.suppress(UsageError):
        block = max(sum(p.numel() for p in one.parameters()) for one in blocks_of(model))
    return Sizes(
        architecture=type(model).__name__,
        layers=num_layers(model),
        width=width,
        embeddings=len(embeddings),
        classes=int(head.weight_VD.shape[0]),
        inner=int(getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * width),
        weights=sum(parameter.numel() for parameter in model.parameters()),
        block=block,
        file_numbers=numbers + (0 if embeddings is head.weight_VD else embeddings.numel()),
        number_bytes=head.weight_VD.element_size(),
        quantization=quantization,
        stored_bytes=sum(file.stat().st_size for file in files),
    )


def constants_of(model: PreTrainedModel) -> dict[str, Any]:
    """Sizes and oddities of the teacher that a trainer must know."""
    head = head_of(model)
    parts = {"head": model.get_output_embeddings(), "embeddings": model.get_input_embeddings()}
    packed = [name for name, module in parts.items() if is_packed(module.weight)]  # and kept as plain numbers
    return {
        "architecture": type(model).__name__,
        "num_layers": num_layers(model),
        "hidden_size": int(head.weight_VD.shape[1]),
        "vocab_size": int(head.weight_VD.shape[0]),
        "logit_scale": head.scale,
        "softcap": head.softcap,
        "tied": is_tied(model),
        **({"dequantized": packed} if packed else {}),
    }


def export(model: PreTrainedModel, name: str, folder: Path) -> dict[str, str]:
    """Write head, embeddings (unless tied) and tokenizer; sha256 by file name. Readers widen what is narrowed here."""
    files = {"head.safetensors": read_weights(model.get_output_embeddings())}
    if not is_tied(model):
        files["embeddings.safetensors"] = read_embeddings(model)
    for file, content in files.items():
        tensors = {k: narrow(v.detach().cpu().contiguous()) for k, v in content.items()}
        save_file(folder / file, partial(save_tensors, tensors))
    kept = save_folder(folder / "tokenizer", load_tokenizer(name).save_pretrained)
    return {file: sha256_of(folder / file) for file in files} | kept


def narrow(weights: torch.Tensor) -> torch.Tensor:
    """The same numbers in 16 bits where those hold each of them, as of a bfloat16 checkpoint that runs in float32.

    >>> narrow(torch.tensor([1.5])).dtype, narrow(torch.tensor([0.1])).dtype
    (torch.bfloat16, torch.float32)
    """
    if weights.dtype == torch.float32:
        for dtype in (torch.bfloat16, torch.float16):
            if torch.equal((narrow := weights.to(dtype)).float(), weights):
                return narrow
    return weights


def sum_moments(
    tokens: Sequence[Tokens], captured: Sequence[dict[str, Any]], model: PreTrainedModel
) -> dict[str, float]:
    """Sums, from which the standard deviations of states and embeddings over target tokens are made."""
    table = read_embeddings(model)["weight"]
    sums = dict.fromkeys(("hidden", "hidden2", "hidden_n", "embedding", "embedding2", "embedding_n"), 0.0)
    for t, row in zip(tokens, captured, strict=True):
        if len(t.ids) == 0:
            continue
        embedded = table[torch.from_numpy(t.ids[t.targets].astype(np.int64)).to(table.device)].double()
        _add(sums, "embedding", embedded)
        if "hidden_last" in row:
            bits = np.ascontiguousarray(row["hidden_last"]).view(np.int16)
            states = torch.from_numpy(bits).view(torch.bfloat16).double()
            _add(sums, "hidden", states[np.isin(kept_rows(t.targets), predictors(t.targets))])
    return sums


def _add(sums: dict[str, float], name: str, values: torch.Tensor) -> None:
    sums[name] += float(values.sum())
    sums[f"{name}2"] += float(values.square().sum())
    sums[f"{name}_n"] += values.numel()


def std_of(commits: Sequence[Commit], name: str) -> float:
    """Standard deviation over all targets of the corpus from the sums in the records: N(x) = x / std of DWA-KD."""
    total, square, count = (sum(c.sums.get(name + end, 0.0) for c in commits) for end in ("", "2", "_n"))
    return float(np.sqrt(max(square / count - (total / count) ** 2, 0.0))) if count else 1.0

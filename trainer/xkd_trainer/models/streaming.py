"""A model that is larger than the memory: its blocks are read from safetensors one after another, and dropped again.

Embeddings, head, norms and whatever else is outside the blocks stay in memory. A block is read when the model calls
it, and the next one by a thread meanwhile, so that two are in memory. `Stream.step` runs one block alone in a forward
pass of the whole model: the blocks beside it return its states and compute nothing.
"""

import json
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any, Final

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig

from xkd_schemas.errors import InputMissing, UsageError
from xkd_trainer.models.architecture import backbone, blocks_of, evaluating, tokens_of_any
from xkd_trainer.models.forward import States, run
from xkd_trainer.models.loading import load_errors, model_source, refuse_missing, short

ALL_AT_ONCE: Final = "--no-stream-layers, on a machine with memory for all weights"
COPY_AGAIN: Final = "copy the model folder again"
_TP_PLAN: Final[dict[str, Any]] = (
    {"tp_plan": {}} if "tp_plan" in signature(convert_and_load_state_dict_in_model).parameters else {}
)
"""transformers 5.3 wants it."""


def empty_model(name: str, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The model on the meta device: shapes, no values; in the dtype of its configuration unless one is given.

    Raises:
        InputMissing: There is no such folder, file or hub name.
        UsageError: It is no causal language model that this transformers knows.
        Refused: It wants to run code of its own.
    """
    source, options = model_source(name, weights=False)
    with load_errors(name, source), torch.device("meta"):
        config = AutoConfig.from_pretrained(source, **options)
        given = {} if dtype is None else {"dtype": dtype}
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, **given)
    return model


def why_not_streamed(model: PreTrainedModel, name: str) -> str:
    """What keeps the blocks of a model from being read one after another, in words; "" for nothing."""
    if name.endswith(".gguf"):
        return "a GGUF file cannot be read block by block"
    if getattr(model.config, "quantization_config", None):
        return "quantised weights cannot be read block by block"
    if hasattr(backbone(model), "_rescale_layers"):
        return f"{type(model).__name__} changes the weights of all blocks when it runs"
    return ""


class Stream:
    """The blocks of a model and where their weights lie; made by `load_streamed`, found by `stream_of`."""

    def __init__(self, model: PreTrainedModel, name: str, dtype: torch.dtype, device: str) -> None:
        self._model, self._name, self.device = model, name, device
        self._config = LoadStateDictConfig(
            dtype=dtype, dtype_plan=model._get_dtype_plan(dtype), device_map={"": device},
            weight_mapping=get_model_conversion_mapping(model),
        )  # fmt: skip
        self._blocks = blocks_of(model)
        self._prefix = next(path for path, module in model.named_modules() if module is self._blocks)
        self._weights = self._sort_weights(open_weights(name))
        self._thread = ThreadPoolExecutor(1)
        self._reading: dict[int, Future[None]] = {}
        self._there: set[int] = set()  # blocks in memory as a whole
        self._only = 0  # the block that runs alone; 0 for a pass through all
        self._states: Tensor | None = None  # what the blocks beside it return
        self._others: int | None = None  # how many values a block returns beside them; None for states alone
        self._load(0)
        self._slots = {number: list(_meta_slots(block)) for number, block in enumerate(self._blocks, 1)}
        for number, block in enumerate(self._blocks, 1):
            block.forward = partial(self._forward, number, block.forward)

    def __len__(self) -> int:
        return len(self._blocks)

    def _sort_weights(self, weights: dict[str, Any]) -> list[dict[str, Any]]:
        """The tensors of the checkpoint by block, from 1 on; [0] are those outside of blocks."""
        shapes, mapping = self._model.state_dict(), self._config.weight_mapping or []
        renamings = [one for one in mapping if isinstance(one, WeightRenaming)]
        converters = [one for one in mapping if isinstance(one, WeightConverter)]
        found: list[dict[str, Any]] = [{} for _ in range(1 + len(self._blocks))]
        for key, tensor in weights.items():
            name, _ = rename_source_key(key, renamings, converters, self._model.base_model_prefix, shapes)
            found[self._block_of(name if name in shapes else key)][key] = tensor
        return found

    def _block_of(self, name: str) -> int:
        """Number of the block, from 1, that a weight belongs to; 0 for those outside."""
        number = name.removeprefix(f"{self._prefix}.").partition(".")[0] if name.startswith(self._prefix) else ""
        return int(number) + 1 if number.isdigit() and int(number) < len(self._blocks) else 0

    def _load(self, number: int) -> None:
        """Read the weights of a block, or of all that is outside of them, into the model."""
        with load_errors(self._name, self._name):
            found, _ = convert_and_load_state_dict_in_model(
                self._model, self._weights[number], self._config, **_TP_PLAN
            )
            found.missing_keys = {key for key in found.missing_keys if self._block_of(key) == number}
            for said in found.conversion_errors.values():  # a traceback, and what was converted
                raise RuntimeError(" ".join(said.splitlines()[-2:]))
            if number == 0:
                found = self._model._finalize_model_loading(self._model, self._config, found)
        refuse_missing(self._name, {*found.missing_keys, *(key for key, *_ in found.mismatched_keys)})

    def _forward(self, number: int, own: Callable[..., Any], *args: Any, **options: Any) -> Any:
        if self._only not in (0, number):
            return self._states if self._others is None else (self._states, *[None] * self._others)
        self.fetch(number)
        output = own(*args, **options)
        is_states = isinstance(output, Tensor)
        self._states, self._others = (output, None) if is_states else (output[0], len(output) - 1)
        if not self._only:
            self.drop(number)
            self._states = None
        return output

    def fetch(self, number: int) -> None:
        """Wait for a block's weights, and let the thread read those of the next."""
        if number in self._there:
            return
        (self._reading.pop(number, None) or self._thread.submit(self._load, number)).result()
        self._there.add(number)
        if number < len(self):
            self._reading[number + 1] = self._thread.submit(self._load, number + 1)

    def drop(self, number: int) -> None:
        """Free a block's weights."""
        self._there.discard(number)
        for held, name, empty in self._slots[number]:
            held[name] = empty

    def sweep(self) -> Iterator[int]:
        """The blocks in order, from 1, each in memory until the next is asked for."""
        try:
            for number in range(1, 1 + len(self)):
                self.fetch(number)
                yield number
                self.drop(number)
        finally:
            self._end()

    def _end(self) -> None:
        """Free everything, also after an error in the middle."""
        for reading in self._reading.values():
            reading.cancel() or reading.exception()
        self._reading.clear()
        for number in self._slots:
            self.drop(number)
        self._only, self._states = 0, None

    def step(self, number: int, states: Tensor | None, call: Callable[[], States]) -> tuple[States, Tensor]:
        """Make a pass through the model in which one block alone computes, on the states that the one before it gave.

        Args:
            number: The block, from 1.
            states: None for the first block.
            call: The pass.

        Returns:
            What `call` returned, and the states that the block gave.
        """
        self._only, self._states = number, states
        try:
            result, after = call(), self._states
        finally:
            self._only, self._states = 0, None
        assert after is not None
        return result, after


def _meta_slots(block: torch.nn.Module) -> Iterator[tuple[dict[str, Any], str, Tensor]]:
    """Where weights that are not in memory go: the dict of their module, and their name and empty tensor in it."""
    for module in block.modules():
        for held in (module._parameters, module._buffers):
            yield from ((held, name, value) for name, value in held.items() if value is not None and value.is_meta)


def stream_of(model: PreTrainedModel) -> Stream | None:
    """The stream of a model that `load_streamed` made."""
    found = vars(model).get("stream")
    return found if isinstance(found, Stream) else None


def load_streamed(name: str, *, dtype: torch.dtype, device: str) -> PreTrainedModel:
    """A causal language model in evaluation mode whose blocks stay on disk, from a folder or a name on the hub.

    Raises:
        InputMissing: Weights are not there, or not those of its configuration.
        UsageError: Its blocks cannot be run one after another.
    """
    model = empty_model(name, dtype).eval().requires_grad_(False)
    if why := why_not_streamed(model, name):
        raise UsageError(f"model {name}: {why}", fix=ALL_AT_ONCE)
    vars(model)["stream"] = Stream(model, name, dtype, device)
    return model


def open_weights(name: str) -> dict[str, Any]:
    """Name -> slice of every tensor in the safetensors files of a model; nothing of them is read.

    They are read with pread, so that neither file nor mapping counts as memory of this process.

    Raises:
        InputMissing: A file is not there, is damaged, or lacks a tensor that the index says it has.
    """
    source, options = model_source(name, weights=True)
    if not Path(source).is_dir():
        patterns = ["*.safetensors", "*.json"]
        source = snapshot_download(source, revision=options["revision"], allow_patterns=patterns)
    folder = Path(source)
    index = folder / "model.safetensors.index.json"
    named = json.loads(index.read_bytes())["weight_map"] if index.is_file() else {}
    found: dict[str, Any] = {}
    for file in sorted(set(named.values())) or ["model.safetensors"]:
        if not (folder / file).is_file():
            raise InputMissing(f"model {name}: {file} is not there", fix=COPY_AGAIN)
        try:
            opened: Any = safe_open(folder / file, framework="pt", device="cpu", backend="pread")
        except (SafetensorError, OSError) as error:
            raise InputMissing(f"model {name}: {file} cannot be read: {short(error)}", fix=COPY_AGAIN) from error
        there = set(opened.keys())
        if lacking := sorted(key for key, place in named.items() if place == file and key not in there):
            raise InputMissing(f"model {name}: {index.name} says that {file} has {lacking[0]}", fix=COPY_AGAIN)
        found |= {key: opened.get_slice(key) for key in sorted(there)}
    return found


@torch.no_grad()
def check_steps(model: PreTrainedModel) -> None:
    """Compare a pass through all blocks with one block after another, on eight tokens.

    UsageError where a bit differs: blocks hand on more than states, such as keys and values that others share.
    """
    stream, ids_BL = model.stream, tokens_of_any(model)
    pass_ = partial(run, model, ids_BL, torch.ones_like(ids_BL, dtype=torch.bool))
    states: Tensor | None = None
    with evaluating(model):
        expected_BLD = pass_().last_BLD
        try:
            for number in stream.sweep():
                found, states = stream.step(number, states, pass_)
            same = torch.equal(found.last_BLD, expected_BLD)
        except (RuntimeError, ValueError, TypeError, AttributeError, KeyError, IndexError):
            same = False
    if not same:
        raise UsageError(
            f"{type(model).__name__} hands on more than states from block to block, so that its blocks cannot be run "
            "one after another",
            fix=ALL_AT_ONCE,
        )

"""A model that is larger than the memory: its blocks are read from safetensors one after another, and dropped again.

Head, norms and whatever else is outside the blocks stay in memory; embeddings too where they are the head's weights. A
block is read when the model calls it, and the next one by a thread meanwhile, so that two are in memory. `Stream.step`
runs one block alone in a forward pass of the whole model: the blocks beside it return its states and compute nothing.
"""

import contextlib
import json
import math
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
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig

from xkd_schemas.errors import InputMissing, UsageError
from xkd_trainer.models.architecture import backbone, blocks_of, evaluating, is_tied, read_weights, tokens_of_any
from xkd_trainer.models.forward import States, empty_model, run
from xkd_trainer.models.loading import COPY_AGAIN, load_errors, model_source, refuse_missing, short

ALL_AT_ONCE: Final = "--no-stream-layers, on a machine with memory for all weights"
_TP_PLAN: Final[dict[str, Any]] = (
    {"tp_plan": {}} if "tp_plan" in signature(convert_and_load_state_dict_in_model).parameters else {}
)
"""transformers 5.3 wants it."""


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
        self._blocks, self._table = blocks_of(model), model.get_input_embeddings()
        names = {module: name for name, module in model.named_modules()}
        self._prefix = names[self._blocks]
        stay = model.get_output_embeddings() is None or is_tied(model)
        self.embeddings = 0 if stay else 1 + len(self._blocks)  # their number; 0 where they stay in memory
        self._rows = f"{names[self._table]}."
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
        if self.embeddings:
            slots = _meta_slots(self._table)
            self._slots[self.embeddings] = [(held, name, _blank(empty, device)) for held, name, empty in slots]
            self._table.forward = partial(self._embed, self._table.forward)
            self.drop(self.embeddings)

    def __len__(self) -> int:
        return len(self._blocks)

    def _sort_weights(self, weights: dict[str, Any]) -> list[dict[str, Any]]:
        """The tensors of the checkpoint by number: blocks from 1 on, embeddings last; [0] are those that stay."""
        shapes, mapping = self._model.state_dict(), self._config.weight_mapping or []
        renamings = [one for one in mapping if isinstance(one, WeightRenaming)]
        converters = [one for one in mapping if isinstance(one, WeightConverter)]
        found: list[dict[str, Any]] = [{} for _ in range(2 + len(self._blocks))]
        for key, tensor in weights.items():
            name, _ = rename_source_key(key, renamings, converters, self._model.base_model_prefix, shapes)
            found[self._block_of(name if name in shapes else key)][key] = tensor
        return found

    def _block_of(self, name: str) -> int:
        """Number of the block, from 1, or of the embeddings, that a weight belongs to; 0 for one that stays."""
        if name.startswith(self._rows):
            return self.embeddings
        number = name.removeprefix(f"{self._prefix}.").partition(".")[0] if name.startswith(self._prefix) else ""
        return int(number) + 1 if number.isdigit() and int(number) < len(self._blocks) else 0

    def _load(self, number: int) -> None:
        """Read the weights of a block, of the embeddings, or of all that stays, into the model."""
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

    def _embed(self, own: Callable[..., Any], ids_BL: Tensor, *args: Any, **options: Any) -> Any:
        """The model's embeddings; zeros in their place in a pass whose block has the states of the one before it."""
        if self._only > 1:
            weight = self._table.weight
            return torch.zeros(*ids_BL.shape, weight.shape[1], dtype=weight.dtype, device=self.device)
        if self._only:
            return own(ids_BL, *args, **options)
        with self.embedded():
            return own(ids_BL, *args, **options)

    @contextlib.contextmanager
    def embedded(self) -> Iterator[None]:
        """The embeddings in memory, for a while."""
        if not self.embeddings:
            yield
            return
        try:
            self.fetch(self.embeddings)
            yield
        finally:
            self.drop(self.embeddings)

    def fetch(self, number: int) -> None:
        """Wait for weights, and let the thread read those of the next block, unless the embeddings are there."""
        if number in self._there:
            return
        (self._reading.pop(number, None) or self._thread.submit(self._load, number)).result()
        self._there.add(number)
        if number < len(self) and self.embeddings not in self._there:
            self._reading[number + 1] = self._thread.submit(self._load, number + 1)

    def drop(self, number: int) -> None:
        """Free weights that were fetched."""
        self._there.discard(number)
        for held, name, empty in self._slots[number]:
            held[name] = empty

    def sweep(self) -> Iterator[int]:
        """The blocks in order, from 1, each in memory until the next is asked for."""
        try:
            with self.embedded():
                self.fetch(1)
                yield 1
                self.drop(1)
            for number in range(2, 1 + len(self)):
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
            states: What the block before it gave; None for the first block.
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


def _blank(empty: Tensor, device: str) -> torch.nn.Parameter:
    """One NaN in the place of a weight, on the device that some models ask it for."""
    return torch.nn.Parameter(torch.full((1,), math.nan, dtype=empty.dtype, device=device).expand(empty.shape), False)


def stream_of(model: PreTrainedModel) -> Stream | None:
    """The stream of a model that `load_streamed` made."""
    found = vars(model).get("stream")
    return found if isinstance(found, Stream) else None


def read_embeddings(model: PreTrainedModel) -> dict[str, Tensor]:
    """`read_weights` of a model's embeddings; a streamed model does not keep them."""
    stream = stream_of(model)
    with stream.embedded() if stream else contextlib.nullcontext():
        found = read_weights(model.get_input_embeddings())
    return {name: weights.detach() for name, weights in found.items()}


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

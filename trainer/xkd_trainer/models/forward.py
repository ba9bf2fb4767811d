"""One forward pass of a causal language model, keeping just the states that somebody asked for.

Used on the teacher at capture and on the student in training, so both are measured the same way.

Shape legend for this file
    B documents    L tokens    D width    N positions    V vocabulary
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from xkd_schemas.errors import UsageError
from xkd_schemas.text.tokenizers import name_of
from xkd_schemas.tokens import Int32s
from xkd_trainer.models.architecture import (
    LAST_STATES_ONLY,
    backbone,
    blocks_of,
    evaluating,
    head_of,
    num_layers,
    tokens_of_any,
)
from xkd_trainer.models.attention import UNIFORM, LastRows, check_attention, listen
from xkd_trainer.models.loading import load_errors, model_source, short
from xkd_trainer.models.measures import normalise_row
from xkd_trainer.models.padding import Packing, plan_rows

BACKEND = "inductor"  # of torch.compile


@dataclass(frozen=True, kw_only=True, slots=True)
class States:
    """What one forward pass left behind."""

    last_BLD: Tensor  # last hidden states, final-normed: the head applies directly
    layers: dict[int, Tensor]  # Hugging Face index -> [B, L, D]; the last index is `last_BLD` itself
    attention_BL: Tensor | None
    """Last valid token's attention in the last block, heads summed, rows sum to 1; float32, no gradient."""
    attention_layers: Mapping[int, Tensor] = field(default_factory=dict)
    """Hugging Face index -> the same of other blocks."""
    text_layers: Mapping[int, Tensor] = field(default_factory=dict)
    """Hugging Face index -> the row of the last text token, in front of the end token."""
    packing: Packing | None = None
    """How documents lay in the rows of the pass, if several were in one; what is above has a row for each document."""

    def as_float32(self) -> "States":
        """The same in float32, which signals and losses compute in; itself where it is already."""
        if self.last_BLD.dtype == torch.float32:
            return self
        layers = {layer: states_BLD.float() for layer, states_BLD in self.layers.items()}
        return replace(self, last_BLD=self.last_BLD.float(), layers=layers)


Outputs = dict[int, tuple[Tensor, int]]
"""Layer -> what its block returned, and torch's count of writes into it by then."""


def _check_states(model: PreTrainedModel, layer: int, outputs: Outputs, last_BLD: Tensor) -> Tensor:
    """Projectors and columns are made for the shape of the last states; in OPT-350m and Gemma 3n blocks differ."""
    what = "no states"
    if layer in outputs:
        states, version = outputs[layer]
        what = f"states of shape {tuple(states.shape)}"
        if _writes_into(states) != version:
            what = "states that a later block writes into"
        elif states.shape == last_BLD.shape:
            return states
    raise UsageError(
        f"{type(model).__name__}: block {layer} gives {what} where its last states are {tuple(last_BLD.shape)}",
        fix=LAST_STATES_ONLY,
    )


def _writes_into(states: Tensor) -> int:
    """Tensors of inference mode have no count."""
    return 0 if states.is_inference() else states._version


@contextlib.contextmanager
def _hook(model: PreTrainedModel, layers: Sequence[int], into: Outputs) -> Iterator[None]:
    blocks = blocks_of(model) if layers else nn.ModuleList()
    with contextlib.ExitStack() as hooks:
        for layer in layers:

            def keep(_module: nn.Module, _inputs: Any, output: Any, layer: int = layer) -> None:
                states = output[0] if isinstance(output, tuple | list) else output
                into[layer] = states, _writes_into(states)

            hooks.callback(blocks[layer - 1].register_forward_hook(keep).remove)
        yield


def run(  # noqa: PLR0913 - one for each thing that is kept
    model: PreTrainedModel, ids_BL: Tensor, valid_BL: Tensor, *, layers: Sequence[int] = (), attention: bool = False,
    attention_layers: Sequence[int] = (), text_layers: Sequence[int] = (), text_B: Tensor | None = None,
    packing: bool = False,
) -> States:  # fmt: skip
    """Run the base model without its head.

    Documents are padded on the right. A causal model's states never depend on what comes after, so no attention mask
    is passed and the fastest causal kernel is used; states at padding are garbage. Layers are Hugging Face indices
    1..number of blocks. UsageError where one does not exist or its states are not like the last ones, or no attention
    was shown.

    Args:
        model: A causal language model.
        ids_BL: Token ids, int64.
        valid_BL: Bool, True at tokens; each row is a run of True and then False.
        layers: Blocks whose states are kept.
        attention: Also keep the last token's attention row in the last block.
        attention_layers: Also keep that row in these blocks.
        text_layers: Also keep the row of another token in these blocks.
        text_B: The place of that token, the last one of the text; int64.
        packing: Put several documents into one row where that saves rows; the model must pass `check_packing`.
    """
    count = num_layers(model)
    for layer in (*layers, *attention_layers, *text_layers):
        if not 1 <= layer <= count:
            raise UsageError(f"layer {layer} does not exist: {type(model).__name__} has layers 1 to {count}")
    outputs: Outputs = {}
    places = {"last": valid_BL.sum(dim=1).sub(1).clamp_min(0)} if attention or attention_layers else {}
    if text_layers:
        assert text_B is not None
        places["text"] = text_B
    inner = sorted({layer for layer in layers if layer != count})
    wanted = sorted({*attention_layers, *text_layers, *([count] if attention else [])})
    if wanted:
        blocks_of(model)  # a family that counts otherwise would give another block's row
    packed = plan_rows(valid_BL) if packing else None
    given = {"input_ids": ids_BL} if packed is None else packed.pack(ids_BL, valid_BL)
    with _hook(model, inner, outputs), listen(frozenset(layer - 1 for layer in wanted), places, packed) as heard:
        output = backbone(model)(**given, use_cache=False)
    last_BLD: Tensor = output.last_hidden_state.to(ids_BL.device)  # a model may be spread over several
    kept = {layer: _check_states(model, layer, outputs, last_BLD).to(ids_BL.device) for layer in inner}
    if packed is not None:
        last_BLD, kept = packed.unpack(last_BLD), {layer: packed.unpack(states) for layer, states in kept.items()}
    if count in layers:
        kept[count] = last_BLD
    found = {which: {layer: _row(model, heard, which, layer, valid_BL) for layer in wanted} for which in places}
    rows = found.get("last", {})
    return States(
        last_BLD=last_BLD, layers=kept, attention_BL=rows[count] if attention else None, attention_layers=rows,
        text_layers=found.get("text", {}), packing=packed,
    )  # fmt: skip


def _row(model: PreTrainedModel, heard: LastRows, which: str, layer: int, valid_BL: Tensor) -> Tensor:
    """One of the rows that were heard, or UsageError for a block that showed none, or several."""
    if (which, layer - 1) not in heard.rows or layer - 1 in heard.several:
        block = "its last block" if layer == num_layers(model) else f"block {layer}"
        what = "several attention maps" if layer - 1 in heard.several else "no attention map"
        raise UsageError(f"{type(model).__name__} shows {what} in {block}", fix=UNIFORM)
    return normalise_row(heard.rows[which, layer - 1].to(valid_BL.device), valid_BL)


def checkpoint_blocks(model: PreTrainedModel) -> None:
    """Let each block run a second time in the backward pass; UsageError where the family cannot."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    try:
        enable({"use_reentrant": False})  # the other kind would not see what hooks keep
    except ValueError as error:
        raise UsageError(
            f"{type(model).__name__} cannot be trained with gradient checkpointing: {short(error)}",
            fix="--no-gradient-checkpointing, and a smaller --micro-batch-size",
        ) from error
    model.disable_input_require_grads()  # asked for by the other kind alone


def compile_blocks(model: PreTrainedModel) -> None:
    """Compile every block by itself, so that what is read between blocks is read as always."""
    for block in blocks_of(model):
        block.forward = torch.compile(block.forward, backend=BACKEND, dynamic=True)


def rehearse(model: PreTrainedModel, *, packing: bool = False, **reads: Any) -> None:
    """`run` on eight tokens with what it is to read, so that what a model cannot give is refused before all work."""
    if packing:
        check_packing(model)
    if any(reads.get(name) for name in ("attention", "attention_layers", "text_layers")):
        check_attention(model)
    ids_BL = tokens_of_any(model)
    with torch.no_grad(), evaluating(model):
        run(model, ids_BL, torch.ones_like(ids_BL, dtype=torch.bool), text_B=torch.full_like(ids_BL[:, 0], 6), **reads)


@torch.no_grad()
def check_causal(model: PreTrainedModel) -> None:
    """Change the last four of eight tokens and compare the states of the first four.

    UsageError where they differ: padding would change states, and a student would see what it is to predict.
    """
    first_BL = tokens_of_any(model)
    second_BL = torch.cat([first_BL[:, :4], first_BL[:, 4:].flip(1)], dim=1)
    ids_BL = torch.cat([first_BL, second_BL])
    states_BLD = run(model, ids_BL, torch.ones_like(ids_BL, dtype=torch.bool)).last_BLD[:, :4]
    worst = float((states_BLD[0] - states_BLD[1]).abs().max())
    share = 1e-3 if states_BLD.dtype == torch.float32 else 0.05
    if not worst <= share * float(states_BLD.abs().max()):
        raise UsageError(
            f"{type(model).__name__}: its states depend on tokens that come later (by {worst:.3g}), so it is "
            "no causal language model",
            fix="use a causal one; of the BERT family, those whose config.json says is_decoder",
        )


@torch.no_grad()
def check_packing(model: PreTrainedModel) -> None:
    """Compare the states of documents of eight, five and three tokens, of which two share a row, with each alone.

    UsageError where they differ or the model takes no positions: a document would see the one before it in its row.
    """
    ids_BL = tokens_of_any(model).expand(3, -1)
    valid_BL = torch.arange(8, device=ids_BL.device) < torch.tensor([8, 5, 3], device=ids_BL.device)[:, None]
    with evaluating(model):
        alone_ND = run(model, ids_BL, valid_BL).last_BLD[valid_BL]
        try:
            off = float((run(model, ids_BL, valid_BL, packing=True).last_BLD[valid_BL] - alone_ND).abs().max())
        except (TypeError, ValueError, IndexError):  # positions are not taken, or not of this shape
            off = float("nan")
    share = 1e-4 if alone_ND.dtype == torch.float32 else 0.05
    if not off <= share * float(alone_ND.abs().max()):
        raise UsageError(
            f"{type(model).__name__} cannot keep documents of one row apart, so train.packing cannot be used with it",
            fix="leave out --packing; --batch-tokens N saves padding too: documents of like length go together",
        )


def check_ids(ids: Int32s, tokenizer: Any, embeddings: int) -> None:
    """UsageError where one of the ids that a tokenizer gave has no row in so many embeddings.

    A tokenizer may have more tokens than its model has rows, as long as no text and no template uses them.
    """
    if len(ids) and (highest := int(ids.max())) >= embeddings:
        raise UsageError(
            f"{name_of(tokenizer)}: its tokenizer gives id {highest} ({tokenizer.convert_ids_to_tokens(highest)!r}), "
            f"the model has {embeddings} embeddings",
            fix="use the tokenizer the model was trained with, or the model that was trained with this one",
        )


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


def check_model(model: PreTrainedModel) -> None:
    """Passes over eight tokens; UsageError where they show no causal model under a linear head."""
    with evaluating(model):
        check_head(model)
        check_causal(model)


@torch.no_grad()
def check_head(model: PreTrainedModel) -> None:
    """Compare `head_of(model)` on the base model's states with the model's own logits on eight tokens.

    UsageError where they differ, so that logits made from states would not be the model's; or where it cannot be run.
    """
    ids_BL, head, seen = tokens_of_any(model), head_of(model), list[Tensor]()
    listening = backbone(model).register_forward_hook(lambda _module, _ids, out: seen.append(out.last_hidden_state))
    try:
        theirs = model(input_ids=ids_BL, use_cache=False).logits.float()
        states_BLD = seen[0] if seen else backbone(model)(input_ids=ids_BL, use_cache=False).last_hidden_state
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError) as error:
        raise UsageError(
            f"{type(model).__name__} does not run on token ids alone, or its sizes do not fit together: {short(error)}"
        ) from error
    finally:
        listening.remove()
    embedded = model.get_input_embeddings().weight.shape[1]
    if not states_BLD.shape[-1] == head.weight_VD.shape[1] == embedded:
        raise UsageError(
            f"{type(model).__name__}: its last states are {states_BLD.shape[-1]} wide, its head takes "
            f"{head.weight_VD.shape[1]} and its embeddings are {embedded}; all must be the same"
        )
    worst = float((head(states_BLD).float() - theirs).abs().max())
    share = 1e-4 if states_BLD.dtype == torch.float32 else 0.02
    if not worst <= share * float(theirs.abs().max()):
        raise UsageError(
            f"{type(model).__name__}: its logits are no linear head on its last states (off by {worst:.3g}), "
            "so they cannot be rebuilt from a cache"
        )

"""The states that one pass keeps, against transformers' own output_hidden_states."""

import pytest
import torch
from torch import nn

import tiny_models as tiny
from xkd_schemas.errors import UsageError
from xkd_trainer.models.architecture import blocks_of
from xkd_trainer.models.forward import States, run

LENGTHS = (6, 2, 9)


def test_states_carry_gradient_and_hooks_are_gone_afterwards() -> None:
    model = tiny.llama("byte_level")
    ids_BL, valid_BL = tiny.ids_and_valid(LENGTHS, 500)

    run(model, ids_BL, valid_BL, layers=(1,)).layers[1].sum().backward()

    assert model.get_input_embeddings().weight.grad is not None
    assert all(not block._forward_hooks for block in blocks_of(model))


@pytest.mark.parametrize("layer", [0, 3, -1])
def test_a_layer_that_does_not_exist_is_refused(layer: int) -> None:
    with pytest.raises(UsageError, match=rf"layer {layer} does not exist: LlamaForCausalLM has layers 1 to 2"):
        run(tiny.llama("byte_level"), *tiny.ids_and_valid((3,), 500), layers=(layer,))


def test_states_that_a_later_block_writes_into_are_refused() -> None:
    model = tiny.llama("byte_level")
    blocks_of(model)[1].register_forward_pre_hook(lambda _module, given: (given[0].mul_(2.0), *given[1:]))

    with torch.no_grad(), pytest.raises(UsageError, match=r"block 1 gives states that a later block writes into"):
        run(model, *tiny.ids_and_valid((3,), 500), layers=(1,))


def test_a_list_inside_a_block_is_never_taken_for_the_blocks() -> None:
    model = tiny.llama("byte_level", layers=3)
    model.model.layers[0].experts = nn.ModuleList([nn.Linear(2, 2) for _ in range(2)])
    model.config.num_hidden_layers = 2

    with pytest.raises(UsageError, match=r"LlamaForCausalLM: found no list of 2 blocks"):
        run(model, *tiny.ids_and_valid((3,), 500), layers=(1,))
    with pytest.raises(UsageError, match=r"found no list of 2 blocks"):
        run(model, *tiny.ids_and_valid((3,), 500), attention=True)


def test_states_in_float32_are_the_same_numbers() -> None:
    half = States(last_BLD=torch.randn(1, 2, 3).bfloat16(), layers={1: torch.ones(1, 2, 3).half()}, attention_BL=None)

    wide = half.as_float32()

    assert {wide.last_BLD.dtype, wide.layers[1].dtype} == {torch.float32}
    assert torch.equal(wide.last_BLD.bfloat16(), half.last_BLD)
    assert wide.as_float32() is wide

"""The states that one pass keeps, against transformers' own output_hidden_states."""

import pytest
import torch
from torch import nn
from transformers import BloomConfig, BloomForCausalLM

import tiny_models as tiny
from xkd_schemas.errors import UsageError
from xkd_trainer.models.architecture import blocks_of, num_layers
from xkd_trainer.models.forward import States, run

LENGTHS = (6, 2, 9)
MODELS = {"llama": tiny.llama, "gpt2": tiny.gpt2}


@pytest.mark.parametrize("family", MODELS)
@torch.no_grad()
def test_every_layer_is_the_one_that_transformers_names_the_last_one_final_normed(family: str) -> None:
    model = MODELS[family]("byte_level", layers=3)
    ids_BL, valid_BL = tiny.ids_and_valid(LENGTHS, 500)

    states = run(model, ids_BL, valid_BL, layers=(3, 1, 2))

    assert set(states.layers) == {1, 2, 3}
    for row, length in enumerate(LENGTHS):  # each document alone: padding must not matter either
        expected = model(input_ids=ids_BL[row : row + 1, :length], output_hidden_states=True)
        for layer, found in states.layers.items():
            torch.testing.assert_close(
                found[row, :length], expected.hidden_states[layer][0], rtol=1e-4, atol=1e-5, msg=f"layer {layer}"
            )
        logits = model.get_output_embeddings()(states.last_BLD[row, :length])
        torch.testing.assert_close(logits, expected.logits[0], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(states.layers[2], states.last_BLD, atol=0.1)


@torch.no_grad()
def test_padding_ids_change_no_state_of_a_token() -> None:
    model = tiny.llama("byte_level")
    ids_BL, valid_BL = tiny.ids_and_valid(LENGTHS, 500)

    first = run(model, ids_BL, valid_BL, layers=(1,))
    second = run(model, ids_BL.masked_fill(~valid_BL, 77), valid_BL, layers=(1,))

    assert torch.equal(first.last_BLD[valid_BL], second.last_BLD[valid_BL])
    assert torch.equal(first.layers[1][valid_BL], second.layers[1][valid_BL])


def test_states_carry_gradient_and_hooks_are_gone_afterwards() -> None:
    model = tiny.llama("byte_level")
    ids_BL, valid_BL = tiny.ids_and_valid(LENGTHS, 500)

    run(model, ids_BL, valid_BL, layers=(1,)).layers[1].sum().backward()

    assert model.get_input_embeddings().weight.grad is not None
    assert all(not block._forward_hooks for block in blocks_of(model))


@torch.no_grad()
def test_the_attention_row_sums_to_one_over_the_tokens_of_each_document() -> None:
    model = tiny.llama("byte_level")
    ids_BL, valid_BL = tiny.ids_and_valid(LENGTHS, 500)

    row_BL = run(model, ids_BL, valid_BL, attention=True).attention_BL

    assert row_BL is not None
    torch.testing.assert_close(row_BL.sum(1), torch.ones(len(LENGTHS)))
    assert float(row_BL[~valid_BL].abs().sum()) == 0.0


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


def test_a_family_whose_attention_is_not_looked_up_by_name_shows_none_and_never_a_uniform_row() -> None:
    model = BloomForCausalLM(BloomConfig(vocab_size=500, hidden_size=8, n_layer=2, n_head=2))
    with pytest.raises(UsageError, match=r"no attention map in its last block.*losses\.sra\.weights=uniform"):
        run(model, *tiny.ids_and_valid((3,), 500), attention=True)


def test_states_in_float32_are_the_same_numbers() -> None:
    half = States(last_BLD=torch.randn(1, 2, 3).bfloat16(), layers={1: torch.ones(1, 2, 3).half()}, attention_BL=None)

    wide = half.as_float32()

    assert {wide.last_BLD.dtype, wide.layers[1].dtype} == {torch.float32}
    assert torch.equal(wide.last_BLD.bfloat16(), half.last_BLD)
    assert wide.as_float32() is wide


def test_the_number_of_blocks_is_the_configured_one() -> None:
    assert num_layers(tiny.gpt2("byte_level", layers=3)) == len(blocks_of(tiny.gpt2("byte_level", layers=3))) == 3

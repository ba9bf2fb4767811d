"""What is read of a model: the states that one pass keeps, its head, and rows of its attention."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Gemma2Config, Gemma2ForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import tiny_models as tiny
from xkd_schemas.errors import UsageError
from xkd_trainer.losses.declaration import constant_head
from xkd_trainer.models.architecture import Head, blocks_of, head_of
from xkd_trainer.models.attention import check_attention, last_row, listen
from xkd_trainer.models.forward import States, check_head, run

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


# The head as plain numbers; test_families compares it with the logits of families that scale, cap or bias them


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_shares_the_models_weights(tied: bool) -> None:
    model = tiny.llama("byte_level", tied=tied)

    weight_VD = head_of(model).weight_VD

    assert weight_VD is model.get_output_embeddings().weight
    assert (weight_VD is model.get_input_embeddings().weight) == tied


class Capped(nn.Linear):
    """A head with a cap that no configuration tells: far above these logits, it changes them by a hundredth."""

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        logits = super().forward(states)
        cap = 6.0 * float(logits.abs().max())
        return cap * (logits / cap).tanh()


def test_a_small_difference_of_the_logits_is_noticed() -> None:
    model = tiny.llama("byte_level", tied=False)
    model.get_output_embeddings().__class__ = Capped

    with pytest.raises(UsageError, match=r"LlamaForCausalLM: its logits are no linear head.*\(off by 0\.0.*cannot be"):
        check_head(model)


def test_a_model_without_a_head_is_refused() -> None:
    with pytest.raises(UsageError, match=r"LlamaModel has no linear language-model head"):
        head_of(tiny.llama("byte_level").base_model)


def test_constant_head_folds_the_scale_and_refuses_a_cap() -> None:
    torch.manual_seed(0)
    head = Head(weight_VD=nn.Parameter(torch.randn(5, 3)), bias_V=nn.Parameter(torch.randn(5)), scale=0.5)
    states_ND = torch.randn(2, 3)

    folded = constant_head(head, "x")

    torch.testing.assert_close(folded(states_ND), head(states_ND).detach())
    assert folded.scale == 1.0
    assert not folded.weight_VD.requires_grad
    assert constant_head(head, "x", convert=False).weight_VD.requires_grad
    with pytest.raises(UsageError, match=r"dwa cannot use a head with soft-capped logits \(cap 30.0\)"):
        constant_head(Head(weight_VD=torch.ones(2, 2), softcap=30.0), "dwa")


# The listener's one row against transformers' eager maps, and against a loop for what they do not have


def slow_row(query: Tensor, key: Tensor, last: int, **call: Any) -> list[list[float]]:
    """One document: for each query head the softmax over the tokens it sees, sinks in the denominator."""
    heads, _, width = query.shape
    scale, window = call.get("scaling") or 1 / math.sqrt(width), call.get("sliding_window") or len(query[0])
    out = []
    for head in range(heads):
        seen = [t for t in range(last + 1) if t > last - window and call["attends"][last, t]]
        scores = {t: scale * float(query[head, last] @ key[head * len(key) // heads, t]) for t in seen}
        if call.get("position_bias") is not None:
            scores = {t: score + float(call["position_bias"][0, head, last, t]) for t, score in scores.items()}
        total = math.fsum(math.exp(s) for s in scores.values())
        total += math.exp(float(call["s_aux"][head])) if call.get("s_aux") is not None else 0.0
        out.append([math.exp(scores[t]) / total if t in scores else 0.0 for t in range(key.shape[1])])
    return out


@pytest.mark.parametrize(
    "call",
    [
        *(
            {"sliding_window": window, "s_aux": sinks}
            for window in (None, 1, 3, 50)
            for sinks in (None, torch.randn(4))
        ),
        {"scaling": 2.0},
        {"scaling": 0.5, "position_bias": torch.randn(1, 4, 6, 6)},
    ],
)
def test_a_row_equals_the_loop_with_windows_sinks_scales_biases_and_masks_in_both_forms(call: dict[str, Any]) -> None:
    torch.manual_seed(3)
    query_BHLE, key_BKLE, last_B = torch.randn(3, 4, 6, 5), torch.randn(3, 2, 6, 5), torch.tensor([5, 0, 3])
    attends_B1LL = torch.ones(3, 1, 6, 6, dtype=torch.bool).tril()
    whole_B1LL = attends_B1LL.clone()
    attends_B1LL[0, 0, 5, 4] = attends_B1LL[2, 0, 3, 1] = False
    masks = {None: whole_B1LL, attends_B1LL: attends_B1LL, attends_B1LL.float().log(): attends_B1LL}

    for mask, seen_B1LL in masks.items():
        row_BHL = last_row(query_BHLE, key_BKLE, last_B, mask, call)

        for b, last in enumerate(last_B.tolist()):
            want = slow_row(query_BHLE[b], key_BKLE[b], last, attends=seen_B1LL[b, 0], **call)
            torch.testing.assert_close(row_BHL[b], torch.tensor(want), rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_dropout_of_an_eager_map_is_not_in_its_row_and_stays_in_the_output() -> None:
    config = Gemma2Config(
        vocab_size=40, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=4, attention_dropout=0.5,
    )  # fmt: skip
    torch.manual_seed(0)
    model, (ids_BL, valid_BL) = Gemma2ForCausalLM(config), tiny.ids_and_valid(LENGTHS, 40)

    def heard(training: bool) -> tuple[Tensor, Tensor]:
        with listen(frozenset([0]), {"last": valid_BL.sum(1) - 1}) as rows:
            output = model.train(training).base_model(input_ids=ids_BL, use_cache=False).last_hidden_state
        return rows.rows["last", 0], output

    (row_BHL, dropped_BLD), (expected_BHL, whole_BLD) = heard(training=True), heard(training=False)
    assert torch.equal(row_BHL, expected_BHL)
    assert not torch.allclose(dropped_BLD, whole_BLD)


@torch.no_grad()
def test_two_listeners_at_once_hear_the_same_and_the_names_lead_back_afterwards() -> None:
    model = tiny.llama("byte_level")
    ids_BL, valid_BL = tiny.ids_and_valid(LENGTHS, 500)
    last_B = valid_BL.sum(1) - 1

    with listen(frozenset([0, 1]), {"last": last_B}) as outer, listen(frozenset([1]), {"last": last_B}) as inner:
        model.base_model(input_ids=ids_BL, use_cache=False)

    assert (set(outer.rows), set(inner.rows)) == ({("last", 0), ("last", 1)}, {("last", 1)})
    assert torch.equal(outer.rows["last", 1], inner.rows["last", 1])
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward


def test_an_attention_that_is_more_than_its_map_times_its_values_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.llama("byte_level").train()
    check_attention(model)
    assert model.training

    def scaled(*given: Any, **options: Any) -> tuple[Tensor, None]:
        output, _ = sdpa_attention_forward(*given, **options)
        return output * 1.05, None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", scaled)
    with pytest.raises(UsageError, match=r"block 1 returns something else.*off by 0\.0\d+.*sra\.weights=uniform"):
        check_attention(model)

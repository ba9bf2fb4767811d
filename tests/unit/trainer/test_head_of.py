"""The head as plain numbers, on families that scale, cap or bias their logits."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import tiny_models as tiny
from xkd_schemas.errors import UsageError
from xkd_trainer.losses.declaration import constant_head
from xkd_trainer.models.architecture import Head, head_of
from xkd_trainer.models.forward import check_head, run

SIZES: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def of_family(family: str, **changed: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**SIZES, **changed}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.eval()


FAMILIES = {
    "llama": {},
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 8.0},
    "gemma2": {"final_logit_softcapping": 3.0},
    "phi": {},
}


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_head_on_last_states_gives_the_models_own_logits(family: str) -> None:
    model = of_family(family, **FAMILIES[family])
    ids_BL, valid_BL = tiny.ids_and_valid((7, 7), 40)

    logits = head_of(model)(run(model, ids_BL, valid_BL).last_BLD)

    torch.testing.assert_close(logits, model(input_ids=ids_BL).logits, rtol=1e-4, atol=1e-5)
    check_head(model)


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
    model = of_family("llama", tie_word_embeddings=False)
    capped = Capped(16, 40, bias=False)
    capped.weight = model.get_output_embeddings().weight
    model.set_output_embeddings(capped)

    with pytest.raises(
        UsageError,
        match=r"LlamaForCausalLM: its logits are no linear head.*\(off by 0\.0.*cannot be rebuilt",
    ):
        check_head(model)


def test_the_cap_of_recurrent_gemma_is_read_by_the_name_it_has_there() -> None:
    model = of_family("recurrent_gemma", block_types=["attention"], attention_window_size=4, lru_width=16)

    assert head_of(model).softcap == 30.0
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

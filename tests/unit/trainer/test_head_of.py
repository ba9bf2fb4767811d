"""The head as plain numbers; test_families compares it with the logits of families that scale, cap or bias them."""

import pytest
import torch
from torch import nn

import tiny_models as tiny
from xkd_schemas.errors import UsageError
from xkd_trainer.losses.declaration import constant_head
from xkd_trainer.models.architecture import Head, head_of
from xkd_trainer.models.forward import check_head


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

"""The listener's one row against transformers' eager attention maps, and against a loop for what they do not have."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Gemma2Config, Gemma2ForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import tiny_models as tiny
from xkd_schemas.errors import UsageError
from xkd_trainer.models.attention import check_attention, last_row, listen

LENGTHS = (9, 1, 4, 7)


def slow_row(query: Tensor, key: Tensor, last: int, *, window: int | None, sinks: Tensor | None) -> list[list[float]]:
    """One document: for each query head the softmax over the tokens it sees, sinks in the denominator."""
    heads, _, width = query.shape
    groups = heads // key.shape[0]
    out = []
    for head in range(heads):
        seen = [t for t in range(last + 1) if window is None or t > last - window]
        scores = {t: float(query[head, last] @ key[head // groups, t]) / math.sqrt(width) for t in seen}
        total = math.fsum(math.exp(s) for s in scores.values())
        total += math.exp(float(sinks[head])) if sinks is not None else 0.0
        out.append([math.exp(scores[t]) / total if t in scores else 0.0 for t in range(key.shape[1])])
    return out


@pytest.mark.parametrize("window", [None, 1, 3, 50])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_windows_and_sinks_equal_the_loop(window: int | None, with_sinks: bool) -> None:
    torch.manual_seed(3)
    query_BHLE, key_BKLE = torch.randn(3, 4, 6, 5), torch.randn(3, 2, 6, 5)
    last_B, sinks_H = torch.tensor([5, 0, 3]), torch.randn(4) if with_sinks else None

    row_BHL = last_row(query_BHLE, key_BKLE, last_B, None, {"sliding_window": window, "s_aux": sinks_H})

    for b, last in enumerate(last_B.tolist()):
        want = slow_row(query_BHLE[b], key_BKLE[b], last, window=window, sinks=sinks_H)
        torch.testing.assert_close(row_BHL[b], torch.tensor(want), rtol=1e-4, atol=1e-6)


def test_the_scale_of_the_call_is_used_and_a_mask_is_obeyed_in_both_of_its_forms() -> None:
    torch.manual_seed(4)
    query_BHLE, key_BKLE, last_B = torch.randn(2, 2, 4, 3), torch.randn(2, 2, 4, 3), torch.tensor([3, 2])
    attends_B1LL = torch.ones(2, 1, 4, 4, dtype=torch.bool).tril()
    attends_B1LL[0, 0, 3, 1] = False
    added_B1LL = torch.where(attends_B1LL, 0.0, -torch.inf)

    by_bool = last_row(query_BHLE, key_BKLE, last_B, attends_B1LL, {"scaling": 2.0})
    by_sum = last_row(query_BHLE, key_BKLE, last_B, added_B1LL, {"scaling": 2.0})

    want_HL = (2.0 * torch.einsum("he,hle->hl", query_BHLE[0, :, 3], key_BKLE[0]))[:, [0, 2, 3]].softmax(-1)
    torch.testing.assert_close(by_bool[0][:, [0, 2, 3]], want_HL)
    assert by_bool[0, :, 1].abs().sum() == 0
    torch.testing.assert_close(by_sum, by_bool)


def test_a_bias_of_the_call_is_added_to_the_scores() -> None:
    torch.manual_seed(5)
    query_BHLE, key_BKLE, last_B = torch.randn(2, 2, 4, 3), torch.randn(2, 2, 4, 3), torch.tensor([3, 1])
    bias_1HLL = torch.randn(1, 2, 4, 4)

    row_BHL = last_row(query_BHLE, key_BKLE, last_B, None, {"scaling": 0.5, "position_bias": bias_1HLL})

    scores_HL = 0.5 * torch.einsum("he,hle->hl", query_BHLE[1, :, 1], key_BKLE[1]) + bias_1HLL[0, :, 1]
    torch.testing.assert_close(row_BHL[1, :, :2], scores_HL[:, :2].softmax(-1))


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

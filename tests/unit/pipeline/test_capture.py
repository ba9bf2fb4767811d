"""What is captured equals a plain computation on transformers' own hidden states and eager attention maps."""

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import slow_losses
import small_cache
from xkd_pipeline.capture import measure
from xkd_pipeline.capture.capture import TeacherSettings, batches_of, capture
from xkd_pipeline.capture.measure import Reading
from xkd_schemas.codecs import numbers_of
from xkd_schemas.errors import BadData
from xkd_schemas.signals import Signal
from xkd_schemas.tokens import CONTENT, END, Tokens

SETTINGS = TeacherSettings(model="", dtype="float32", batch_tokens=64)
WANTED = (
    Signal("hidden_last"), Signal("attention_last"), Signal("entropy"), Signal("argmax"), Signal("logsumexp"),
    Signal("target_logprob"),
    *(Signal("centrality", layer) for layer in (1, 3)),
    *(
        Signal(name, layer, unit)
        for name in ("span_mass", "span_vectors", "span_geometry")
        for layer, unit in ((1, "word"), (3, "phrase"))
    ),
)  # fmt: skip
SPANS = [[0, 1], [1, 2], [2, 5], [1, 6], [3, 3]]


def reading(length: int, seed: int, *, targets: slice = slice(3, None), vocab: int = 500) -> Reading:
    """A document of random tokens with spans that overlap, have one token, or none."""
    ids = np.random.default_rng(seed).integers(4, vocab, length).astype(np.int32)
    is_target = np.zeros(length, np.bool_)
    is_target[targets] = True
    kinds = np.full(length, CONTENT, np.uint8)
    kinds[2:][-1:] = END
    tokens = Tokens(
        status="ok", num_chars=length, ids=ids, spans=np.stack([np.arange(length), np.arange(1, length + 1)], 1),
        kinds=kinds, targets=is_target,
    )  # fmt: skip
    inside = np.array([s for s in SPANS if s[1] <= length], np.int32).reshape(-1, 2)
    return Reading(tokens=tokens, ranges={"word": inside, "phrase": inside[::-1].copy()})


def empty() -> Reading:
    one = reading(1, 0)
    t = one.tokens
    none = replace(t, status="bad", ids=t.ids[:0], spans=t.spans[:0], kinds=t.kinds[:0], targets=t.targets[:0])
    return Reading(tokens=none, ranges={unit: np.zeros((2, 2), np.int32) for unit in ("word", "phrase")})


READINGS = tuple(reading(length, seed) for length, seed in ((14, 1), (17, 3), (13, 5)))
READINGS += reading(19, 2, targets=slice(5, 9)), reading(2, 4, targets=slice(1, 2))
"""Of lengths that share batches: four of them within 96 tokens, or two and two within 64."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("teachers")
    return {"llama": small_cache.llama(root / "llama"), "gpt2": small_cache.gpt2(root / "gpt2")}


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def model(request: pytest.FixtureRequest, folders: dict[str, Path]) -> PreTrainedModel:
    return loaded(folders[request.param])


@pytest.fixture(scope="module")
def eager(model: PreTrainedModel) -> PreTrainedModel:
    """The same weights with the attention whose maps transformers shows."""
    twin = type(model)(model.config.__class__.from_dict(model.config.to_dict())).eval()
    twin.load_state_dict(model.state_dict())
    twin.set_attn_implementation("eager")
    return twin


def loaded(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


@torch.no_grad()
def plain(model: PreTrainedModel, one: Reading) -> Any:
    ids_1L = torch.from_numpy(one.tokens.ids.astype(np.int64))[None]
    return model(ids_1L, output_hidden_states=True, output_attentions=True)


def test_every_signal_is_the_plain_computation_on_the_named_layer_and_unit(model, eager) -> None:
    layered = (Signal(name, layer) for name in ("hidden", "attention", "attention_text") for layer in (1, 3))
    for one, row in zip(READINGS, capture(model, READINGS, [*WANTED, *layered], SETTINGS), strict=True):
        said, targets = plain(eager, one), np.flatnonzero(one.tokens.targets)
        expected_RD = said.hidden_states[-1][0, targets[0] - 1 : targets[-1] + 1]
        np.testing.assert_allclose(numbers_of(row["hidden_last"]), expected_RD, rtol=2**-7, atol=1e-3)
        logits_NV = said.logits[0, targets - 1].double()
        p_NV = logits_NV.softmax(-1)
        np.testing.assert_allclose(row["entropy"], -(p_NV * p_NV.log()).sum(-1), rtol=1e-4)
        assert row["argmax"].tolist() == logits_NV.argmax(-1).tolist()
        np.testing.assert_allclose(row["logsumexp"], logits_NV.logsumexp(-1), rtol=1e-5)
        log_p_N = p_NV.log().numpy()[np.arange(len(targets)), one.tokens.ids[targets]]
        np.testing.assert_allclose(row["target_logprob"], log_p_N, rtol=1e-4, atol=1e-5)
        for column, layer in (("_last", 0), *((f"{kind}@{at}", at) for kind in ("", "_text") for at in (1, 3))):
            token = np.flatnonzero(one.tokens.kinds == CONTENT)[-1] if "text" in column else -1
            expected_L = said.attentions[layer - 1][0, :, token].sum(0)
            found = row[f"attention{column}"]
            np.testing.assert_allclose(found, expected_L / expected_L.sum(), rtol=1e-4, atol=1e-6, err_msg=column)
            assert found.dtype == np.float32
        for layer, unit in ((1, "word"), (3, "phrase")):
            hidden = said.hidden_states[layer][0].tolist()
            weights = slow_losses.centrality(hidden)
            np.testing.assert_allclose(numbers_of(row[f"hidden@{layer}"]), hidden, rtol=2**-7, atol=1e-3)
            np.testing.assert_allclose(row[f"centrality@{layer}"], weights, rtol=1e-3, atol=1e-6)
            pooled = [slow_losses.pool(hidden, weights, first, end) for first, end in one.ranges[unit].tolist()]
            vectors_KD, mass_K = ([part[at] for part in pooled] for at in (0, 1))
            np.testing.assert_allclose(row[f"span_mass@{layer}:{unit}"], mass_K, rtol=1e-3, atol=1e-6)
            vectors = numbers_of(row[f"span_vectors@{layer}:{unit}"])
            np.testing.assert_allclose(vectors, vectors_KD, rtol=2**-7, atol=1e-3)
            expected = [slow_losses.cosine(a, b) for a, b in itertools.combinations(vectors_KD, 2)]
            found = row[f"span_geometry@{layer}:{unit}"]
            assert found.dtype == np.float16
            np.testing.assert_allclose(found, np.array(expected), atol=2e-3)


def test_a_document_has_the_same_signals_alone_and_padded_in_a_batch(model) -> None:
    large = SETTINGS.model_copy(update={"batch_tokens": 4096})
    lengths = [len(one.tokens.ids) for one in READINGS]
    assert [len(batch) for batch in batches_of(lengths, large.batch_tokens, large.pad_multiple)] == [4, 1]
    together = capture(model, READINGS, WANTED, large)
    for one, row in zip(READINGS, together, strict=True):
        (alone,) = capture(model, [one], WANTED, SETTINGS.model_copy(update={"pad_multiple": 1}))
        assert row.keys() == alone.keys()
        for column, values in ((s.column, row[s.column]) for s in WANTED):
            a, b = (numbers_of(v) if v.dtype == np.uint16 else v for v in (values, alone[column]))
            close = {np.uint16: 2**-7, np.float16: 2e-3}.get(values.dtype.type, 1e-4)
            np.testing.assert_allclose(a, b, rtol=close, atol=1e-3 if close > 1e-4 else 1e-6, err_msg=column)


def test_a_document_without_tokens_has_empty_rows_and_disturbs_no_other(model) -> None:
    expected = capture(model, READINGS[:2], WANTED, SETTINGS)

    first, nothing, second = capture(model, [READINGS[0], empty(), READINGS[1]], WANTED, SETTINGS)

    assert set(nothing) == {s.column for s in WANTED}
    assert all(len(values) == 0 for values in nothing.values())
    assert nothing["hidden_last"].shape == nothing["span_vectors@1:word"].shape == (0, 32)
    for ours, theirs in zip((first, second), expected, strict=True):
        for column in ours:
            np.testing.assert_array_equal(ours[column], theirs[column])


def test_a_document_without_a_target_keeps_its_spans_and_no_prediction(model) -> None:
    (row,) = capture(model, [reading(6, 7, targets=slice(0, 0))], WANTED, SETTINGS)

    assert row["hidden_last"].shape == (0, 32)
    assert len(row["entropy"]) == len(row["argmax"]) == 0
    assert len(row["span_mass@1:word"]) == 5


def test_only_what_is_wanted_is_captured(model) -> None:
    (row,) = capture(model, READINGS[:1], [Signal("argmax"), Signal("span_mass", 2, "word")], SETTINGS)

    assert set(row) == {"argmax", "span_mass@2:word"}


def test_a_bfloat16_teacher_gives_the_signals_of_its_float32_twin_roughly(folders) -> None:
    half = loaded(folders["llama"], torch.bfloat16)

    row = capture(half, READINGS, WANTED, SETTINGS)[1]
    exact = capture(loaded(folders["llama"]), READINGS, WANTED, SETTINGS)[1]

    np.testing.assert_allclose(row["centrality@1"], exact["centrality@1"], atol=0.02)
    np.testing.assert_allclose(row["entropy"], exact["entropy"], atol=0.1)
    assert row["attention_last"].sum() == pytest.approx(1.0, abs=1e-5)


def test_a_teacher_whose_states_are_not_finite_is_refused(folders) -> None:
    broken = loaded(folders["llama"])
    with torch.no_grad():
        broken.get_input_embeddings().weight[READINGS[0].tokens.ids[-1]] = torch.nan

    with pytest.raises(BadData, match=r"hidden states are not finite in float32.*--dtype float32"):
        capture(broken, READINGS[:1], WANTED, SETTINGS)


def test_pieces_of_logits_give_the_same_predictions_as_the_whole(model, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = [Signal("entropy"), Signal("argmax"), Signal("logsumexp")]
    whole = capture(model, READINGS, wanted, SETTINGS)
    monkeypatch.setattr(measure, "LOGIT_BYTES", 1)  # one position at a time

    for ours, theirs in zip(capture(model, READINGS, wanted, SETTINGS), whole, strict=True):
        for column, values in theirs.items():
            np.testing.assert_allclose(ours[column], values, rtol=1e-5)

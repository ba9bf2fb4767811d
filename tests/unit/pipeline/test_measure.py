"""The small parts of measuring: padding, bits, and what a column holds when logits come in pieces."""

import numpy as np
import pytest
import torch

from xkd_pipeline.capture import measure
from xkd_pipeline.capture.measure import Reading, bf16_bits, pad_readings, signals_of
from xkd_schemas.signals import Signal
from xkd_schemas.tokens import CONTENT, Tokens
from xkd_trainer.models.architecture import Head
from xkd_trainer.models.forward import States


def reading(ids: list[int], targets: list[bool], **ranges: list[list[int]]) -> Reading:
    n = len(ids)
    tokens = Tokens(
        status="ok", num_chars=n, ids=np.array(ids, np.int32),
        spans=np.stack([np.arange(n), np.arange(1, n + 1)], 1).astype(np.int32),
        kinds=np.full(n, CONTENT, np.uint8), targets=np.array(targets, np.bool_),
    )  # fmt: skip
    units = {unit: np.array(ranges.get(unit, []), np.int32).reshape(-1, 2) for unit in ("word", "phrase")}
    return Reading(tokens=tokens, ranges=units)


def states(hidden_BLD: torch.Tensor) -> States:
    return States(last_BLD=hidden_BLD, layers={1: hidden_BLD}, attention_BL=None)


def test_padding_is_on_the_right_to_a_multiple() -> None:
    pair = [reading([5] * 7, [False] * 7), reading([6] * 19, [False] * 19)]

    ids_BL, valid_BL = pad_readings(pair, 8)

    assert ids_BL.shape == (2, 24)
    assert ids_BL[0, :7].tolist() == [5] * 7
    assert ids_BL[0, 7:].tolist() == [0] * 17
    assert valid_BL.sum(1).tolist() == [7, 19]
    assert valid_BL[0, :7].all()


def test_bf16_bits_round_to_nearest_even() -> None:
    values = torch.tensor([1.0, -2.0, 1.00390625, 3.140625])

    assert bf16_bits(values).tolist() == [0x3F80, 0xC000, 0x3F80, 0x4049]


def test_pieces_of_logits_give_the_same_predictions_as_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    pair = [reading([1, 2, 3, 4], [False, True, True, True]), reading([5, 6], [False, True])]
    hidden_BLD = torch.randn(2, 4, 8, generator=generator)
    head = Head(weight_VD=torch.randn(11, 8, generator=generator))
    valid_BL = torch.tensor([[True] * 4, [True, True, False, False]])
    wanted = [Signal("entropy"), Signal("argmax"), Signal("logsumexp")]

    whole = signals_of(pair, states(hidden_BLD), valid_BL, head, wanted)
    monkeypatch.setattr(measure, "LOGIT_BYTES", 1)  # one position at a time
    pieces = signals_of(pair, states(hidden_BLD), valid_BL, head, wanted)

    for ours, theirs, count in zip(pieces, whole, (3, 1), strict=True):
        for column, values in theirs.items():
            assert len(values) == count
            np.testing.assert_allclose(ours[column], values, rtol=1e-6)
    for row, before_ND in zip(whole, (hidden_BLD[0, :3], hidden_BLD[1, :1]), strict=True):
        np.testing.assert_allclose(row["logsumexp"], head(before_ND).logsumexp(-1), rtol=1e-5)
        assert row["argmax"].tolist() == head(before_ND).argmax(-1).tolist()


def test_the_geometry_is_the_upper_triangle_row_by_row() -> None:
    hidden_BLD = torch.tensor([[[1.0, 0.0, 0.0], [3.0, 4.0, 0.0], [0.0, 0.0, 2.0]]])
    one = reading([1, 2, 3], [False, True, True], word=[[0, 1], [1, 2], [2, 3]])
    valid_BL = torch.ones(1, 3, dtype=torch.bool)

    (row,) = signals_of(
        [one], states(hidden_BLD), valid_BL, Head(weight_VD=torch.eye(3)), [Signal("span_geometry", 1, "word")]
    )

    np.testing.assert_allclose(row["span_geometry@1:word"], [0.6, 0.0, 0.0], atol=1e-3)


def test_a_document_with_fewer_spans_than_its_neighbour_has_only_its_own() -> None:
    pair = [
        reading([1, 2, 3], [False, True, True], phrase=[[0, 2]]),
        reading([1, 2, 3], [False, True, True], phrase=[[0, 1], [1, 2], [0, 3]]),
        reading([1, 2, 3], [False, True, True]),
    ]
    hidden_BLD = torch.randn(3, 3, 4, generator=torch.Generator().manual_seed(1))
    valid_BL = torch.ones(3, 3, dtype=torch.bool)
    wanted = [Signal(name, 1, "phrase") for name in ("span_mass", "span_vectors", "span_geometry")]

    rows = signals_of(pair, states(hidden_BLD), valid_BL, Head(weight_VD=torch.eye(4)), wanted)

    assert [len(row["span_mass@1:phrase"]) for row in rows] == [1, 3, 0]
    assert [row["span_vectors@1:phrase"].shape for row in rows] == [(1, 4), (3, 4), (0, 4)]
    assert [len(row["span_geometry@1:phrase"]) for row in rows] == [0, 3, 0]

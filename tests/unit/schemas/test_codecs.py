"""Codecs: exact where they say so, bounded where they do not, and nothing silent in between."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xkd_schemas.codecs import (
    CODECS,
    MOST_CLASSES,
    TOTAL,
    Bits,
    Encoded,
    bits_of,
    find_class_fault,
    numbers_of,
    pack_classes,
    unpack_classes,
)
from xkd_schemas.errors import BadData
from xkd_schemas.ragged import Columns, batch_of

ROWS = st.tuples(st.integers(1, 9), st.lists(st.integers(0, 6), max_size=5), st.integers(0, 2**32 - 1))


def finite_rows(width: int, lengths: list[int], seed: int) -> list[Bits]:
    """bfloat16 of very different channels; some channels constant, some a thousand times the others."""
    rng = np.random.default_rng(seed)
    spread = rng.choice([0.0, 0.01, 1.0, 1000.0], width)
    centre = rng.choice([0.0, -3.0, 500.0], width)
    return [bits_of((rng.standard_normal((n, width)) * spread + centre).astype(np.float32)) for n in lengths]


def stored(name: str, rows: list[Bits], width: int) -> list[Bits]:
    codec = CODECS[name]
    encoded = codec.encode("h", rows)
    schema = pa.schema([pa.field(n, kind, nullable=False) for n, kind in codec.fields("h", width)])
    batch = batch_of(schema, encoded.columns)
    return [codec.decode("h", lambda n, i=i: Columns(batch).row(n, i), encoded.metadata) for i in range(len(rows))]


@pytest.mark.parametrize("name", ["bf16", "bf16-planes"])
@given(ROWS)
@settings(max_examples=60, deadline=None)
def test_lossless_codecs_keep_every_bit(name: str, shape: tuple[int, list[int], int]) -> None:
    width, lengths, seed = shape
    rng = np.random.default_rng(seed)
    rows = [rng.integers(0, 2**16, (n, width), dtype=np.uint16) for n in lengths]  # NaN, infinity, denormals too
    for row, again in zip(rows, stored(name, rows, width), strict=True):
        assert again.dtype == np.uint16
        assert np.array_equal(row, again)


@given(ROWS)
@settings(max_examples=60, deadline=None)
def test_int8_is_within_half_a_step_of_its_channel_and_token(shape: tuple[int, list[int], int]) -> None:
    width, lengths, seed = shape
    rows = finite_rows(width, lengths, seed)
    every = np.concatenate([numbers_of(r) for r in rows]) if rows else np.zeros((0, width), np.float32)
    spread = every.std(0) if len(every) else np.zeros(width)
    for row, again in zip(rows, stored("int8", rows, width), strict=True):
        exact, got = numbers_of(row).astype(float), numbers_of(again).astype(float)
        if not len(exact):
            continue
        reach = np.max(np.abs(exact - every.mean(0)) / np.where(spread > 0, spread, 1.0), -1, keepdims=True)
        step = reach / 127 * np.where(spread > 0, spread, 1.0)
        assert np.all(np.abs(exact - got) <= 0.51 * step + 0.005 * np.abs(exact) + 1e-5)


def test_planes_are_smaller_on_states_as_models_make_them() -> None:
    rng = np.random.default_rng(0)
    rows = [bits_of(rng.standard_normal((200, 256)).astype(np.float32)) for _ in range(4)]
    columns = CODECS["bf16-planes"].encode("h", rows).columns
    size = sum(np.asarray(part).nbytes for column in columns.values() for part in column)
    assert size < 0.72 * sum(row.nbytes for row in rows)


def damaged(encoded: Encoded, column: str, value: object) -> dict[str, object]:
    return {name: rows[0] for name, rows in encoded.columns.items()} | {column: value}


def test_parts_that_do_not_fit_are_named() -> None:
    row = bits_of(np.ones((3, 4), np.float32))
    planes, whole = CODECS["bf16-planes"], CODECS["int8"]
    made = planes.encode("h", [row])
    for bad in (np.zeros(0, np.uint8), np.frombuffer(b"no zstd at all", np.uint8)):
        with pytest.raises(BadData, match=r"column h: (its exponents cannot be unpacked|\d+ exponents)"):
            planes.decode("h", damaged(made, "h.exponents", bad).__getitem__, made.metadata)
    made = whole.encode("h", [row])
    with pytest.raises(BadData, match="lacks its centre or spread"):
        whole.decode("h", damaged(made, "h", row).__getitem__, {})
    with pytest.raises(BadData, match="2 scales"):
        whole.decode("h", damaged(made, "h.scale", np.ones(2, np.float32)).__getitem__, made.metadata)


def test_int8_refuses_what_is_not_finite() -> None:
    row = bits_of(np.ones((3, 4), np.float32))
    row[1, 2] = 0x7F80
    with pytest.raises(BadData, match=r"column h is not finite, which int8 cannot store.*Next: capture with"):
        CODECS["int8"].encode("h", [row])


def test_rounding_to_bfloat16_is_that_of_torch() -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(1)
    values = (rng.standard_normal(10_000) * 10.0 ** rng.integers(-30, 30, 10_000)).astype(np.float32)
    values[:3] = 0.0, -0.0, 1.00390625  # half between two
    theirs = torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    assert np.array_equal(bits_of(values), theirs)


@given(st.lists(st.tuples(st.integers(0, MOST_CLASSES - 1), st.integers(0, TOTAL)), min_size=1, max_size=9))
def test_an_entry_says_class_and_share(pairs: list[tuple[int, int]]) -> None:
    classes, shares = np.array(pairs).T[:, None]

    entries = pack_classes(classes, shares)
    found, weights = unpack_classes(entries)

    assert entries.dtype == np.int32
    assert entries.min() >= 0
    assert found.tolist() == classes.tolist()
    assert np.rint(weights * TOTAL).tolist() == shares.tolist()


@pytest.mark.parametrize(
    ("classes", "shares", "said"),
    [
        ([3, 9], [1, TOTAL - 1], ""),
        ([3, 10], [1, TOTAL - 1], "a class is not from 0 to 9"),
        ([-1, 3], [1, TOTAL - 1], "a class is not from 0 to 9"),
        ([5, 3], [1, TOTAL - 1], "classes of a prediction are not ascending"),
        ([5, 5], [1, TOTAL - 1], "classes of a prediction are not ascending"),
        ([3, 5], [2, TOTAL - 1], "shares add up to 4096, not to 4095"),
        ([3, 5], [1, TOTAL - 2], "shares add up to 4094, not to 4095"),
    ],
)
def test_a_fault_is_named(classes: list[int], shares: list[int], said: str) -> None:
    entries = pack_classes(np.array([[0, 5], classes]), np.array([[TOTAL, 0], shares]))

    assert find_class_fault(entries, 10) == said
    assert find_class_fault(entries[:0], 10) == ""

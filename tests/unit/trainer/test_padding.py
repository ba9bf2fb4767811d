"""Padded tensors against plain loops; memory is used again only when nothing refers to it."""

import gc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from xkd_trainer.models import padding
from xkd_trainer.models.padding import pad

DTYPES = (np.uint16, np.float32, np.int64, np.bool_)


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every size counts as large, and no memory is left of other tests."""
    monkeypatch.setattr(padding, "LARGE", 1)
    monkeypatch.setattr(padding, "_free", {})


def rows(lengths: list[int], fill: int, width: int = 3) -> list[npt.NDArray[Any]]:
    return [np.full((n, width), fill + place, np.uint16) for place, n in enumerate(lengths)]


def bits(tensor: Tensor) -> npt.NDArray[Any]:
    return tensor.view(torch.int16).numpy()


@given(
    lengths=st.lists(st.integers(0, 6), min_size=1, max_size=5), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 9)
)
@pytest.mark.parametrize("large", [1, 2**40])
def test_what_is_not_there_is_zero_and_what_is_there_keeps_every_bit(
    lengths: list[int], dtype: Any, seed: int, large: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(padding, "LARGE", large)
        rng = np.random.default_rng(seed)
        arrays = [rng.integers(0, 2**15, (n, 2)).astype(dtype) for n in lengths]
        pad([np.full((7, 2), 1, dtype)] * 6)  # what lay in the memory before

        padded = pad(arrays)

        kinds = {np.uint16: torch.bfloat16, np.float32: torch.float32, np.int64: torch.int64, np.bool_: torch.bool}
        assert padded.dtype == kinds[dtype]
        assert padded.shape == (len(lengths), max(1, *lengths, 1), 2)
        found = bits(padded) if dtype == np.uint16 else padded.numpy()
        for place, array in enumerate(arrays):
            assert np.array_equal(found[place, : len(array)].view(array.dtype), array)
            assert not found[place, len(array) :].any()


@pytest.mark.usefixtures("fresh")
def test_memory_of_a_tensor_that_is_gone_is_used_again_also_for_a_smaller_one() -> None:
    first = pad(rows([4, 5], 1))
    place = first.data_ptr()
    del first

    second = pad(rows([3, 2], 7))

    assert second.data_ptr() == place
    assert second.is_contiguous()
    assert bits(second)[:, :, 0].tolist() == [[7, 7, 7], [8, 8, 0]]


HELD: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "itself": lambda first, _: first,
    "a view": lambda first, _: first[1:, 2:],
    "its numbers": lambda first, _: first.numpy(),
    "a saved tensor": lambda first, weight: (first * weight).sum(),  # autograd keeps `first`: weight's gradient
}


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("part", HELD)
def test_a_batch_that_a_step_still_uses_is_not_written_to(part: str) -> None:
    first = pad([np.full((5, 2), 2.0, np.float32)] * 2)
    weight = torch.ones(2, requires_grad=True)
    held = HELD[part](first, weight)
    del first
    gc.collect()

    others = [pad([np.full((5, 2), 9.0, np.float32)] * 2) for _ in range(3)]

    assert len({o.data_ptr() for o in others}) == 3
    if part == "a saved tensor":
        held.backward()
        assert weight.grad.tolist() == [20.0, 20.0]
    else:
        assert (held == 2.0).all()


@pytest.mark.usefixtures("fresh")
def test_no_more_memory_is_kept_than_was_in_use_at_once() -> None:
    for length in (3, 30, 7, 300, 12, 3000, 5):
        held = [pad(rows([length], n)) for n in range(3)]
        del held

    pad(rows([1], 0))

    assert len(padding._free) <= 3


@pytest.mark.usefixtures("fresh")
def test_threads_that_make_batches_at_once_get_memory_of_their_own() -> None:
    def work(number: int) -> None:
        for turn in range(200):
            padded = pad(rows([2 + turn % 5, 3], 100 * number))
            assert (bits(padded)[0, 0, 0], bits(padded)[1, 2, 0]) == (100 * number, 100 * number + 1)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))

"""What the benchmarks of reading compare is the same states."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.bench_reader import batches, copy_all, of_datasets, pad_all
from benchmarks.states import HIDDEN, Sizes, states_cache
from xkd_pipeline.maintain.verify import verify
from xkd_trainer.data.cache import Cache
from xkd_trainer.data.collate import batch_of

SIZES = Sizes(lengths=(5, 17, 2, 9, 30), width=6, rows_per_shard=2)


def test_the_made_cache_is_whole_and_its_batches_hold_the_states_that_were_made(tmp_path: Path) -> None:
    states = states_cache(tmp_path / "cache", SIZES)

    batch = batch_of(Cache(tmp_path / "cache", student="made"), (3, 0, 4), frozenset({HIDDEN}))

    assert [bad for bad in verify(tmp_path / "cache", "full") if "tokenizer" not in bad.reason] == []
    assert batch.teacher_hidden_BRD is not None
    for place, row in enumerate((3, 0, 4)):
        found = batch.teacher_hidden_BRD[place].view(torch.int16).numpy().view(np.uint16)
        assert np.array_equal(found[: len(states[row])], states[row])
        assert not found[len(states[row]) :].any()


def test_other_readers_give_the_same_states(tmp_path: Path) -> None:
    states = states_cache(tmp_path / "cache", SIZES)
    tensors = [torch.from_numpy(one.view(np.int16)) for one in states]

    read = of_datasets(tensors, tmp_path / "datasets")

    assert all(np.array_equal(read(row), tensors[row].numpy()) for row in (4, 0, 2))


@pytest.mark.parametrize("work", [copy_all, pad_all])
def test_a_row_that_is_copied_stands_at_its_place_of_its_batch(work: Any) -> None:
    rows = [np.full((n, 2), n, np.int16) for n in range(1, 11)]
    target_BRD = np.zeros((8, 12, 2), np.int16)

    work(rows.__getitem__, np.arange(9, -1, -1), target_BRD)

    assert list(batches(list(range(10)))) == [list(range(8)), [8, 9]]
    assert (target_BRD[0, :2] == 2).all()
    assert (target_BRD[1, :1] == 1).all()
    assert (target_BRD[1, 1] == (9 if work is copy_all else 0)).all()
    assert (target_BRD[7, :3] == 3).all()

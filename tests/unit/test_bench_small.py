"""The benchmark of what is stored instead of states: its errors, its equal bytes, its sizes."""

from pathlib import Path

import pytest
import torch

import small_cache
from benchmarks import bench_small
from benchmarks.measure import Options
from benchmarks.pair import Pair


def test_so_many_draws_with_replacement_are_as_many_different_ones() -> None:
    draws = torch.tensor([[1, 1, 2, 3, 3, 4], [5, 5, 5, 6, 7, 8]])
    assert bench_small._as_many(draws, 2) == 4  # three draws are 1.5 different ones on average, four are 2.5
    assert bench_small._as_many(draws, 4) == 6
    assert bench_small._as_many(draws, 9) == 6


def test_errors_are_those_of_two_unbiased_draws_and_ours_is_smaller_where_classes_differ() -> None:
    logits = 4 * torch.randn(200, 900, generator=torch.Generator().manual_seed(0))
    rows = bench_small.errors(logits)
    assert all(0 < row.ours < row.theirs for row in rows[:3])
    assert rows[0].ours > rows[1].ours > rows[2].ours
    assert f"of {bench_small.DRAWS[1]} drawn" in rows[3].what


def test_sizes_and_logits_are_those_of_the_pair() -> None:
    made = small_cache.made()
    pair = Pair(teacher=str(made / "teacher"), student="", tokenizer="", cache=made / "cache", template="chat")

    draws, cosines, long, states = bench_small.sizes(pair)

    assert draws.ours < draws.theirs
    assert cosines.ours == states.ours < cosines.theirs < states.theirs
    assert long.ours == pytest.approx(4 * 159 * 158 / 512, rel=0.01)
    assert bench_small.logits_of(pair, 9).shape[0] == 9


def test_it_runs(tmp_path: Path) -> None:
    rows = bench_small.run(Options(quick=True, demo=None, scratch=tmp_path, repeats=1))
    assert len(rows) == 9
    assert all(row.ratio > 0 for row in rows)  # type: ignore[union-attr]

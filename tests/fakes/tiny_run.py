"""Runs on the tiny cache, whole or ended by an error in the middle."""

import itertools
from pathlib import Path
from typing import Any

import pytest

import tiny_models as tiny
from xkd_schemas.config import RunConfig
from xkd_schemas.errors import BadData
from xkd_trainer.data import sampler as batches
from xkd_trainer.data.batch import Batch
from xkd_trainer.data.collate import batch_of
from xkd_trainer.training import loop


def run(out: Path, **changed: Any) -> RunConfig:
    return tiny.tiny_cache().run(out=str(out), **changed)


def assert_same_run(first: Path, second: Path, weights: str = "model.safetensors") -> None:
    """Two finished runs have the same bytes of weights and metrics."""
    for name in (weights, "metrics.jsonl"):
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


def stopped(settings: RunConfig, monkeypatch: pytest.MonkeyPatch, whole: int) -> None:
    """The run, ended by an error when it asks for one more batch."""

    def fail(*_: Any) -> Batch:
        raise BadData("a shard is gone")

    made = itertools.chain([batch_of] * whole, itertools.repeat(fail))
    with monkeypatch.context() as patched:
        patched.setattr(batches, "batch_of", lambda *given: next(made)(*given))
        with pytest.raises(BadData, match="a shard is gone"):
            loop.train(settings, quiet=True)

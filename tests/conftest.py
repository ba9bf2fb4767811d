"""What all tests share: what is loaded or waited for once a process."""

import gc
import os
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest

gc.disable()  # until all is imported
os.environ.setdefault("NUMBA_CACHE_DIR", str(Path(__file__).parents[1] / "build" / "kernels"))  # compiled once

from xkd_pipeline.parsing import spacy_parser  # noqa: E402


@pytest.fixture(scope="session", autouse=True)
def one_spacy_pipeline() -> Iterator[None]:
    """Half a second for each parser that a test makes; parsers may share what they loaded (test_spacy_parser)."""
    load = spacy_parser.load_pipeline
    once = cache(load)

    def loaded(name: str, *, exclude: Sequence[str]) -> Any:
        return (once if name.startswith("en_core_web_sm") else load)(name, exclude=tuple(exclude))

    spacy_parser.load_pipeline = loaded  # not by monkeypatch: fixtures of the session need it too
    yield
    spacy_parser.load_pipeline = load


@pytest.fixture(scope="session", autouse=True)
def no_wait_for_the_disk() -> Iterator[None]:
    """Milliseconds for each file: what a power cut takes is what FaultyDisk was not told to sync."""
    fsync, os.fsync = os.fsync, os.fstat
    yield
    os.fsync = fsync


def pytest_collection_finish() -> None:
    """The garbage collector passes over what the libraries made when they were imported, and comes less often."""
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)
    gc.enable()

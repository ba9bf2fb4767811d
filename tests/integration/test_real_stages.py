"""Documents, teacher and align, killed and cut off from power at any moment; fault_table.py does it more often."""

import functools
import os
import random
from pathlib import Path

import pytest

import real_stages
from xkd_pipeline.parsing import spacy_parser

ROUNDS = int(os.environ.get("XKD_FAULT_ROUNDS", "12"))
SEED = int(os.environ.get("XKD_FAULT_SEED", "20261124"))


@pytest.fixture(autouse=True)
def warm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spacy_parser, "load_pipeline", functools.cache(spacy_parser.load_pipeline))


def test_killed_at_any_time_the_same_commands_finish_with_the_same_bytes(tmp_path: Path) -> None:
    found = real_stages.kills(tmp_path, ROUNDS // 2, random.Random(SEED))

    assert found["kills"] >= ROUNDS // 2
    assert {name: found[name] for name in ("lost", "differ", "hung", "failed")} == dict.fromkeys(
        ("lost", "differ", "hung", "failed"), 0
    )


def test_a_power_cut_loses_no_unit_that_was_told_to_be_done(tmp_path: Path) -> None:
    found = real_stages.cuts(tmp_path, ROUNDS // 3, random.Random(SEED))

    assert (found["lost"], found["differ"], found["failed"]) == (0, 0, 0)


def test_the_cut_finds_stages_that_do_not_sync(tmp_path: Path) -> None:
    assert real_stages.cuts(tmp_path, ROUNDS // 3, random.Random(SEED), synced=False)["lost"] > 0

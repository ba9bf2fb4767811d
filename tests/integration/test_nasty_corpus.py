"""Rows that break readers, through all stages: each is captured or rejected with a reason, and what is kept is right.

XKD_NASTY_ROWS sets how many rows; the full number is a row of fault_table.py.
"""

import os
from pathlib import Path

import nasty_run
from nasty_corpus import KINDS, SHAPES, lines

ROWS = int(os.environ.get("XKD_NASTY_ROWS", "600"))
SEED = int(os.environ.get("XKD_FAULT_SEED", "20261124"))


def test_every_nasty_row_is_captured_or_rejected_with_a_reason(tmp_path: Path) -> None:
    found = nasty_run.through(tmp_path, ROWS, SEED)

    assert found["rows"] >= ROWS - 4 * 2  # blank lines at the end of a file are none
    assert found["captured"] > ROWS // 4
    assert len([name for name in found if name.startswith("rejected as")]) >= 9
    assert found["checked"] > 1.5 * found["captured"]


def test_the_corpus_is_a_function_of_its_seed_and_has_every_kind_of_row() -> None:
    for shape in SHAPES.values():
        assert lines(len(KINDS) + 40, shape, 5) == lines(len(KINDS) + 40, shape, 5) != lines(len(KINDS) + 40, shape, 6)
        assert len(lines(len(KINDS) + 40, shape, 5)) == len(KINDS) + 40

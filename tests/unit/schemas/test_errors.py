"""Errors: one line, the exit code of DESIGN section 8, and unharmed on the way back from a worker."""

import pickle
from pathlib import Path

import pytest

from xkd_schemas.errors import XkdError

CODES = {
    "UsageError": 2, "BadData": 65, "InputMissing": 66, "WorkersGone": 69, "OutOfMemory": 71, "DiskFailed": 74,
    "Busy": 75, "NonFinite": 76, "Refused": 77, "Mismatch": 78, "Interrupted": 130, "Terminated": 143,
}  # fmt: skip
KINDS = XkdError.__subclasses__()


def test_every_error_has_the_exit_code_that_is_documented() -> None:
    assert {kind.__name__: kind.exit_code for kind in KINDS} == CODES
    readme = (Path(__file__).parents[3] / "README.md").read_text(encoding="utf-8")
    assert all(f" {code} " in readme for code in CODES.values())


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_survives_the_way_back_from_a_worker(kind: type[XkdError]) -> None:
    error = pickle.loads(pickle.dumps(kind("x is broken", kept="y", fix="z")))

    assert type(error) is kind
    assert (error.what, error.kept, error.fix, str(error)) == (
        "x is broken",
        "y",
        "z",
        "x is broken. Kept: y. Next: z",
    )


def test_an_error_is_one_line_whatever_it_quotes() -> None:
    assert str(XkdError("two\nlines.", fix="a\r\n\tb")) == "two lines. Next: a b"

"""Each benchmark runs once at its smallest size, and its rows are read the right way. Nothing here asserts a time."""

import json
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest

from benchmarks.__main__ import NAMES, main
from benchmarks.measure import Options, Row, Skipped, as_json, cost, in_subprocess, table
from benchmarks.teacher_sizes import markdown

SLOW = {
    "commands", "kl", "long_documents", "memory", "plan", "reader", "spacy", "start", "step",
    "streamed", "train",
}  # fmt: skip
"""Those that start programs of their own, or train."""


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in NAMES])
def test_a_benchmark_runs_and_every_row_is_a_figure_or_says_why_it_is_missing(name: str, tmp_path: Path) -> None:
    module = __import__(f"benchmarks.bench_{name}", fromlist=["run"])

    rows = module.run(Options(quick=True, demo=None, scratch=tmp_path, repeats=1))

    assert rows
    for row in rows:
        assert row.why if isinstance(row, Skipped) else row.ratio > 0, row


def test_the_page_of_teachers_has_the_table_that_is_printed() -> None:
    assert f"\n{markdown()}\n" in (Path(__file__).parents[2] / "docs" / "teachers.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", sorted(SLOW))
def test_a_slow_benchmark_can_still_be_imported(name: str) -> None:
    assert callable(__import__(f"benchmarks.bench_{name}", fromlist=["run"]).run)


@pytest.mark.parametrize(
    ("ratio", "bar", "at_least", "met"),
    [
        (1.25, 1.25, False, True), (1.3, 1.25, False, False), (6.0, 6.0, True, True), (5.9, 6.0, True, False),
        (9.0, None, False, None), (float("nan"), 1.0, False, False), (float("nan"), 1.0, True, False),
    ],
)  # fmt: skip
def test_a_bar_is_met_from_its_side_only(ratio: float, bar: float | None, at_least: bool, met: bool | None) -> None:
    row = Row(what="a / b", ratio=ratio, bar=bar, at_least=at_least, ours=1.0, theirs=1.0, unit="s")

    assert as_json("name", row)["met"] is row.met is met


def test_the_table_says_met_not_met_no_bar_and_why_a_row_is_missing() -> None:
    rows = [cost("a", 1.0, 1.0, bar=1.5), cost("b", 2.0, 1.0, bar=1.5), cost("c", 2.0, 1.0)]

    lines = table([*rows, Skipped(what="d", why="no such package")]).splitlines()

    assert "met      1e+03 / 1e+03 ms" in lines[0]
    assert "NOT MET" in lines[1]
    assert "printed, no bar" in lines[2]
    assert lines[3].endswith("skipped: no such package")


def test_a_failing_subprocess_is_an_error_that_shows_what_it_said() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)shutil copy nowhere.json here ended with 1.*No such file"):
        in_subprocess(shutil.copy, "nowhere.json", "here")
    assert in_subprocess(shutil.which, "no such program") is None


def test_a_missed_bar_is_code_0_and_a_crash_is_code_1_after_the_others_have_run(monkeypatch, capsys) -> None:
    missed, broken = ModuleType("benchmarks.bench_signals"), ModuleType("benchmarks.bench_kl")
    missed.run = lambda _options: [cost("slow", 9.0, 1.0, bar=1.5)]  # type: ignore[attr-defined]
    broken.run = lambda _options: 1 / 0  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "benchmarks.bench_signals", missed)
    monkeypatch.setitem(sys.modules, "benchmarks.bench_kl", broken)

    assert main(["signals", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["met"] is False
    assert main(["kl", "signals"]) == 1

    shown = capsys.readouterr()
    assert shown.out.count("NOT MET") == 1
    assert "ZeroDivisionError" in shown.err
    with pytest.raises(SystemExit, match="2"):
        main(["sgnals"])
    assert "'sgnals' is no benchmark; there are capture, alignment" in capsys.readouterr().err

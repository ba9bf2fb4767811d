"""The pages for contributors name files that are there, and the map says what each sub-package says itself."""

import ast
import re
import runpy
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "architecture.md").read_text()
PACKAGES = ("schemas/xkd_schemas", "trainer/xkd_trainer", "pipeline/xkd_pipeline")
FOLDERS = [str(p.parent.relative_to(ROOT)) for package in PACKAGES for p in (ROOT / package).glob("*/**/__init__.py")]
ROWS = {cells[0].strip("`"): cells[1:] for cells in re.findall(r"^\| (.*?) \| (.*) \| (.*) \| (.*) \|$", PAGE, re.M)}


@pytest.mark.parametrize(
    "page",
    ["CONTRIBUTING.md", "SECURITY.md", *(f"docs/{n}.md" for n in ("architecture", "api", "cluster", "reliability"))],
)
def test_every_file_that_a_page_names_is_there(page: str) -> None:
    text = (ROOT / page).read_text()
    roots = [(ROOT / page).parent, ROOT, *(ROOT / package for package in PACKAGES)]
    roots += [root / below for root in roots for below in ("..", "losses")]
    named = {*re.findall(r"`([\w./]+\.(?:py|toml))`", text), *re.findall(r"\]\(([^)#]+)\)", text)}

    assert len(named) > 2
    assert [name for name in sorted(named) if not any((root / name).exists() for root in roots)] == []


def test_no_module_opens_a_pickle_or_runs_text() -> None:
    calls = re.compile(r"import (?:pickle|joblib|dill|marshal)|\b(?:torch\.(?:load|save)|exec|(?<!\.)eval)\(")
    paths = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    found = {path.name: calls.findall(path.read_text()) for path in paths}

    assert {name: calls for name, calls in found.items() if calls} == {}


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_sub_package_says_the_three_lines_of_its_row(folder: str) -> None:
    said = ast.get_docstring(ast.parse((ROOT / folder / "__init__.py").read_text())) or ""
    purpose, imports, lost = (cell.replace("**", "") for cell in ROWS[folder])

    row = f"{purpose[0].upper()}{purpose[1:]}.\n\nMay import: {imports}.\nLost without it: {lost}."
    assert textwrap.dedent(said).split() == row.split()


def test_a_folder_above_its_budget_or_without_one_is_named() -> None:
    budget = runpy.run_path(str(ROOT / ".ci" / "lines.py"))

    assert budget["faults"]({"a": 3, "b": 1, "d": 2}, {"a": 2, "c": 5, "d": 2}) == [
        "a: 3 lines, budget 2", "b: no budget", "c: no such folder",
    ]  # fmt: skip
    assert budget["count_lines"](ROOT).keys() >= set(FOLDERS)

"""Count the lines of each sub-package and compare with [tool.xkd.lines] of pyproject.toml: `python .ci/lines.py`.

A budget may be raised with a note in docs/decisions/ that says what was tried to avoid it.
"""

import sys
import tomllib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("schemas/xkd_schemas", "trainer/xkd_trainer", "pipeline/xkd_pipeline")


def count_lines(root: Path) -> dict[str, int]:
    """Lines of the Python files of each folder, without those of the folders below."""
    found = Counter[str]()
    for path in (path for package in PACKAGES for path in (root / package).rglob("*.py")):
        found[path.parent.relative_to(root).as_posix()] += len(path.read_bytes().splitlines())
    return dict(sorted(found.items()))


def faults(counts: Mapping[str, int], budgets: Mapping[str, int]) -> list[str]:
    """One line for each folder that is above its budget or has none, and for each budget without a folder."""
    above = [name for name, lines in counts.items() if lines > budgets.get(name, lines)]
    found = [f"{name}: {counts[name]} lines, budget {budgets[name]}" for name in above]
    found += [f"{name}: no budget" for name in counts if name not in budgets]
    return found + [f"{name}: no such folder" for name in budgets if name not in counts]


def main() -> None:
    """Exit with 1 and one line for each fault."""
    counts = count_lines(ROOT)
    budgets = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["xkd"]["lines"]
    wrong = faults(counts, budgets)
    sys.stdout.write("\n".join(wrong or [f"{sum(counts.values())} lines, all within budget"]) + "\n")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()

"""Commands that need no model start without the libraries of models, which take seconds to import."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import small_cache

HEAVY = ("torch", "transformers")
PROGRAM = """
import json, sys
from {package} import main
sys.argv[1:] = {arguments!r}
try:
    main()
except SystemExit as leaving:
    code = leaving.code
print(json.dumps([code, [name for name in {heavy!r} if name in sys.modules]]), file=sys.stderr)
"""


def loaded(package: str, *arguments: object) -> tuple[int, list[str]]:
    """Exit code of a command line in a process of its own, and what it imported of HEAVY."""
    given = [str(argument) for argument in arguments]
    program = PROGRAM.format(package=package, arguments=given, heavy=HEAVY)
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    code, found = json.loads(ended.stderr.splitlines()[-1])
    return code, found


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["teacher", "--help"], ["status"], ["show"], ["verify"], ["verify", "deep"], ["gc"], ["report"],
     ["export"], ["train", "--help"]],
    ids=" ".join,
)  # fmt: skip
def test_commands_without_a_model_import_neither_torch_nor_transformers(arguments: list[str], tmp_path: Path) -> None:
    cache = small_cache.copied(tmp_path)
    further = {
        "show": [cache, 0], "verify": [cache], "status": [cache], "gc": [cache],
        "report": [cache, "--out", tmp_path / "report.html"], "export": [cache, "--parquet", tmp_path / "parquet"],
    }  # fmt: skip
    package, command = "xkd_pipeline.cli.app", arguments
    if arguments[0] == "train":
        package, command = "xkd_trainer.cli", arguments[1:]
    elif arguments == ["verify", "deep"]:
        command = ["verify", str(cache), "--level", "deep"]
    else:
        command = [*arguments, *map(str, further.get(arguments[0], []))]

    assert loaded(package, *command) == (0, [])

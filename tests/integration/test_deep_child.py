"""Shards with right digests that were made to break their reader: a finding on that unit, whatever it does."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

import small_cache
from damages import flipped, resigned
from xkd_pipeline.deep_child import Limits, guarded
from xkd_pipeline.verify import verify
from xkd_schemas.manifest import Manifest, read_record

ROUNDS = int(os.environ.get("XKD_FAULT_ROUNDS", "12"))
SEED = int(os.environ.get("XKD_FAULT_SEED", "20261124"))
TABLES = ("documents", "teachers/T", "students/S")


def shard(cache: Path, table: str, unit: int) -> Path:
    return cache / table / read_record(cache / table / "manifest.json", Manifest).commits[unit].file


def test_bits_flipped_by_someone_who_signs_them_end_no_check(tmp_path: Path) -> None:
    chance = random.Random(SEED)
    cache = small_cache.copied(tmp_path)
    found = 0
    for number in range(ROUNDS // 2):
        table, unit = TABLES[number % 3], chance.randrange(3)
        content = shard(cache, table, unit).read_bytes()
        changed = content
        for _ in range(4):
            changed = flipped(changed, chance.randrange(8 * len(content)))
        resigned(cache, table, unit, changed)
        bad = verify(cache, "deep")
        found += any(one.table == table and one.unit == unit for one in bad)
        assert {one.table for one in bad} <= {"", table, *TABLES[1:]}
        resigned(cache, table, unit, content)
    assert found


def test_a_unit_that_takes_too_long_or_too_much_memory_is_named_and_the_rest_is_checked() -> None:
    cache = small_cache.made() / "cache"

    slow = guarded(cache, TABLES[:1], Limits(seconds=0))
    assert [(one.unit, one.reason) for one in slow["documents"]] == [
        (unit, "reading it takes more than 0 seconds") for unit in range(3)
    ]

    large = guarded(cache, TABLES[:2], Limits(memory=-(64 << 20)))
    assert any("memory" in one.reason or "ends the process" in one.reason for one in large["documents"])
    assert guarded(cache, TABLES) == {name: [] for name in TABLES}


@pytest.mark.parametrize(("ends", "said"), [("os.kill(os.getpid(), 11)", "SIGSEGV"), ("os._exit(3)", "exit code 3")])
def test_a_check_that_dies_is_a_finding_on_its_unit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends: str, said: str
) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import builtins, os, sys\n"
        "def hook(name, *rest, real=builtins.__import__, **named):\n"
        "    module = real(name, *rest, **named)\n"
        "    if name == 'xkd_pipeline.deep' and hasattr(module, 'deep') and not hasattr(sys, 'hooked'):\n"
        "        sys.hooked, deep = True, sys.modules['xkd_pipeline.deep']\n"
        "        plain = deep.reasons_of\n"
        f"        deep.reasons_of = lambda root, table, unit: {ends} if unit == 1 else plain(root, table, unit)\n"
        "    return module\n"
        "builtins.__import__ = hook\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))

    found = guarded(small_cache.made() / "cache", TABLES)

    for name in TABLES:
        assert [(one.unit, one.reason) for one in found[name]] == [(1, f"reading it ends the process ({said})")]


def test_the_command_names_the_unit_and_exits_with_65(tmp_path: Path) -> None:
    cache = small_cache.copied(tmp_path)
    path = shard(cache, "documents", 0)
    content = path.read_bytes()
    at = content.index(b"It prints")
    resigned(cache, "documents", 0, content[:at] + b"\xff" + content[at + 1 :])
    command = [
        sys.executable,
        "-c",
        "from xkd_pipeline.cli import main; main()",
        "verify",
        str(cache),
        "--level",
        "deep",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)

    assert done.returncode == 65
    assert "documents/00000" in done.stdout + done.stderr
    assert "Traceback" not in done.stderr

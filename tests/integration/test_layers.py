"""The trainer needs neither the teacher nor the libraries that made the cache."""

import json
import os
import subprocess
import sys

import tiny_models as tiny

BLOCKED = ("ray", "spacy", "benepar", "datasets", "xkd_pipeline")

BLOCK = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ModuleNotFoundError("blocked: " + name, name=name)

sys.meta_path.insert(0, Blocker())
"""

IMPORT_ALL = """
import importlib, pkgutil
for package in ("xkd_schemas", "xkd_trainer"):
    for module in pkgutil.walk_packages(importlib.import_module(package).__path__, package + "."):
        importlib.import_module(module.name)
        print(module.name)
"""

EVALUATE = """
import json
from pathlib import Path
from xkd_trainer.evaluation import Request, evaluate_student
student, data, cache = map(Path, sys.argv[1:])
print(json.dumps(evaluate_student(Request(student=student, data=data, shards=cache, rouge=False))))
"""


def blocked_python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", BLOCK.format(blocked=BLOCKED) + code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=200)


def test_every_module_of_trainer_and_schemas_imports_without_the_pipeline_and_its_libraries() -> None:
    ended = blocked_python(IMPORT_ALL)

    assert ended.returncode == 0, ended.stderr
    imported = set(ended.stdout.split())
    assert {
        "xkd_trainer.training.loop",
        "xkd_trainer.losses.dwa",
        "xkd_schemas.corpus.sources",
        "xkd_trainer.evaluation",
    } <= imported


def test_a_student_is_evaluated_against_a_cache_without_the_pipeline() -> None:
    made = tiny.tiny_cache()

    ended = blocked_python(EVALUATE, made.student, made.corpus, made.cache)

    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout)
    assert found["documents"] == len(tiny.PAIRS)
    assert found["agreement_pairs"] > 0


def test_the_block_blocks() -> None:
    for name in BLOCKED:
        ended = blocked_python(f"import {name}")
        assert f"blocked: {name}" in ended.stderr

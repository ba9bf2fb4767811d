"""What is imported when: nothing with the packages, no models for most commands, no offline stack for the trainer."""

import json
import os
import subprocess
import sys
from pathlib import Path

import small_cache
import tiny_models as tiny
from forked import begun, wait_for
from seen_runs import seen_run

COMMANDS = """
import json, sys, xkd_schemas, xkd_pipeline, xkd_trainer
heavy = ("torch", "transformers")
light = {*heavy, "pyarrow", "numpy", "pydantic", "ray", "spacy"} & set(sys.modules)
from xkd_pipeline.cli.app import main as cache
from xkd_trainer.cli import main as train
found = [["import", 0, list(light)]]
for words in json.loads(sys.argv[1]):
    sys.argv = list(words)
    try:
        {"xkd-cache": cache, "xkd-train": train}[words[0]]()
    except SystemExit as leaving:
        found.append([words, leaving.code, [name for name in heavy if name in sys.modules]])
print(json.dumps(found), file=sys.stderr)
"""
BLOCKED = ("ray", "spacy", "benepar", "datasets", "xkd_pipeline")
BLOCK = """
import importlib, json, pkgutil, sys
from pathlib import Path

for package in ("xkd_schemas", "xkd_trainer"):
    for module in pkgutil.walk_packages(importlib.import_module(package).__path__, package + "."):
        importlib.import_module(module.name)
        print(module.name)
from xkd_trainer.evaluation import Request, evaluate_student
student, data, cache = map(Path, sys.argv[1:])
print(json.dumps(evaluate_student(Request(student=student, data=data, shards=cache, rouge=False))))
"""


def test_the_packages_import_no_library_and_commands_without_a_model_no_torch(tmp_path: Path) -> None:
    cache = str(small_cache.copied(tmp_path))
    commands = [
        ["xkd-cache", *words]
        for words in (
            ["--help"], ["teacher", "--help"], ["status", cache], ["show", cache, "0"], ["verify", cache],
            ["verify", cache, "--level", "deep"], ["gc", cache], ["report", cache, "--out", str(tmp_path / "r.html")],
            ["export", cache, "--parquet", str(tmp_path / "parquet")],
        )
    ]  # fmt: skip
    run = str(seen_run(tmp_path / "run"))
    page = ["report", run, "--out", str(tmp_path / "runs.html")]
    commands += [["xkd-train", *words] for words in (["--help"], ["watch", run], page)]

    program = [sys.executable, "-c", COMMANDS, json.dumps(commands)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    ended = subprocess.run(program, capture_output=True, text=True, env=environment, check=False, timeout=200)

    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stderr.splitlines()[-1])
    assert found == [["import", 0, []], *([words, 0, []] for words in commands)]


def test_trainer_and_schemas_import_and_evaluate_without_the_pipeline_and_its_libraries(tmp_path: Path) -> None:
    made = tiny.tiny_cache()

    program = begun(BLOCK, tmp_path, made.student, made.corpus, made.cache, without=BLOCKED)
    (ended,) = wait_for([program], [tmp_path])

    assert ended.code == 0, ended.err
    said = ended.out.splitlines()
    assert {
        "xkd_trainer.training.loop", "xkd_trainer.losses.dwa", "xkd_schemas.corpus.sources", "xkd_trainer.evaluation",
    } <= set(said)  # fmt: skip
    scores = json.loads(said[-1])
    assert scores["documents"] == len(tiny.PAIRS)
    assert scores["agreement_pairs"] > 0

"""A whole cache that was damaged, half made or interrupted becomes the cache of an undisturbed run, byte for byte."""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import small_cache
from small_cache import IN_PROCESS, files_of, run_file
from xkd_pipeline.stages import align_stage, documents_stage, teacher_stage
from xkd_schemas.config import RunConfig


def source_run(root: Path) -> RunConfig:
    source = small_cache.made()
    return run_file(
        root,
        documents={"corpus": [str(source / "corpus.jsonl")]},
        teacher={"model": str(source / "teacher")},
        student={"tokenizer": str(source / "student")},
    )


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "shards": lambda c: [flip(next(c.glob(f"{t}/00001-*.arrow"))) for t in ("documents", "teachers/T", "students/S")],
    "manifests": lambda c: [path.write_bytes(b"") for path in c.rglob("manifest.json")],
    "head": lambda c: flip(c / "teachers/T/head.safetensors"),
    "embeddings": lambda c: (c / "teachers/T/embeddings.safetensors").unlink(),
    "student tokenizer": lambda c: (c / "students/S/tokenizer/tokenizer.json").write_text("{}"),
    "sums and card": lambda c: [(c / name).unlink() for name in ("SHA256SUMS", "README.md")],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_running_the_commands_again_mends_a_damaged_cache(tmp_path: Path, damage: str) -> None:
    cache = small_cache.copied(tmp_path)
    before = files_of(cache)
    DAMAGES[damage](cache)
    assert files_of(cache) != before

    for stage in (documents_stage, teacher_stage, align_stage):
        stage(source_run(cache), IN_PROCESS)

    assert files_of(cache) == before


def test_a_cache_that_is_whole_is_not_written_to(tmp_path: Path) -> None:
    cache = small_cache.copied(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in cache.rglob("*") if path.name != "LOCK"}

    made = [
        stage(source_run(cache), IN_PROCESS).values["made"] for stage in (documents_stage, teacher_stage, align_stage)
    ]

    assert made == [0, 0, 0]
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*") if path.name != "LOCK"} == before


UNITS = 60


def many_units(tmp_path: Path) -> Path:
    """A cache with documents only, in units of one row."""
    corpus = small_cache.write_rows(tmp_path / "rows.jsonl", small_cache.corpus_rows(UNITS))
    documents_stage(run_file(tmp_path / "cache", documents={"corpus": [str(corpus)], "rows_per_shard": 1}), IN_PROCESS)
    return tmp_path / "cache"


def teacher_command(cache: Path) -> list[str]:
    program = "from xkd_pipeline.cli.app import main; main()"
    model = str(small_cache.made() / "teacher")
    options = ["--name", "T", "--dtype", "float32", "--template", "chat", "--for", "mta,sra,dwa"]
    return [sys.executable, "-c", program, "teacher", str(cache), "--model", model, *options]


def test_a_killed_teacher_loses_no_finished_shard_and_the_same_command_finishes_it(tmp_path: Path) -> None:
    cache = many_units(tmp_path)
    undisturbed = Path(shutil.copytree(cache, tmp_path / "undisturbed"))
    commits = cache / "teachers/T/commits"
    process = subprocess.Popen(teacher_command(cache), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while len(list(commits.glob("0*.json"))) < 3 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    _, err = process.communicate(timeout=60)
    kept = len(list(commits.glob("0*.json")))
    assert process.returncode == -signal.SIGKILL, err
    assert 3 <= kept < UNITS

    finished, _ = (
        subprocess.run([*teacher_command(root), "--json"], capture_output=True, text=True, check=True)
        for root in (cache, undisturbed)
    )

    values = json.loads(finished.stdout)
    assert (values["made"], values["reused"]) == (UNITS - kept, kept)
    assert files_of(cache) == files_of(undisturbed)

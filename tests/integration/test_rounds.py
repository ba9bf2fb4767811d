"""Two rounds without a live teacher, as docs/rounds.md types them, on tiny models."""

import re
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from typer.testing import CliRunner

import faulty_disk
import tiny_models as tiny
from small_cache import SPACY, files_of
from xkd_pipeline.cli.app import app
from xkd_schemas.config import RunConfig
from xkd_schemas.errors import DiskFailed, UsageError
from xkd_train import xkd_train
from xkd_trainer.data.collate import batch_of
from xkd_trainer.training.prepare import set_up

PAGE = (Path(__file__).parents[2] / "docs" / "rounds.md").read_text()
COMMANDS = [shlex.split(line, comments=True) for line in re.findall(r"^    (xkd-(?:cache|train) .*)$", PAGE, re.M)]
SMALL = {
    "documents": ["--spacy-model", SPACY, "--rows-per-shard", "10"], "teacher": ["--dtype", "fp32"],
    "sample": ["--max-new-tokens", "8", "--keep-cut", "--dtype", "fp32"],
    "--shards": ["--steps", "6", "--batch-size", "6", "--save-every", "1", "--log-every", "1"],
}  # fmt: skip
"""Flags without which tiny random models would take long, or say nothing that is kept."""


def run(command: Sequence[str]) -> int:
    """How a command of the page ends."""
    words = [*command[1:], *SMALL.get(command[1], [])]
    if command[0] == "xkd-train":
        return xkd_train(*words).code
    error = CliRunner().invoke(app, words).exception
    return error.exit_code if isinstance(error, DiskFailed) else int(error is not None)


def files() -> dict[str, bytes]:
    """What round 1 left in this folder."""
    names = ("said1.jsonl", "said1.json", "student1/model.safetensors", "student1/metrics.jsonl")
    return files_of(Path("round1")) | {name: Path(name).read_bytes() for name in names}


@pytest.fixture(scope="module")
def rounds(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[int]]:
    """A folder in which both rounds were run, and the operations on the disk that each command of round 1 made."""
    root, small = tmp_path_factory.mktemp("rounds"), tiny.tiny_cache()
    for name, path in (("TEACHER", small.teacher), ("STUDENT", small.student), ("train.jsonl", small.corpus)):
        (root / name).symlink_to(path)
    points = []
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        for command in COMMANDS[:9]:
            with faulty_disk.injected("*:0:count") as disk:
                assert run(command) == 0, command
            points.append(len(disk.points))
    return root, points[4:]


def test_in_the_second_round_cross_entropy_skips_what_the_student_wrote_and_the_teachers_loss_does_not(
    rounds: tuple[Path, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(rounds[0])
    settings = RunConfig(
        train={"shards": ["round0", "round1"], "loss": "sra"}, student={"model": "student0"},
        losses={"ce": {"skip": "student"}},
    )  # fmt: skip
    ready = set_up(settings, "")
    with pytest.raises(UsageError, match=r"losses\.ce\.skip is studnet, and no row of round0, round1 has that policy"):
        set_up(settings.model_copy(update={"losses": {"ce": {"skip": "studnet"}}}), "")
    rows = [0, 1, *ready.cache.usable[-2:].tolist()]
    batch, own = (batch_of(ready.cache, some, ready.wanted) for some in (rows, rows[:2]))

    counts, alone = ready.distiller.counts(batch), ready.distiller.counts(own)

    assert batch.policies == ("", "", "student", "student")
    assert float(counts["ce.ce"]) == float(alone["ce.ce"]) == float(own.num_predictions)
    assert float(batch.num_predictions) > float(own.num_predictions)
    assert float(counts["sra.cos"]) > float(alone["sra.cos"])


def test_a_second_round_that_is_stopped_in_each_of_its_commands_ends_with_the_same_bytes(
    rounds: tuple[Path, list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("TEACHER", "STUDENT", "train.jsonl"):
        (tmp_path / name).symlink_to((rounds[0] / name).readlink())
    for name in ("round0", "student0"):
        shutil.copytree(rounds[0] / name, tmp_path / name)
    monkeypatch.chdir(rounds[0])
    undisturbed = files()
    monkeypatch.chdir(tmp_path)
    for command, points in zip(COMMANDS[4:9], rounds[1], strict=True):
        with faulty_disk.injected(f"*:{points * 2 // 3}:EIO"):
            assert run(command) == DiskFailed.exit_code, command
        assert run(command) == 0, command

    assert files() == undisturbed


def test_the_command_for_a_corpus_of_the_teacher_writes_one(
    rounds: tuple[Path, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(rounds[0])
    rows = Path("said1.jsonl").read_bytes().splitlines(keepends=True)
    Path("prompts.jsonl").write_bytes(b"".join(rows[:3]))

    assert run([*COMMANDS[9], *SMALL["sample"]]) == 0
    assert len(Path("answers.jsonl").read_text().splitlines()) > 4

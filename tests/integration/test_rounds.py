"""Two rounds without a live teacher: the student answers, the teacher reads it, the student learns from both caches."""

from pathlib import Path

import pytest

import faulty_disk
import tiny_models as tiny
import tiny_run
from small_cache import IN_PROCESS, files_of
from xkd_pipeline.stages import align_stage, documents_stage, teacher_stage
from xkd_schemas.config import RunConfig
from xkd_schemas.errors import DiskFailed
from xkd_train import xkd_train
from xkd_trainer.data.collate import batch_of
from xkd_trainer.training.loop import train
from xkd_trainer.training.prepare import set_up


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The student of round 0."""
    out = tmp_path_factory.mktemp("round0") / "out"
    train(tiny_run.run(out, loss="sra", save_dtype="float32"), quiet=True)
    return out


class Round:
    """Round 1 in a folder, each step as its command runs it."""

    def __init__(self, root: Path, student: Path) -> None:
        self.root, self.student = root, student
        self.answers, self.cache, self.out = root / "answers.jsonl", root / "cache", root / "out"

    def sample(self) -> int:
        how = ("--max-new-tokens", 8, "--batch-size", 8, "--keep-cut", "--dtype", "fp32")
        return xkd_train("sample", self.student, "--data", tiny.tiny_cache().corpus, "--out", self.answers, *how).code

    def capture(self) -> None:
        run = tiny_run.run(self.out, cache=str(self.cache), documents__corpus=[str(self.answers)])
        for stage in (documents_stage, teacher_stage, align_stage):
            stage(run, IN_PROCESS)

    def settings(self) -> RunConfig:
        return tiny_run.run(
            self.out, loss="sra", steps=6, save_every=1, student__model=str(self.student),
            shards=(str(tiny.tiny_cache().cache), str(self.cache)), losses={"ce": {"skip": "student"}},
        )  # fmt: skip

    def files(self) -> dict[str, bytes]:
        found = {
            "answers.jsonl": self.answers.read_bytes(),
            "answers.json": self.answers.with_suffix(".json").read_bytes(),
        }
        found |= files_of(self.cache)
        return found | {name: (self.out / name).read_bytes() for name in ("model.safetensors", "metrics.jsonl")}


@pytest.fixture(scope="module")
def second(tmp_path_factory: pytest.TempPathFactory, first: Path) -> Round:
    done = Round(tmp_path_factory.mktemp("round1"), first)
    assert done.sample() == 0
    done.capture()
    train(done.settings(), quiet=True)
    return done


def test_in_the_second_round_cross_entropy_skips_what_the_student_wrote_and_the_teachers_loss_does_not(
    second: Round,
) -> None:
    ready = set_up(second.settings(), "")
    rows = [0, 1, *ready.cache.usable[-2:].tolist()]
    batch, own = (batch_of(ready.cache, some, ready.wanted) for some in (rows, rows[:2]))

    counts, alone = ready.distiller.counts(batch), ready.distiller.counts(own)

    assert batch.policies == ("", "", "student", "student")
    assert float(counts["ce.ce"]) == float(alone["ce.ce"]) == float(own.num_predictions)
    assert float(batch.num_predictions) > float(own.num_predictions)
    assert float(counts["sra.cos"]) > float(alone["sra.cos"])


def test_a_second_round_that_is_stopped_in_each_of_its_steps_ends_with_the_same_bytes(
    first: Path, second: Round, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    again = Round(tmp_path, first)
    with faulty_disk.injected("*:16:EIO"):
        assert again.sample() == DiskFailed.exit_code
    assert list((tmp_path / "answers.jsonl.units").glob("0*.jsonl"))
    assert again.sample() == 0
    with faulty_disk.injected("*:60:EIO"), pytest.raises(DiskFailed):
        again.capture()
    again.capture()
    tiny_run.stopped(again.settings(), monkeypatch, batches=4)

    resumed = train(again.settings(), quiet=True)

    assert 0 < resumed.resumed_at < 6
    assert again.files() == second.files()

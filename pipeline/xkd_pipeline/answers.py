"""Answers to prompts, made on the workers that make shards; `xkd_trainer.answers` says what is written where."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xkd_pipeline.workers.contract import Make, Workers, local_paths
from xkd_pipeline.workers.scheduler import make_shards
from xkd_schemas.cache.manifest import Commit, MadeDifferently
from xkd_schemas.config import RunConfig
from xkd_schemas.durable_files import sha256_of
from xkd_schemas.progress import tick
from xkd_trainer.answers import Answering, Prompts, write_answers
from xkd_trainer.models.compute_dtype import this_device


@dataclass(frozen=True, kw_only=True, slots=True)
class AnswersStage:
    """Answers the prompts of one unit."""

    answering: Answering

    def load(self) -> Make:
        """Load the model once."""
        make = self.answering.load()

        def commit(job: Prompts, care: MadeDifferently) -> Commit:
            if care:  # another batch, or other rows in it, would give other answers
                raise self.answering.out_of_memory(job.unit)
            path = make(job)
            return Commit(
                unit=job.unit, file=path.name, rows=len(job.rows), size=path.stat().st_size, sha256=sha256_of(path),
                frame_xxh3="", batches=(),
            )  # fmt: skip

        return commit

    def rows(self, _job: Prompts) -> int:
        """None: no row of a unit is tried without the others."""
        return 0

    def batch(self, _job: Prompts) -> int:
        """Answers at once."""
        return self.answering.how.batch_size

    def paths(self) -> tuple[Path, ...]:
        """The folder of the units, and the model."""
        return local_paths(self.answering.folder, self.answering.model)


def generate(run: RunConfig, prompts: str, out: Path, workers: Workers) -> dict[str, Any]:
    """`write_answers` on workers; they change no byte."""

    def make(answering: Answering, jobs: Iterable[Prompts]) -> None:
        make_shards(AnswersStage(answering=answering), jobs, workers, lambda commit: tick(commit.rows))

    return write_answers(run, prompts, out, make, "cuda" if workers.gpus else this_device())

"""Every loss of the registry: captured for, aligned for two tokenizers, and trained with for a few steps."""

import json
import math
import shutil
from pathlib import Path

import pytest

import small_cache
from forked import begun, wait_for
from xkd_pipeline.stages import align_stage, teacher_stage
from xkd_schemas.config import RunConfig
from xkd_schemas.errors import UsageError
from xkd_trainer.losses.registry import LOSSES, loss_named
from xkd_trainer.training.loop import train

ROOT = Path(__file__).parents[2]
OTHER, SAME = "S-all", "T-all"
"""Student tables: another tokenizer than the teacher's, and the teacher's own."""


FOR_PRETRAINED = ("dskd_v2",)
"""Its projection is solved from the student's head; a new head moves away from it, and the sum may rise at first."""
WHERE_BOTH_AGREE = ("dskd_v2.student_space",)
"""Counts predictions whose projected argmax is the label: with random models a handful, with some sums none."""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small cache with a teacher table that holds what all losses need."""
    folder = small_cache.copied(tmp_path_factory.mktemp("all"))
    for name, model, template in ((OTHER, "student", "none"), (SAME, "teacher", "chat")):
        student = {"tokenizer": str(small_cache.made() / model), "name": name, "template": template}
        run = small_cache.whole_run(folder, teacher={"name": "all", "losses": list(LOSSES)}, student=student)
        for stage in (teacher_stage, align_stage):
            stage(run, small_cache.IN_PROCESS)
    return folder


def run_of(cache: Path, table: str, loss: str, out: Path, *, steps: int = 6) -> RunConfig:
    tokenizer = small_cache.made() / ("student" if table == OTHER else "teacher")
    return small_cache.run_file(
        cache,
        student={"model": "new:llama,layers=4,width=32", "tokenizer": str(tokenizer)},
        train={
            "loss": loss if loss.startswith("ce") else f"ce=0+{loss}", "steps": steps, "batch_size": 12,
            "out": str(out), "lr": 1e-3, "projector_lr": 1e-3, "log_every": 1,
        },
    )  # fmt: skip


@pytest.mark.parametrize("loss", list(LOSSES))
def test_a_loss_falls_from_the_cache(loss: str, cache: Path, tmp_path: Path) -> None:
    if loss_named(loss).one_tokenizer:
        with pytest.raises(UsageError, match="tokenizer"):
            train(run_of(cache, OTHER, loss, tmp_path), student_table=OTHER, quiet=True)
        table = SAME
    else:
        table = OTHER
    train(run_of(cache, table, loss, tmp_path), student_table=table, quiet=True)

    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    terms = [name for name in lines[0] if name.startswith(f"{loss}.") and not name.endswith(".count")]
    assert terms
    for line in lines:
        assert all(math.isfinite(line[name]) for name in terms)
        assert all(line[f"{name}.count"] > 0 for name in terms if name not in WHERE_BOTH_AGREE)
    assert lines[-1]["loss"] != lines[0]["loss"]
    assert loss in FOR_PRETRAINED or lines[-1]["loss"] < lines[0]["loss"]


ONE_STEP = """
import json, sys
import xkd_trainer
from xkd_schemas import RunConfig
trained = xkd_trainer.train(RunConfig.load(None, **json.loads(sys.argv[1])), student_table=sys.argv[2], quiet=True)
print(json.dumps([xkd_trainer.__file__, "numba" in sys.modules, trained.terms]))
"""


def test_every_loss_trains_without_the_folder_of_compiled_kernels(cache: Path, tmp_path: Path) -> None:
    for package in ("schemas/xkd_schemas", "trainer/xkd_trainer"):
        copy = tmp_path / Path(package).name
        shutil.copytree(ROOT / package, copy, ignore=shutil.ignore_patterns("__pycache__", "cpu_kernels"))
    run = run_of(cache, SAME, "ce", tmp_path / "out", steps=1).model_dump(exclude_unset=True)
    run["train"] |= {"loss": "+".join(f"{name}=1" for name in LOSSES), "batch_size": 4}

    program = begun(ONE_STEP, tmp_path / "said", json.dumps(run), SAME, path=tmp_path)
    (ended,) = wait_for([program], [tmp_path / "said"])

    assert ended.code == 0, ended.err
    trainer, compiled, terms = json.loads(ended.out.splitlines()[-1])
    assert Path(trainer).is_relative_to(tmp_path)
    assert not compiled
    assert set(LOSSES) <= {name.partition(".")[0] for name in terms}
    assert all(math.isfinite(value) for value in terms.values())

"""Several teachers of the same documents: each has its losses, every row is there once, and so is cross-entropy."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny_models as tiny
from one_step import gradients
from xkd_pipeline.stages import align_stage, teacher_stage
from xkd_pipeline.workers.contract import Workers
from xkd_schemas.errors import BadData, Mismatch, UsageError
from xkd_schemas.tokens import OK
from xkd_train import xkd_train
from xkd_trainer import CacheDataset, Collator
from xkd_trainer.data.batch import Batch, blank
from xkd_trainer.data.cache import Cache
from xkd_trainer.data.collate import batch_of
from xkd_trainer.training.held_out import Agreement
from xkd_trainer.training.loop import train
from xkd_trainer.training.prepare import Ready, set_up

ROWS = (7, 13, 19, 21)  # short ones
LOSSES = "mta+sra+alm"
PLENTY = 1e9  # a gradient that no norm cuts


@dataclass(frozen=True)
class Two:
    """A cache with two teachers, how `--shards` names each, and the documents that the second one reads in part."""

    first: str
    second: str
    cut: set[int]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Two:
    """The second teacher has another tokenizer, depth and width, and stops at 46 tokens."""
    small, root = tiny.tiny_cache(), tmp_path_factory.mktemp("two")
    shutil.copytree(small.cache, root / "cache")
    model = tiny.llama("unigram", seed=9, layers=2, width=24, tied=False)
    run = small.run(
        cache=str(root / "cache"), teacher__model=str(tiny.saved(model, "unigram", root / "other")),
        teacher__name="Other-1.5B", teacher__max_tokens=46, teacher__losses=["mta", "sra", "alm"],
        student__name="beside",
    )  # fmt: skip
    teacher_stage(run, Workers(count=0))
    align_stage(run, Workers(count=0))
    ours, theirs = (Cache(root / "cache", student=name).students for name in ("student", "beside"))
    cut = {row for row in range(len(ours)) if len(ours[row]["token_ids"]) != len(theirs[row]["token_ids"])}
    assert 0 < len(cut) < 12
    assert not cut & set(ROWS)
    assert all(theirs[row]["status"] == OK for row in ROWS)
    return Two(f"{root}/cache:student", f"{root}/cache:beside", cut)


def ready(shards: list[str], loss: str = LOSSES, **changed: Any) -> tuple[Ready, Batch]:
    made = set_up(tiny.tiny_cache().run(shards=shards, loss=loss, **changed), "")
    return made, batch_of(made.cache, ROWS, made.wanted)


def step(shards: list[str], loss: str = LOSSES) -> tuple[float, dict[str, Tensor]]:
    made, batch = ready(shards, loss)
    return gradients(made.distiller, [batch], made.distiller.step_counts([batch]))


def of_student(slopes: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: slope for name, slope in slopes.items() if name.startswith("student.")}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, slope in expected.items():
        scale = max(1e-3, float(slope.abs().max()))
        torch.testing.assert_close(found[name] / scale, slope / scale, rtol=1e-4, atol=1e-5, msg=name)


def test_one_teacher_twice_at_half_the_weight_has_the_loss_and_gradient_of_one(
    two: Two, capsys: pytest.CaptureFixture[str]
) -> None:
    once, slopes = step([two.first], LOSSES + "+dwa")
    twice, both = step([f"{two.first}=0.5", f"{two.first}=0.5"], LOSSES + "+dwa")

    assert "two of the caches are of one teacher" in capsys.readouterr().err
    assert twice == pytest.approx(once, rel=1e-5)
    assert_close(of_student(both), of_student(slopes))
    learnt = [name for name in slopes if name.startswith("losses.")]
    assert learnt
    for name in learnt:
        _, loss, rest = name.split(".", 2)
        for label in ("teacher", "teacher#2"):
            torch.testing.assert_close(2 * both[f"losses.{loss}@{label}.{rest}"], slopes[name], rtol=1e-4, atol=1e-6)


def test_one_teacher_twice_at_half_the_weight_trains_the_same_student(two: Two, tmp_path: Path) -> None:
    weights = []
    for shards in ([two.first], [f"{two.first}=0.5"] * 2):
        out = tmp_path / str(len(shards))
        train(
            tiny.tiny_cache().run(shards=shards, loss="mta+sra", steps=2, out=str(out), max_grad_norm=PLENTY),
            quiet=True,
        )
        weights.append(tiny.llama(tiny.STUDENT_TOKENIZER).from_pretrained(out).state_dict())

    for name, values in weights[0].items():
        torch.testing.assert_close(weights[1][name], values, rtol=1e-4, atol=2e-5, msg=name)


def test_two_teachers_add_up_by_weight_and_cross_entropy_is_there_once(two: Two) -> None:
    (ce, of_ce), (first, ours), (second, theirs) = (
        step([shards], loss)
        for shards, loss in ((two.first, "ce"), (two.first, "ce=0+" + LOSSES), (two.second, "ce=0+" + LOSSES))
    )

    total, slopes = step([f"{two.first}=2", f"{two.second}=0.5"], "ce=1+" + LOSSES)

    assert total == pytest.approx(ce + 2 * first + 0.5 * second, rel=1e-5)
    summed = {name: of_ce[name] + 2 * ours[name] + 0.5 * theirs[name] for name in of_student(of_ce)}
    assert_close(of_student(slopes), summed)


def test_each_row_is_there_once_and_what_a_teacher_read_less_of_is_left_out_and_counted(
    two: Two, capsys: pytest.CaptureFixture[str]
) -> None:
    made, batch = ready([two.first, two.second])

    assert set(made.cache.usable.tolist()) == set(range(24)) - two.cut
    assert made.cache.rows(0, 7).tolist() == made.cache.usable.tolist()
    assert f"{len(two.cut)} documents are left out" in capsys.readouterr().err
    (other,) = batch.others
    assert torch.equal(batch.student_ids_BS, other.student_ids_BS)
    assert other.rows == batch.rows
    assert {level.layer for level in batch.levels} != {level.layer for level in other.levels}
    counts = made.distiller.counts(blank(batch))
    assert len(counts) > 10
    assert not any(counts.values())
    with pytest.raises(BadData, match="other student tokens"):
        batch_of(made.cache, [min(two.cut)], made.wanted)


def test_a_run_of_two_teachers_names_both_resumes_and_is_planned_reported_and_watched(
    two: Two, tmp_path: Path
) -> None:
    small, out = tiny.tiny_cache(), tmp_path / "out"
    words = ["--shards", two.first, "--shards", f"{two.second}=0.5", "--student", small.student, "--loss", "mta"]
    words += ["--steps", 2, "--batch-size", 4, "--log-every", 1, "--save-every", 1]

    planned = xkd_train("plan", *words[:8], "--json")
    ended = xkd_train(*words, "--out", out)
    shutil.copytree(out / "checkpoints", tmp_path / "again" / "checkpoints")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "step-00000002")
    again = xkd_train(*words, "--out", tmp_path / "again")

    assert planned.code == ended.code == again.code == 0, (planned, ended, again)
    assert "(resumed at step 1)" in again.out
    assert (out / "metrics.jsonl").read_bytes() == (tmp_path / "again" / "metrics.jsonl").read_bytes()
    terms = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    assert {"ce.ce", "mta@teacher.dsa@2:word", "mta@Other-1_5B.dsa@1:word"} <= set(terms)
    run = json.loads((out / "xkd.json").read_text())["run"]
    assert [weight for _, weight in run["cache"]["teachers"]] == [1.0, 0.5]
    assert run["weights"]["mta@Other-1_5B.dsa@1:word"] == 0.5 * run["weights"]["mta@teacher.dsa@2:word"]
    assert "teachers/Other-1.5B" in (out / "README.md").read_text()
    alone = json.loads(xkd_train("plan", "--shards", two.first, *words[4:8], "--json").out)
    assert json.loads(planned.out)["projectors"] > alone["projectors"]
    assert xkd_train("report", out, "--out", tmp_path / "page.html").code == 0
    assert "mta@Other-1_5B.dsa@1:word" in (tmp_path / "page.html").read_text()
    assert "mta@Other-1_5B.dsa@1:word" in xkd_train("watch", out).out
    other_weight = xkd_train(*words[:3], two.second, *words[4:], "--out", out)
    assert other_weight.code == 78


def test_other_documents_beside_the_same_ones_are_refused(two: Two, tmp_path: Path) -> None:
    few = tiny.made(tmp_path / "few", pairs=tiny.PAIRS[:4])

    with pytest.raises(UsageError, match=r"few/cache has other documents than .*two of the caches have the same"):
        ready([two.first, two.second, str(few.cache)])


def test_what_one_teacher_lacks_is_refused_with_its_table(two: Two) -> None:
    with pytest.raises(UsageError, match=r"loss dwa needs entropy, which .*teachers/Other-1\.5B does not hold"):
        ready([two.first, two.second], "dwa")


def test_a_student_that_reads_another_template_there_is_refused_by_field(two: Two) -> None:
    root = Path(two.first.rpartition(":")[0])
    run = tiny.tiny_cache().run(
        cache=str(root), teacher__name="Other-1.5B", student__name="framed", student__template="alpaca"
    )
    align_stage(run, Workers(count=0))

    with pytest.raises(Mismatch, match=r"student\.template: cache has alpaca, this run has none"):
        ready([two.first, f"{root}:framed"])


def test_agreement_is_with_the_teacher_of_the_table_that_is_named(two: Two) -> None:
    tokenizer = tiny.tokenizer_of(tiny.STUDENT_TOKENIZER)

    for shards, name in ((two.first, "teacher"), (two.second, "Other-1.5B")):
        assert Agreement(tokenizer, Path(shards), set())._cache.teacher_name == name
    with pytest.raises(UsageError, match=r"all fit this student.*/cache:NAME"):
        Agreement(tokenizer, Path(two.first.partition(":")[0]), set())


def test_other_peoples_training_gets_both_teachers(two: Two) -> None:
    shards = [two.first, f"{two.second}=0.5"]
    dataset = CacheDataset(shards, str(tiny.tiny_cache().student), "ce=1+mta", seed=0)
    places = [dataset.cache.usable.tolist().index(row) for row in ROWS]

    batch = Collator()([dataset[place] for place in places])

    made, expected = ready(shards, "ce=1+mta")
    total, terms = dataset.distiller(made.distiller.student)(batch)
    assert float(total.detach()) == pytest.approx(float(made.distiller(expected)[0].detach()), rel=1e-6)
    assert "mta@Other-1_5B.dsa@1:word" in terms

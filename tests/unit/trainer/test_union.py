"""Several caches read as one: of one teacher and other documents, or of the same documents and other teachers."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import tiny_models as tiny
from one_step import assert_same_step, gradients
from tiny_models import PAIRS, TEACHER_TOKENIZER, Tiny
from xkd_pipeline.stages import align_stage, teacher_stage
from xkd_pipeline.workers.contract import Workers
from xkd_schemas.errors import BadData, Mismatch, UsageError
from xkd_schemas.signals import signal_named
from xkd_schemas.tokens import OK
from xkd_train import xkd_train
from xkd_trainer import CacheDataset, Collator
from xkd_trainer.data.batch import Batch, blank
from xkd_trainer.data.cache import Cache
from xkd_trainer.data.collate import batch_of
from xkd_trainer.data.several_caches import CacheUnion, parse_shards
from xkd_trainer.training.held_out import Agreement
from xkd_trainer.training.loop import train
from xkd_trainer.training.prepare import Ready, set_up

WANTED = frozenset(map(signal_named, ("hidden_last", "span_mass@2:word", "span_geometry@2:word", "entropy")))


@dataclass(frozen=True)
class Halves:
    """The tiny corpus cut in two caches, and a third one of another teacher."""

    first: Tiny
    second: Tiny
    other: Tiny


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> Halves:
    root = tmp_path_factory.mktemp("halves")
    other = tiny.llama(TEACHER_TOKENIZER, seed=9, layers=4, width=32, tied=False)
    return Halves(
        first=tiny.made(root / "first", pairs=PAIRS[:10]),
        second=tiny.made(root / "second", pairs=PAIRS[10:]),
        other=tiny.made(root / "other", pairs=PAIRS[10:12], teacher=other),
    )


@pytest.fixture(scope="module")
def both(halves: Halves) -> CacheUnion:
    return CacheUnion([Cache(t.cache, student="student") for t in (halves.first, halves.second)], [1.0, 1.0])


def test_a_row_of_the_union_is_the_row_of_its_cache(halves: Halves, both: CacheUnion) -> None:
    second = Cache(halves.second.cache, student="student")

    of_union, alone = batch_of(both, [10, 13], WANTED), batch_of(second, [0, 3], WANTED)

    assert of_union.rows == (10, 13)
    for name in ("student_ids_BS", "teacher_hidden_BRD", "span_student_BK2", "teacher_entropy_BM"):
        assert torch.equal(getattr(of_union, name), getattr(alone, name)), name
    assert torch.equal(of_union.levels[0].cosines_BUU, alone.levels[0].cosines_BUU)  # type: ignore[arg-type]


def test_the_union_has_the_rows_of_one_cache_of_all_documents(both: CacheUnion) -> None:
    whole = Cache(tiny.tiny_cache().cache, student="student")

    texts = [both.at(int(row))[0].documents[both.at(int(row))[1]]["text"] for row in both.usable]

    assert texts == [whole.documents[int(row)]["text"] for row in whole.usable]
    for most in (2, 99):
        for one, other in zip(both.rows_of_student(most), whole.rows_of_student(most), strict=True):
            assert all(
                np.array_equal(getattr(one, name), getattr(other, name)) for name in ("ids", "kinds", "targets")
            )
    ends = [tokens.ids.tolist() for tokens in both.rows_of_student(2)]
    assert ends == [whole.students[int(row)]["token_ids"].tolist() for row in whole.usable[[0, -1]]]


@pytest.mark.parametrize("weights", [(1, 2), (2, 1), (0.5, 1)])
def test_a_weight_says_how_often_a_document_is_seen_in_an_epoch(halves: Halves, weights: tuple[float, float]) -> None:
    caches = [Cache(t.cache, student="student") for t in (halves.first, halves.second)]
    union = CacheUnion(caches, weights)

    rows, again, next_epoch = union.rows(0, 7), union.rows(0, 7), union.rows(1, 7)

    assert len(rows) == sum(round(w * len(c.usable)) for w, c in zip(weights, caches, strict=True))
    assert rows.tolist() == again.tolist()
    seen = np.bincount(rows, minlength=24)
    for number, (cache, count) in enumerate(zip(caches, weights, strict=True)):
        of_cache = seen[(0, 10)[number] + cache.usable]
        assert of_cache.sum() == round(count * len(cache.usable))
        assert of_cache.max() - of_cache.min() <= (0 if count == int(count) else 1)
    if 0.5 in weights:
        assert sorted(rows.tolist()) != sorted(next_epoch.tolist())


def test_caches_of_two_teachers_are_refused_by_field(halves: Halves) -> None:
    caches = [Cache(t.cache, student="student") for t in (halves.first, halves.other)]

    with pytest.raises(Mismatch, match=r"other/cache was made for something else: .*teacher\.weights"):
        CacheUnion(caches, [1.0, 1.0])


def test_another_number_of_classes_is_refused_by_field(halves: Halves, tmp_path: Path) -> None:
    fewer, more = (
        tiny.made(tmp_path / str(topk), pairs=pairs, teacher__losses=["uld"], teacher__topk=topk, losses=TOPK)
        for topk, pairs in ((4, PAIRS[:6]), (8, PAIRS[6:12]))
    )

    with pytest.raises(Mismatch, match=r"classes\.topk_(ids|logits): cache has 8, this run has 4"):
        CacheUnion([Cache(t.cache, student="student") for t in (fewer, more)], [1.0, 1.0])


def test_classes_that_one_cache_alone_keeps_are_left_out(halves: Halves, tmp_path: Path) -> None:
    kept = {"teacher__losses": ["uld", "sra", "mta", "dwa"], "losses": TOPK}
    more = tiny.made(tmp_path / "more", pairs=PAIRS[:6], **kept)

    union = CacheUnion([Cache(t.cache, student="student") for t in (more, halves.second)], [1.0, 1.0])

    assert not any(signal.top for signal in union.signals)
    assert "hidden_last" in [signal.column for signal in union.signals]


TOPK = {"uld": {"teacher": "topk"}}


@pytest.mark.parametrize("text", ["a=", "a=x", "a=0", "a=-1", "a=inf", "a=nan", "=2"])
def test_a_weight_that_is_no_number_above_0_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="not a weight above 0"):
        parse_shards(text)


def test_a_folder_whose_name_ends_like_a_weight_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "lr=2").mkdir()

    assert parse_shards(str(tmp_path / "lr=2")) == (tmp_path / "lr=2", "", 1.0)


def test_a_run_over_two_caches_names_both_and_another_weight_is_another_run(halves: Halves, tmp_path: Path) -> None:
    shards = [str(halves.first.cache), str(halves.second.cache)]
    run = halves.first.run(out=str(tmp_path / "out"), shards=shards, loss="mta+sra", steps=4, student__tokenizer="")

    trained = train(run, quiet=True)

    assert set(trained.terms) >= {"mta.dsa@2:word", "sra.cos", "loss"}
    roots = [Cache(t.cache, student="student").students.manifest.root for t in (halves.first, halves.second)]
    assert [one for one, _ in provenance(tmp_path / "out")["run"]["cache"]] == roots
    changed = run.model_copy(update={"train": run.train.model_copy(update={"shards": (shards[0], shards[1] + "=2")})})
    with pytest.raises(Mismatch):
        train(changed, quiet=True)


def provenance(out: Path) -> Any:
    return json.loads((out / "xkd.json").read_text())


def test_what_one_cache_lacks_is_refused_with_that_cache(halves: Halves, tmp_path: Path) -> None:
    bare = tiny.made(tmp_path / "bare", pairs=PAIRS[:4], teacher__losses=["kl"])
    shards = [str(halves.first.cache), str(bare.cache)]

    with pytest.raises(UsageError, match=r"loss dwa needs entropy, which .*bare/cache"):
        set_up(halves.first.run(out=str(tmp_path / "out"), shards=shards, loss="dwa"), "")


def test_the_deviation_of_the_states_is_that_of_all_documents(halves: Halves, both: CacheUnion) -> None:
    each = [cache.sizes.hidden_std for cache in both.caches]

    assert min(each) <= both.sizes.hidden_std <= max(each)
    assert both.sizes.hidden_std == pytest.approx(((10 * each[0] ** 2 + 14 * each[1] ** 2) / 24) ** 0.5)


# Several teachers of the same documents: each has its losses, every row is there once, and so is cross-entropy


ROWS = (7, 13, 19, 21)  # short ones
LOSSES = "mta+sra+alm"


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


def test_one_teacher_twice_at_half_the_weight_has_the_loss_and_gradient_of_one(
    two: Two, capsys: pytest.CaptureFixture[str]
) -> None:
    once, slopes = step([two.first], LOSSES + "+dwa")
    twice, both = step([f"{two.first}=0.5", f"{two.first}=0.5"], LOSSES + "+dwa")

    assert "two of the caches are of one teacher" in capsys.readouterr().err
    assert_same_step((twice, of_student(both)), (once, of_student(slopes)), least=1e-3)
    learnt = [name for name in slopes if name.startswith("losses.")]
    assert learnt
    for name in learnt:
        _, loss, rest = name.split(".", 2)
        for label in ("teacher", "teacher#2"):
            torch.testing.assert_close(2 * both[f"losses.{loss}@{label}.{rest}"], slopes[name], rtol=1e-4, atol=1e-6)


def test_two_teachers_add_up_by_weight_and_cross_entropy_is_there_once(two: Two) -> None:
    (ce, of_ce), (first, ours), (second, theirs) = (
        step([shards], loss)
        for shards, loss in ((two.first, "ce"), (two.first, "ce=0+" + LOSSES), (two.second, "ce=0+" + LOSSES))
    )

    total, slopes = step([f"{two.first}=2", f"{two.second}=0.5"], "ce=1+" + LOSSES)

    summed = {name: of_ce[name] + 2 * ours[name] + 0.5 * theirs[name] for name in of_student(of_ce)}
    assert_same_step((total, of_student(slopes)), (ce + 2 * first + 0.5 * second, summed), least=1e-3)


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

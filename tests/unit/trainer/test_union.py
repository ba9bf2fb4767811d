"""Several caches of one teacher read as one: the same rows as each alone, weights, refusals, and a training run."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny_models as tiny
from tiny_models import PAIRS, TEACHER_TOKENIZER, Tiny
from xkd_schemas.errors import Mismatch, UsageError
from xkd_schemas.signals import signal_named
from xkd_trainer.data.cache import Cache
from xkd_trainer.data.collate import batch_of
from xkd_trainer.data.several_caches import CacheUnion, parse_shards
from xkd_trainer.training.loop import train
from xkd_trainer.training.prepare import set_up

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
        other=tiny.made(root / "other", pairs=PAIRS[10:], teacher=other),
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
            assert all(map(np.array_equal, one, other))
    ends = [ids.tolist() for ids, _, _ in both.rows_of_student(2)]
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

"""Of a document that is cut to the model's length, signals of spans are kept for the spans that were read, no more."""

from pathlib import Path

import pytest

import tiny_models as tiny
from xkd_pipeline.maintain.recompute import recompute
from xkd_pipeline.maintain.verify import verify
from xkd_trainer.data.collate import batch_of
from xkd_trainer.training.prepare import Ready, set_up

WORDS = 3_000
LONG = ("Tell it all.", "The old keeper lit the lamp. " * (WORDS // 6))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cut")
    tiny.made(folder, pairs=[*tiny.PAIRS[:2], LONG], teacher__max_tokens=80, student__max_tokens=70)
    return folder


@pytest.fixture(scope="module")
def ready(root: Path) -> Ready:
    return set_up(tiny.Tiny(root).run(loss="mta+sra", teacher__max_tokens=80, student__max_tokens=70), "")


def test_geometry_does_not_grow_with_what_was_not_read(ready: Ready) -> None:
    cache = ready.cache
    document, teacher = cache.documents[2], cache.teachers[2]
    assert len(document["words"]) > WORDS - 10
    read = sum(start < teacher["num_chars"] for start, _ in document["words"].tolist())
    assert 10 < read < 100
    columns = [c for c in cache.teachers.shard(0).schema.names if c.endswith(":word")]
    sizes = {c.partition("@")[0]: len(teacher[c]) for c in columns}
    assert sizes["span_geometry"] == read * (read - 1) // 2
    assert sizes["span_mass"] == read
    assert verify(cache.root, "deep") == []


def test_a_trainer_pairs_the_spans_that_were_read_with_their_words(ready: Ready) -> None:
    cache = ready.cache
    batch = batch_of(cache, [0, 2], frozenset(ready.wanted))
    for level in batch.levels:
        words = cache.documents[2]["words" if level.unit == "word" else "phrases"]
        count = len(cache.teachers[2][f"span_mass@{level.layer}:{level.unit}"])
        ranges = cache.students[2][f"{level.unit}_tokens"][:count]
        assert level.student_BU2[1, :count].tolist() == ranges.tolist()
        assert level.student_BU2.shape[1] == count < len(words)
        assert level.valid_BU[1].any()
    assert all((row == 1).all() for level in batch.levels for row in level.cosines_BUU[1].diagonal())


def test_the_live_teacher_agrees(root: Path) -> None:
    found = recompute(root / "cache", "teachers/teacher", str(root / "teacher"), 3)
    assert (found.bad, found.rows) == ([], 3)

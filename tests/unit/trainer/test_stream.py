"""What a batch reads and refuses, tables that do not fit together, and the reading thread.

That a batch has the numbers of the tables is seen where the losses are compared with loops over single documents.
"""

import json
import shutil
import threading
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from damages import resealed
from one_tokenizer import ROWS
from tiny_models import tiny_cache
from xkd_schemas.errors import BadData, InputMissing, Mismatch, UsageError
from xkd_schemas.signals import Signal, signal_named
from xkd_schemas.tokens import CONTENT, END
from xkd_trainer.data import collate as stream
from xkd_trainer.data.batch import Batch
from xkd_trainer.data.cache import Cache, find_student
from xkd_trainer.data.collate import batch_of, inside_any
from xkd_trainer.data.sampler import prefetch

WANTED = frozenset(
    signal_named(column)
    for column in (
        "hidden_last", "attention_text@4", "entropy", "argmax", "span_mass@2:word", "span_geometry@2:word",
        "span_vectors@2:word", "span_mass@3:phrase", "span_geometry@3:phrase", "span_vectors@4:phrase",
        "span_mass@4:phrase",
    )
)  # fmt: skip


@pytest.fixture(scope="module")
def cache() -> Cache:
    return Cache(tiny_cache().cache, student="student")


@pytest.fixture(scope="module")
def batch(cache: Cache) -> Batch:
    return batch_of(cache, ROWS, WANTED)


def test_signals_that_nobody_asked_for_are_not_read(cache: Cache) -> None:
    batch = batch_of(cache, ROWS, frozenset({Signal("entropy")}))

    assert batch.teacher_hidden_BRD is batch.teacher_attention_BR is batch.teacher_argmax_BM is None
    assert batch.levels == ()
    assert batch.teacher_entropy_BM is not None


SPANS = st.lists(st.tuples(st.integers(0, 12), st.integers(1, 6)).map(lambda p: (p[0], p[0] + p[1])), max_size=6)


@given(spans=SPANS, outer=SPANS)
def test_inside_any_equals_the_loops(spans: list[tuple[int, int]], outer: list[tuple[int, int]]) -> None:
    def array(pairs: list[tuple[int, int]]) -> Any:
        return np.array(pairs, dtype=np.int32).reshape(-1, 2)

    found = inside_any(array(spans), array(outer))

    assert found.tolist() == [any(a <= start and end <= b for a, b in outer) for start, end in spans]


def test_moving_a_batch_moves_every_tensor(batch: Batch) -> None:
    moved = batch.to(torch.device("meta"))

    values = [getattr(part, f.name) for part in (moved, *moved.levels, *moved.token_states) for f in fields(part)]
    tensors = [value for value in values if isinstance(value, Tensor)]
    assert {t.device.type for t in tensors} == {"meta"}
    assert len(tensors) > 30
    assert moved.rows == ROWS


# Rows that no tiny document has


def aligned(student_spans: list[Any], teacher_spans: list[Any]) -> dict[str, Any]:
    """Four tokens on both sides, all targets; the student's last one is an end token."""

    def side(name: str, spans: list[Any]) -> Any:
        return {name: np.array(spans, np.int32).reshape(-1, 2), "targets": np.ones(4, np.bool_)}

    student = side("student_spans", student_spans) | side("teacher_spans", teacher_spans)
    student["token_kinds"] = np.array([CONTENT, CONTENT, CONTENT, END], np.uint8)
    return stream._alignment_arrays(student, {"targets": np.ones(4, np.bool_)}, 7)


def test_a_first_token_that_nothing_predicts_is_a_span_and_no_pair() -> None:
    found = aligned([(0, 1), (1, 2), (2, 4)], [(0, 1), (1, 2), (2, 3)])

    assert found["span_student_BK2"].tolist() == [[0, 1], [1, 2], [2, 4]]
    assert found["pairs_BE2"].tolist() == [[0, 0]]
    assert aligned([(1, 2), (3, 4)], [(1, 2), (3, 4)])["span_text_BK"].tolist() == [True, False]
    assert aligned([(0, 1)], [(1, 2)])["pairs_BE2"].tolist() == []
    assert aligned([(1, 2)], [(0, 1)])["pairs_BE2"].tolist() == []
    assert aligned([(1, 2)], [(1, 3)])["pairs_BE2"].tolist() == []


@pytest.mark.parametrize(("student", "teacher"), [((3, 5), (0, 1)), ((0, 1), (4, 5))])
def test_a_span_outside_its_tokens_is_bad_data(student: Any, teacher: Any) -> None:
    with pytest.raises(BadData, match=r"row 7: an aligned span lies outside the tokens of its document"):
        aligned([student], [teacher])


def test_a_span_without_a_token_on_one_side_is_not_valid() -> None:
    signal = Signal("span_mass", 2, "word")
    ranges = np.array([[0, 1], [1, 1], [1, 2]])
    sample = {"student": ranges, "teacher": ranges, "seen": ranges[:, 1] > ranges[:, 0]}
    sample |= {"in_phrase": np.ones(3, np.bool_), "in_target": np.ones(3, np.bool_)}
    arrays = {f"level word {name}": values for name, values in sample.items()}
    arrays["level span_mass@2:word"] = np.array([0.5, 0.5, 0.0], np.float32)

    level = stream._level(2, "word", [arrays], frozenset({signal}))

    assert level.valid_BU.tolist() == [[True, False, False]]


# Caches that do not fit together


def copied(tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_cache().cache, tmp_path / "cache"))


def test_tables_that_hold_other_documents_in_a_row_are_bad_data(cache: Cache) -> None:
    other = Cache(tiny_cache().cache, student="student")
    real = other.teachers

    class Shifted:
        name = real.name

        def __getitem__(self, row: int) -> Any:
            return real[row + 1]

    other.teachers = Shifted()  # type: ignore[assignment]
    with pytest.raises(BadData, match=r"row 3 is another document in each table.*teachers/teacher"):
        batch_of(other, [3], WANTED)
    assert batch_of(cache, [3], WANTED).rows == (3,)


def test_the_student_table_is_found_by_its_tokenizer_and_two_that_fit_must_be_named(tmp_path: Path) -> None:
    with pytest.raises(InputMissing, match=r"cache .*nowhere is not a folder"):
        Cache(tmp_path / "nowhere", student="student")
    root = copied(tmp_path)
    stored = json.loads((root / "students/student/plan.json").read_text())["spec"]["encoder"]["tokenizer"]
    with pytest.raises(InputMissing, match=r"has no students table 'other'; it has student"):
        find_student(root, stored, "other")

    assert set(stored) == {"vocabulary", "special_tokens", "chat_template", "probe"}
    for name in ("", "student"):
        assert find_student(root, stored, name) == "student"
        for field in stored:
            with pytest.raises(Mismatch, match=rf"students/student has another {field}\. .*xkd-cache align"):
                find_student(root, {**stored, field: "other"}, name)
    shutil.copytree(root / "students/student", root / "students/twin")
    with pytest.raises(UsageError, match=r"student, twin all fit this student.*--student-table NAME"):
        find_student(root, stored, "")
    shutil.rmtree(root / "students")
    with pytest.raises(InputMissing, match=r"has no finished students table.*xkd-cache align"):
        find_student(root, stored, "")


# The thread


def test_items_come_in_order_and_no_more_than_the_depth_ahead() -> None:
    made: list[int] = []

    def produce() -> Iterator[int]:
        for item in range(20):
            made.append(item)
            yield item

    taken = []
    for item in prefetch(produce(), depth=2):
        taken.append(item)
        assert len(made) <= len(taken) + 3

    assert taken == list(range(20))


def test_an_error_of_the_producer_is_raised_after_the_items_before_it_and_an_early_stop_ends_the_thread() -> None:
    def produce() -> Iterator[int]:
        yield 1
        raise BadData("row 7 is gone")

    before = set(threading.enumerate())  # other tests' among them, until they are collected
    items, zeros = prefetch(produce()), prefetch(iter(int, 1))
    assert (next(items), next(zeros)) == (1, 0)
    with pytest.raises(BadData, match="row 7 is gone"):
        next(items)
    zeros.close()  # type: ignore[attr-defined]

    assert set(threading.enumerate()) <= before


@pytest.mark.parametrize(
    ("table", "field", "named"),
    [
        ("students/student", "documents", "documents"), ("students/student", "teacher_root", "teacher_root"),
        ("teachers/teacher", "documents", "teacher documents"), ("documents", "schema", "documents"),
        ("teachers/teacher", "schema", "teachers"), ("students/student", "schema", "students"),
    ],
)  # fmt: skip
def test_every_tie_between_the_tables_is_refused_by_name(tmp_path: Path, table: str, field: str, named: str) -> None:
    """Tables are sealed again and tied to each other anew, so that one tie alone is wrong."""
    root = copied(tmp_path)

    def seal(name: str, **tied: str) -> str:
        wrong = {field: 99 if field == "schema" else "other"} if name == table else {}
        return resealed(root, name, lambda data: data["spec"].update(tied | wrong))

    documents = seal("documents")
    seal("students/student", documents=documents, teacher_root=seal("teachers/teacher", documents=documents))

    with pytest.raises(Mismatch) as caught:
        Cache(root, student="student")
    assert f"{named}: cache has" in str(caught.value)
    assert str(caught.value).count("cache has") == 1

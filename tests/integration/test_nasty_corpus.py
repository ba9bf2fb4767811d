"""Rows that break readers, through all stages: each is captured or rejected with a reason, and what is kept is right.

XKD_NASTY_ROWS sets how many rows.
"""

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any, get_args

import numpy as np

import nasty_corpus
import small_cache
import tiny_models
from damages import SEED
from xkd_pipeline.cli.app import app
from xkd_pipeline.maintain.verify import verify
from xkd_pipeline.stages import align_stage, documents_stage, teacher_stage
from xkd_pipeline.workers.contract import Workers
from xkd_schemas.cache.table import Row, Table
from xkd_schemas.corpus.rows import Reason
from xkd_schemas.text.encode import REASONS
from xkd_schemas.tokens import CONTENT, OK

ROWS = int(os.environ.get("XKD_NASTY_ROWS", "300"))
TABLES = ("teachers/T", "students/unigram", "students/wordpiece")
REJECTS = set(get_args(Reason))
"""The reasons a row can be rejected for."""


def through(folder: Path, count: int, seed: int) -> Counter[str]:
    """Documents, teacher, two students, verify, report; how many rows were captured, rejected, unusable, checked."""
    paths = nasty_corpus.write(folder, count, seed)
    tiny_models.saved(tiny_models.llama("byte_level", seed=1), "byte_level", folder / "teacher")
    given: dict[str, dict[str, object]] = {
        "documents": {"corpus": [str(path) for path in paths], "max_reject": 1.0, "rows_per_shard": 200},
        "teacher": {"model": str(folder / "teacher"), "template": "none", "max_tokens": 200, "batch_tokens": 4096},
    }
    cache = folder / "cache"
    silent = {"echo": lambda _line: None}
    documents_stage(small_cache.run_file(cache, **given), Workers(), **silent)
    teacher_stage(small_cache.run_file(cache, **given), Workers())
    for kind in ("unigram", "wordpiece"):
        tiny_models.tokenizer_of(kind).save_pretrained(folder / kind)
        student = {"tokenizer": str(folder / kind), "name": kind, "max_tokens": 150}
        align_stage(small_cache.run_file(cache, **given, student=student), Workers())
    assert verify(cache, "deep") == []
    report(cache)
    found = rows_accounted_for(cache, {path.name: count_lines(path) for path in paths})
    found["checked"] = sum(check_documents(Table(cache, "documents"), Table(cache, name)) for name in TABLES)
    return found


def count_lines(path: Path) -> int:
    """Lines of a file, blank ones after the last row left out."""
    lines = path.read_bytes().split(b"\n")
    while not lines[-1].strip():
        lines.pop()
    return len(lines)


def rows_accounted_for(cache: Path, sizes: dict[str, int]) -> Counter[str]:
    """Every line of every file is one document or one reject with a reason; never both, never twice."""
    lines = {name: [0] * size for name, size in sizes.items()}
    table = Table(cache, "documents")
    found: Counter[str] = Counter(captured=len(table), rows=sum(sizes.values()))
    for row in table:
        lines[row["source"]][row["line"] - 1] += 1
    for path in sorted((cache / "documents/rejects").glob("*.jsonl")):
        for text in path.read_text(encoding="ascii").splitlines():
            reject = json.loads(text)
            lines[reject["source"]][reject["line"] - 1] += 1
            assert reject["reason"] in REJECTS, reject
            assert reject["detail"].isprintable()
            assert len(reject["sha256"]) == 64
            found["rejected"] += 1
            found[f"rejected as {reject['reason']}"] += 1
    assert all(times == 1 for name in lines for times in lines[name]), {n: Counter(t) for n, t in lines.items()}
    assert found["captured"] + found["rejected"] == found["rows"]
    return found


def check_documents(documents: Table, table: Table) -> int:
    """Intervals of every row against its text; how many rows have tokens."""
    usable = 0
    teachers = None if table.name.startswith("teachers/") else Table(documents.folder.parent, "teachers/T")
    for at, row in enumerate(table):
        document = documents[at]
        assert row["doc_id"] == document["doc_id"]
        if row["status"] != OK:
            assert row["status"].removeprefix("teacher:") in REASONS
            assert len(row["token_ids"]) == 0
            continue
        usable += 1
        check_spans(document)
        check_tokens(document, row)
        if teachers is not None:
            check_alignment(document["text"], row, teachers[at])
    return usable


def check_spans(document: Row) -> None:
    text, borders = document["text"], document["segments"][:, 1].tolist()
    for name in ("words", "phrases"):
        for start, end in document[name].tolist():
            piece = text[start:end]
            assert 0 <= start < end <= len(text)
            assert piece == piece.strip(), (document["doc_id"], name, piece)
            assert not any(start < border < end for border in borders)


def check_tokens(document: Row, row: Row) -> None:
    """In order, inside the text, not over a segment's border, and no character but a blank without a token."""
    text, end = document["text"], row["num_chars"]
    spans_T2 = row["token_spans"][row["token_kinds"] == CONTENT]
    assert (np.diff(spans_T2, axis=0) >= 0).all()
    assert spans_T2.min(initial=0) >= 0
    assert spans_T2.max(initial=0) <= end
    covered = np.zeros(len(text), dtype=bool)
    for start, stop in spans_T2.tolist():
        covered[start:stop] = True
    bare = [c for c, has in zip(text[:end], covered, strict=False) if not has and not c.isspace()]
    assert not bare, (document["doc_id"], bare[:9])
    for border in document["segments"][:, 1].tolist():
        assert not ((spans_T2[:, 0] < border) & (spans_T2[:, 1] > border)).any()


def check_alignment(text: str, student: Row, teacher: Row) -> None:
    """Each aligned pair of token ranges ends at the same character."""
    pairs = zip(student["student_spans"].tolist(), student["teacher_spans"].tolist(), strict=True)
    for (s_first, s_last), (t_first, t_last) in pairs:
        assert s_first < s_last
        assert t_first < t_last
        mine, theirs = student["token_spans"][s_last - 1, 1], teacher["token_spans"][t_last - 1, 1]
        assert text[: int(mine)].rstrip() == text[: int(theirs)].rstrip()


def report(cache: Path) -> None:
    """The report is written, and no text of the corpus stands in it as markup."""
    page = cache.parent / "report.html"
    code: Any = app(["report", str(cache), "--out", str(page)], standalone_mode=False)
    assert not code
    content = page.read_text(encoding="utf-8")
    assert "</html>" in content
    assert "<script" not in content
    assert "<img src=x" not in content
    assert "\x1b" not in content


def test_every_nasty_row_is_captured_or_rejected_with_a_reason(tmp_path: Path) -> None:
    found = through(tmp_path, ROWS, SEED)

    assert found["rows"] >= ROWS - 4 * 2  # blank lines at the end of a file are none
    assert found["captured"] > ROWS // 4
    assert len([name for name in found if name.startswith("rejected as")]) >= 9
    assert found["checked"] > 1.5 * found["captured"]

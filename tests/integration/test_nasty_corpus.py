"""Rows that break readers, through all stages: each is captured or rejected with a reason, and the cache is whole.

XKD_NASTY_ROWS sets how many rows.
"""

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any, get_args

import nasty_corpus
import small_cache
import tiny_models
from damages import SEED
from xkd_pipeline.cli.app import app
from xkd_pipeline.maintain.verify import verify
from xkd_pipeline.stages import align_stage, documents_stage, teacher_stage
from xkd_pipeline.workers.contract import Workers
from xkd_schemas.cache.table import Table
from xkd_schemas.corpus.rows import Reason
from xkd_schemas.text.encode import REASONS
from xkd_schemas.tokens import OK

ROWS = int(os.environ.get("XKD_NASTY_ROWS", "300"))
TABLES = ("teachers/T", "students/unigram", "students/wordpiece")
REJECTS = set(get_args(Reason))
"""The reasons a row can be rejected for."""


def through(folder: Path, count: int, seed: int) -> Counter[str]:
    """Documents, teacher, two students, verify, report; how many rows were captured, rejected, usable."""
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
    found["usable"] = sum(count_usable(Table(cache, name)) for name in TABLES)
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


def count_usable(table: Table) -> int:
    """Rows with tokens; each other says why it has none."""
    usable = [row for row in table if row["status"] == OK]
    others = {row["status"].removeprefix("teacher:") for row in table} - {OK}
    assert others <= set(REASONS)
    assert all(len(row["token_ids"]) for row in usable)
    return len(usable)


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
    assert found["usable"] > 1.5 * found["captured"]

"""Shards with right digests that cannot be read: a finding on their unit."""

from pathlib import Path

import pytest

import small_cache
from damages import resigned
from xkd_pipeline.maintain.verify import verify
from xkd_schemas.cache.manifest import Manifest, read_record
from xkd_schemas.cache.table import Row


def shard(cache: Path, table: str, unit: int) -> Path:
    return cache / table / read_record(cache / table / "manifest.json", Manifest).commits[unit].file


def test_a_check_that_raises_is_a_finding_on_its_unit_and_the_rest_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    from xkd_pipeline.maintain import verify_rows as deep

    plain = deep._check_document

    def raising(row: Row) -> str:
        return str(1 // 0) if row["line"] == 5 else plain(row)

    monkeypatch.setattr(deep, "_check_document", raising)

    found = verify(small_cache.made() / "cache", "deep")

    assert [(one.table, one.unit) for one in found] == [("documents", 1)]
    assert found[0].reason.startswith("cannot be read: ZeroDivisionError")


def test_text_that_cannot_be_read_is_a_finding_that_names_the_unit(tmp_path: Path) -> None:
    cache = small_cache.copied(tmp_path)
    path = shard(cache, "documents", 0)
    content = path.read_bytes()
    at = content.index(b"It prints")
    resigned(cache, "documents", 0, content[:at] + b"\xff" + content[at + 1 :])

    assert ("documents", 0) in {(one.table, one.unit) for one in verify(cache, "deep")}

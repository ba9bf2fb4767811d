"""A cache as programs see it that know nothing of us: datasets, sha256sum, and a list of what is there."""

import subprocess
import warnings
from pathlib import Path

import numpy as np
import pytest

import small_cache
from xkd_schemas.cache.table import Table

CONFIGS = ("documents", "students/S", "teachers/T")


@pytest.fixture(scope="module")
def cache() -> Path:
    return small_cache.made() / "cache"


@pytest.mark.parametrize("name", [None, *CONFIGS])
def test_datasets_opens_every_table_by_name_and_the_documents_by_default(
    tmp_path: Path, cache: Path, name: str | None
) -> None:
    from datasets import load_dataset

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        loaded = load_dataset(
            str(cache), name.replace("/", "-") if name else None, split="train", cache_dir=str(tmp_path)
        )
    table = Table(cache, name or "documents")

    assert loaded["doc_id"][:] == [row["doc_id"] for row in table]
    assert loaded.column_names == table.shard(0).schema.names
    for column in table.shard(0).schema.names:
        for ours, theirs in zip((row[column] for row in table), loaded[column], strict=True):
            assert np.array_equal(ours, np.reshape(theirs, np.shape(ours)))


def test_sha256sum_passes_over_every_file_that_belongs_to_the_cache(cache: Path) -> None:
    words = ["sha256sum", "--strict", "-c", "SHA256SUMS"]
    done = subprocess.run(words, cwd=cache, capture_output=True, text=True, check=False)
    checked = {line.removesuffix(": OK") for line in done.stdout.splitlines()}

    assert done.returncode == 0, done.stderr
    assert checked == set(small_cache.files_of(cache)) - {"SHA256SUMS"}


def test_the_card_says_how_large_every_table_is(cache: Path) -> None:
    card = (cache / "README.md").read_text(encoding="utf-8")

    for name in CONFIGS:
        table = Table(cache, name)
        size = sum(path.stat().st_size for path in (cache / name).glob("*.arrow"))
        assert f"| {name} | 12 | 3 | {size:,} | `{table.manifest.root[:16]}` |\n" in card

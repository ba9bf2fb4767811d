"""A cache for programs that know nothing of us: datasets, sha256sum, and an export as Parquet files."""

import json
import subprocess
import warnings
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import small_cache
from damages import flip
from small_cache import made
from xkd_pipeline.maintain.export_parquet import export_parquet
from xkd_schemas.cache.table import Table
from xkd_schemas.errors import BadData

TABLES = ("documents", "teachers/T", "students/S")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("parquet") / "out"
    export_parquet(made() / "cache", out)
    return out


@pytest.mark.parametrize("name", TABLES)
def test_every_column_has_the_values_of_the_cache(exported: Path, name: str) -> None:
    table = Table(made() / "cache", name)
    shards = [table.shard(unit) for unit in range(len(table.manifest.commits))]
    ours = pa.Table.from_batches([s.batch(n) for s in shards for n in range(len(s.commit.batches))])
    theirs = pa.concat_tables([pq.read_table(path) for path in sorted((exported / name).glob("*.parquet"))])

    assert theirs.column_names == ours.column_names
    for column in ours.column_names:
        assert theirs.column(column).to_pylist() == ours.column(column).to_pylist()
    assert json.loads((exported / name / "manifest.json").read_text())["root"] == table.manifest.root


def test_the_metadata_turns_bf16_bits_into_the_numbers_of_the_states(exported: Path) -> None:
    table = pq.read_table(exported / "teachers" / "T" / "00000.parquet")
    about = json.loads(table.schema.metadata[b"xkd_bf16"])

    vectors = {f"span_vectors@{level}" for level in ("2:word", "3:phrase", "4:phrase")}
    assert set(about["columns"]) == {"hidden_last", *vectors}
    bits = table.column("hidden_last").combine_chunks().flatten().flatten().to_numpy()
    numbers = (bits.astype(np.uint32) << 16).view(np.float32)
    assert np.isfinite(numbers).all()
    std = Table(made() / "cache", "teachers/T").manifest.constants["hidden_std"]
    assert numbers.std() == pytest.approx(std, rel=0.2)
    assert b"xkd_bf16" not in pq.read_schema(exported / "documents" / "00000.parquet").metadata


def test_what_a_killed_export_left_goes(tmp_path: Path) -> None:
    (tmp_path / ".tmp-out-1-ab" / "documents").mkdir(parents=True)

    export_parquet(made() / "cache", tmp_path / "out")

    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_damaged_shard_leaves_nothing_behind(tmp_path: Path) -> None:
    cache = small_cache.copied(tmp_path)
    shard = max((cache / "teachers" / "T").glob("*.arrow"))
    flip(shard)

    with pytest.raises(BadData, match="corrupt"):
        export_parquet(cache, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["cache"]


@pytest.mark.parametrize("name", [None, "teachers/T"])
def test_datasets_opens_every_table_by_name_and_the_documents_by_default(tmp_path: Path, name: str | None) -> None:
    from datasets import load_dataset

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        loaded = load_dataset(
            str(made() / "cache"), name.replace("/", "-") if name else None, split="train", cache_dir=str(tmp_path)
        )
    table = Table(made() / "cache", name or "documents")

    assert loaded["doc_id"][:] == [row["doc_id"] for row in table]
    assert loaded.column_names == table.shard(0).schema.names
    for column in table.shard(0).schema.names:
        for ours, theirs in zip((row[column] for row in table), loaded[column], strict=True):
            assert np.array_equal(ours, np.reshape(theirs, np.shape(ours)))


def test_sha256sum_passes_over_every_file_that_belongs_to_the_cache() -> None:
    words = ["sha256sum", "--strict", "-c", "SHA256SUMS"]
    done = subprocess.run(words, cwd=made() / "cache", capture_output=True, text=True, check=False)
    checked = {line.removesuffix(": OK") for line in done.stdout.splitlines()}

    assert done.returncode == 0, done.stderr
    assert checked == set(small_cache.files_of(made() / "cache")) - {"SHA256SUMS"}


def test_the_card_says_how_large_every_table_is() -> None:
    card = (made() / "cache" / "README.md").read_text(encoding="utf-8")

    for name in TABLES:
        table = Table(made() / "cache", name)
        size = sum(path.stat().st_size for path in (made() / "cache" / name).glob("*.arrow"))
        assert f"| {name} | 12 | 3 | {size:,} | `{table.manifest.root[:16]}` |\n" in card

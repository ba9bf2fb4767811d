"""Ragged columns, shards and sealed tables: what was written is read, and nothing that was damaged is."""

import gc
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import small_cache
from xkd_pipeline.tables import shard
from xkd_pipeline.tables.shard import write_shard
from xkd_schemas.cache import table as table_module
from xkd_schemas.cache.manifest import Commit, Manifest, Plan, Unit, read_record, seal_table, to_json
from xkd_schemas.cache.table import Shard, Table, names_in
from xkd_schemas.documents import INTERVALS
from xkd_schemas.errors import BadData, Mismatch, Refused
from xkd_schemas.ragged import Columns, batch_of, flat_list

SCHEMA = pa.schema(
    [
        pa.field("doc_id", pa.string(), nullable=False),
        pa.field("spans", INTERVALS, nullable=False),
        pa.field("values", flat_list(pa.float32()), nullable=False),
        pa.field("flags", flat_list(pa.bool_()), nullable=False),
        pa.field("labels", flat_list(pa.string()), nullable=False),
    ]
)


def columns(size: int, first: int = 0) -> dict[str, Any]:
    lengths = [(first + n) % 4 for n in range(size)]
    return {
        "doc_id": [f"d{first + n}" for n in range(size)],
        "spans": [np.arange(2 * k, dtype=np.int32).reshape(k, 2) + first + n for n, k in enumerate(lengths)],
        "values": [np.linspace(0, 1, k, dtype=np.float32) for k in lengths],
        "flags": [np.arange(k) % 2 == 0 for k in lengths],
        "labels": [["NP", "VP", "NP"][:k] for k in lengths],
    }


def sealed_table(root: Path, sizes: tuple[int, ...] = (3, 40, 0), first: int = 0) -> Table:
    folder = root / "documents"
    folder.mkdir(parents=True)
    starts = [first + sum(sizes[:n]) for n in range(len(sizes))]
    commits = tuple(write_shard(folder, n, SCHEMA, columns(sizes[n], starts[n])) for n in range(len(sizes)))
    plan = Plan(table="documents", spec={}, units=tuple(Unit(source="x", first=0, rows=n) for n in sizes))
    (folder / "manifest.json").write_bytes(to_json(seal_table(plan, commits, {}, {})))
    return Table(root, "documents")


def read_all(opened: Shard) -> list[Any]:
    return [opened.batch(n).to_pylist() for n in range(len(opened.commit.batches))]


def remanifest(root: Path, change: Callable[[Commit], Commit]) -> None:
    """Change the manifest's commits and seal it again, as one with the tools could."""
    path = root / "documents" / "manifest.json"
    old = read_record(path, Manifest)
    commits = tuple(map(change, old.commits))
    units = tuple(Unit(source="x", first=0, rows=c.rows) for c in commits)
    path.write_bytes(to_json(seal_table(Plan(table="documents", spec=old.spec, units=units), commits, {}, {})))


def test_numbers_are_views_into_the_batch_and_cannot_be_written() -> None:
    batch = batch_of(SCHEMA, columns(8))
    buffers = [(b.address, b.address + b.size) for b in batch.column("values").buffers() if b is not None]

    view = Columns(batch).row("values", 3)

    assert any(low <= view.ctypes.data < high for low, high in buffers)
    assert not view.flags.writeable
    assert not Columns(batch).row("flags", 3).flags.writeable  # shared by all readers of the batch


def test_a_table_gives_every_row_of_every_shard_in_order(tmp_path: Path) -> None:
    table, wanted = sealed_table(tmp_path), columns(43)

    assert len(table) == 43
    assert all(np.array_equal(row["spans"], spans) for row, spans in zip(table, wanted["spans"], strict=True))
    for name, values in wanted.items():
        assert [np.asarray(row[name]).tolist() for row in table] == [np.asarray(value).tolist() for value in values]
    assert [type(table[3][name]) for name in ("doc_id", "labels")] == [str, list]
    for index in (-1, 43):
        with pytest.raises(IndexError):
            table[index]
    assert all(c.file == f"{c.unit:05d}-{c.sha256[:12]}.arrow" for c in table.manifest.commits)


def test_every_flipped_byte_of_a_shard_is_found(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(shard, "ROWS_PER_BATCH", 2)
    small = pa.schema([SCHEMA.field("doc_id"), SCHEMA.field("spans")])
    commit = write_shard(tmp_path, 0, small, columns(3))
    assert len(commit.batches) == 2
    path = tmp_path / commit.file
    whole, found = path.read_bytes(), {"header or footer": 0, "record batch": 0}
    read_all(Shard(path, commit))

    for at in range(len(whole)):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << at % 8
        path.write_bytes(damaged)
        with pytest.raises(BadData, match=r"is corrupt: (header or footer|record batch)") as caught:
            read_all(Shard(path, commit))
        found["record batch" if "record batch" in str(caught.value) else "header or footer"] += 1

    inside = sum(b.length for b in commit.batches)
    assert found == {"record batch": inside, "header or footer": len(whole) - inside}


def test_a_damaged_batch_is_named_with_its_rows_and_the_others_are_still_read(tmp_path: Path) -> None:
    commit = write_shard(tmp_path, 0, SCHEMA, columns(70))
    path = tmp_path / commit.file
    content = bytearray(path.read_bytes())
    content[commit.batches[1].offset + 200] ^= 1
    path.write_bytes(content)
    opened = Shard(path, commit)

    assert opened.row(31)["doc_id"] == "d31"
    assert opened.row(64)["doc_id"] == "d64"
    with pytest.raises(BadData, match=r"record batch 1 \(rows 32 to 63\) does not match its digest. Next: run"):
        opened.row(32)


@pytest.mark.parametrize("end", [0, 1, 8, 500, -1, None])
def test_a_shard_that_was_cut_or_has_grown_is_found(tmp_path: Path, end: int | None) -> None:
    commit = write_shard(tmp_path, 0, SCHEMA, columns(70))
    path = tmp_path / commit.file
    content = path.read_bytes()
    changed = content + b"\0" if end is None else content[:end]
    path.write_bytes(changed)

    with pytest.raises(BadData, match=f"has {len(changed)} bytes, its record says {len(content)}"):
        Shard(path, commit)


def test_a_column_that_is_not_there_is_refused_with_those_that_are(tmp_path: Path) -> None:
    with pytest.raises(
        BadData, match=r"lacks column nope, it has doc_id, flags, labels, spans, values\. Next: name one"
    ):
        sealed_table(tmp_path)[0]["nope"]


def test_a_missing_shard_says_how_to_get_it_back(tmp_path: Path) -> None:
    table = sealed_table(tmp_path)
    (table.folder / table.manifest.commits[1].file).unlink()

    assert table[2]["doc_id"] == "d2"
    with pytest.raises(BadData, match=r"00001-\w+.arrow is missing. Next: run the same xkd-cache command again"):
        table[3]


def test_files_swapped_together_with_their_records_are_found_by_their_unit_mark(tmp_path: Path) -> None:
    sealed_table(tmp_path, (3, 3))
    old = read_record(tmp_path / "documents" / "manifest.json", Manifest).commits
    remanifest(tmp_path, lambda c: old[1 - c.unit].model_copy(update={"unit": c.unit}))

    with pytest.raises(BadData, match="is shard 1, expected 0"):
        Table(tmp_path, "documents")[0]


def test_a_shard_with_other_columns_is_a_mismatch(tmp_path: Path) -> None:
    table = sealed_table(tmp_path, (3, 3))
    other = pa.schema([*list(SCHEMA)[:-1]])
    new = write_shard(table.folder, 1, other, {k: v for k, v in columns(3).items() if k != "labels"})
    remanifest(tmp_path, lambda c: new if c.unit == 1 else c)
    table = Table(tmp_path, "documents")

    assert table[0]["doc_id"] == "d0"
    with pytest.raises(Mismatch, match=r"00001-\w+.arrow has another schema than 00000-\w+.arrow"):
        table[3]


@pytest.mark.parametrize("name", ["../documents", "teachers/../documents", "students//x", "teachers/a/b/../.."])
def test_a_table_name_cannot_lead_out_of_the_cache(tmp_path: Path, name: str) -> None:
    sealed_table(tmp_path / "inner")

    with pytest.raises(Refused, match="is not a plain file name"):
        Table(tmp_path / "inner", name)


def test_only_sealed_tables_have_names_and_the_manifest_of_one_does_not_pass_for_another(tmp_path: Path) -> None:
    cache = small_cache.copied(tmp_path)
    (cache / "teachers" / "begun" / "commits").mkdir(parents=True)
    assert (names_in(cache, "teachers"), names_in(cache, "students"), names_in(cache, "nothing")) == (["T"], ["S"], [])
    shutil.copytree(cache / "teachers" / "T", cache / "teachers" / "U")

    with pytest.raises(BadData, match="is that of"):
        Table(cache, "teachers/U")


def open_files(root: Path) -> int:
    """Descriptors of this process that are files below `root`."""
    links = list(Path("/proc/self/fd").iterdir())
    return sum(link.exists() and str(link.readlink()).startswith(str(root)) for link in links)


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="open files are counted in /proc")
def test_a_few_shards_are_open_at_once_and_every_batch_is_hashed_once(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(table_module, "OPEN_SHARDS", 3)
    monkeypatch.setattr(shard, "ROWS_PER_BATCH", 2)
    hashed: list[bool] = []
    digest = table_module.xxh3_of
    table, wanted = sealed_table(tmp_path, (4, 2, 3, 5, 1, 4, 4)), columns(23)
    monkeypatch.setattr(
        table_module, "xxh3_of", lambda data: hashed.append(isinstance(data, memoryview)) or digest(data)
    )
    order = [int(n) for n in np.random.default_rng(0).permutation(23)] * 3

    rows = [table[index] for index in order[:30]]  # held: what was closed is still read
    assert all(table[index]["doc_id"] == wanted["doc_id"][index] for index in order)

    assert all(row["values"].tolist() == wanted["values"][at].tolist() for row, at in zip(rows, order, strict=False))
    assert sum(hashed) == sum(len(c.batches) for c in table.manifest.commits)  # frames are hashed as bytes
    assert len(hashed) > 2 * sum(hashed)  # and again whenever a shard is opened again
    del rows
    gc.collect()
    assert max(open_files(tmp_path) for index in order if table[index]["doc_id"]) == 3


def test_columns_stay_ready_for_few_record_batches_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table_module, "READY_BATCHES", 2)
    monkeypatch.setattr(shard, "ROWS_PER_BATCH", 2)
    opened = sealed_table(tmp_path, (20,)).shard(0)
    first = opened.row(0)
    for row in (*range(20), *range(20)):
        assert opened.row(row)["doc_id"] == opened.batch(row // 2).column("doc_id")[row % 2].as_py()
    assert len(opened._columns) == 2
    assert first["doc_id"] == opened.row(0)["doc_id"]


def test_tables_beside_each_other_hold_the_same_documents_or_are_refused(tmp_path: Path) -> None:
    ours, theirs = sealed_table(tmp_path / "a", (4,)), sealed_table(tmp_path / "b", (4,), first=1)

    assert Table(tmp_path / "a", "documents", [ours])[2]["doc_id"] == "d2"
    with pytest.raises(BadData, match=r"b/documents: row 0 is another document than in .*a/documents"):
        list(Table(tmp_path / "a", "documents", [ours, theirs]))

"""Shards with right digests whose content lies: one line, no crash, and no more memory than the file has."""

import os
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from faulty_disk import exit_code_of
from xkd_schemas.cache.manifest import Commit, RecordBatch
from xkd_schemas.cache.table import Shard
from xkd_schemas.durable_files import xxh3_of
from xkd_schemas.errors import BadData
from xkd_schemas.ragged import batch_of

ROUNDS = 50 * int(os.environ.get("XKD_FAULT_ROUNDS", "12"))
SEED = int(os.environ.get("XKD_FAULT_SEED", "20261129"))
FIELDS = {
    "doc_id": pa.string(),
    "ids": pa.large_list(pa.int32()),
    "pairs": pa.large_list(pa.list_(pa.int32(), 2)),
    "roles": pa.large_list(pa.string()),
    "targets": pa.large_list(pa.bool_()),
}


def written(compression: str | None = None, length: int = 3, **other: pa.DataType) -> bytes:
    """An Arrow file of two rows; `ids` of the first has that length; columns of other types are all null."""
    columns = {
        "doc_id": ["a", "b"],
        "ids": [np.zeros(length), np.arange(2)],
        "pairs": [np.ones((2, 2)), np.ones((1, 2))],
        "roles": [["x", "y"], ["z"]],
        "targets": [[True], [False, True]],
    }
    arrays = {name: batch_of(pa.schema({name: kind}), columns).column(0) for name, kind in FIELDS.items()}
    arrays |= {name: pa.nulls(2, kind) for name, kind in other.items()}
    sink = pa.BufferOutputStream()
    batch = pa.RecordBatch.from_pydict(arrays)
    with pa.ipc.new_file(sink, batch.schema, options=pa.ipc.IpcWriteOptions(compression=compression)) as writer:
        writer.write_batch(batch)
    return bytes(sink.getvalue())


def read_all(content: bytes, path: Path, rows: int = 2) -> None:
    """Read every value of a shard whose record was made by whoever made its content."""
    path.write_bytes(content)
    batch = RecordBatch(offset=0, length=len(content), rows=rows, xxh3=xxh3_of(content))
    commit = Commit(
        unit=0, file=path.name, rows=rows, size=len(content), sha256="", frame_xxh3=xxh3_of(b""), batches=(batch,)
    )
    shard = Shard(path, commit)
    for row in map(shard.row, range(rows)):
        for name in FIELDS:
            repr(np.asarray(row[name]).tolist())


def with_offsets(*offsets: int) -> bytes:
    content, true = written(), np.array([0, 3, 5], np.int64).tobytes()
    assert content.count(true) == 1
    return content.replace(true, np.array(offsets, np.int64).tobytes())


LIES: dict[str, Callable[[], bytes]] = {
    "offset beyond the values": lambda: with_offsets(0, 3, 10**12),
    "offset below zero": lambda: with_offsets(0, -(10**9), 5),
    "offsets that go back": lambda: with_offsets(0, 5, 3),
    "compressed": lambda: written("zstd", 10**6),
    "type that no table has": lambda: written(ids=pa.large_list(pa.large_list(pa.int32()))),
    "null": lambda: written(more=pa.int32()),
    "dictionary": lambda: written(more=pa.dictionary(pa.int32(), pa.string())),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_is_one_line_that_names_the_shard(tmp_path: Path, lie: str) -> None:
    with pytest.raises(BadData, match=r"00000\.arrow"):
        read_all(LIES[lie](), tmp_path / "00000.arrow")


def test_an_honest_shard_is_read_and_its_rows_are_those_of_the_record(tmp_path: Path) -> None:
    read_all(written(), tmp_path / "00000.arrow")
    with pytest.raises(BadData, match="2 rows, its record says 1"):
        read_all(written(), tmp_path / "00000.arrow", rows=1)


def mutants(path: Path) -> dict[str, int]:
    """How many changed files were read, refused, or did something else."""
    chance, whole, counts = random.Random(SEED), written(), dict.fromkeys(("read", "refused"), 0)
    for _ in range(ROUNDS):
        content = bytearray(whole)
        for _ in range(chance.choice((1, 1, 2, 4))):
            value = chance.choice((0, 1, 2, 255, 2**15, 2**31 - 1, 2**63 - 1, -1, -(2**40), chance.randrange(2**32)))
            size = chance.choice((1, 2, 4, 8))
            at = chance.randrange(0, len(content) - 8, min(size, 4))
            content[at : at + size] = (value % 2 ** (8 * size)).to_bytes(size, "little")
        try:
            read_all(bytes(content), path)
            counts["read"] += 1
        except BadData:
            counts["refused"] += 1
        except Exception as error:
            counts[f"{type(error).__name__}: {error}"] = 1
    return counts


def test_no_changed_byte_crashes_the_reader(tmp_path: Path) -> None:
    def read_changed() -> None:
        counts = mutants(tmp_path / "x.arrow")
        assert set(counts) == {"read", "refused"}, counts
        assert counts["refused"] > 0

    assert exit_code_of(read_changed) == 0

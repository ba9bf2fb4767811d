"""A shard's file and the record that describes it."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from fake_stage import SCHEMA
from xkd_pipeline.tables.shard import ROWS_PER_BATCH, write_shard
from xkd_schemas.cache.manifest import Commit


def columns(rows: int) -> dict[str, Any]:
    return {
        "doc_id": [f"d{n}" for n in range(rows)],
        "values": [np.arange(n % 5, dtype=np.float32) for n in range(rows)],
    }


def test_the_record_describes_every_byte_of_the_file(tmp_path: Path) -> None:
    commit = write_shard(tmp_path, 7, SCHEMA, columns(2 * ROWS_PER_BATCH + 1))
    content = (tmp_path / commit.file).read_bytes()

    assert [b.rows for b in commit.batches] == [ROWS_PER_BATCH, ROWS_PER_BATCH, 1]
    assert (commit.unit, commit.rows, commit.size) == (7, 65, len(content))
    assert commit.sha256 == hashlib.sha256(content).hexdigest()
    assert commit.file == f"00007-{commit.sha256[:12]}.arrow"
    pieces = [content[b.offset : b.offset + b.length] for b in commit.batches]
    assert [b.xxh3 for b in commit.batches] == [xxhash.xxh3_64_hexdigest(piece) for piece in pieces]
    first, last = commit.batches[0], commit.batches[-1]
    assert content[first.offset : last.offset + last.length] == b"".join(pieces)
    frame = content[: first.offset] + content[last.offset + last.length :]
    assert commit.frame_xxh3 == xxhash.xxh3_64_hexdigest(frame)


def test_the_file_is_plain_arrow_and_marked_with_its_unit(tmp_path: Path) -> None:
    commit = write_shard(tmp_path, 7, SCHEMA, columns(40))

    table = pa.ipc.open_file(tmp_path / commit.file).read_all()

    table.validate(full=True)
    assert table.schema.equals(SCHEMA)
    assert table.schema.metadata == {b"unit": b"7"}
    assert table.column("doc_id").to_pylist() == [f"d{n}" for n in range(40)]
    assert table.column("values").to_pylist() == [v.tolist() for v in columns(40)["values"]]


def test_a_shard_without_rows_is_a_file_too(tmp_path: Path) -> None:
    commit = write_shard(tmp_path, 0, SCHEMA, columns(0))

    assert (commit.rows, commit.batches) == (0, ())
    assert pa.ipc.open_file(tmp_path / commit.file).num_record_batches == 0


def test_rejects_are_listed_in_a_file_of_their_own_and_counted_by_reason(tmp_path: Path) -> None:
    rejects = [{"reason": "blank", "line": 3}, {"reason": "bad_json", "line": 5}, {"reason": "blank", "line": 9}]

    commit = write_shard(tmp_path, 1, SCHEMA, columns(2), rejects=rejects)

    assert commit.rejects is not None
    content = (tmp_path / "rejects" / commit.rejects.file).read_bytes()
    assert [json.loads(line) for line in content.splitlines()] == rejects
    assert commit.rejects.sha256 == hashlib.sha256(content).hexdigest()
    assert (commit.rejects.rows, commit.rejects.reasons) == (3, {"bad_json": 1, "blank": 2})


def test_totals_and_unusable_rows_stand_in_the_record(tmp_path: Path) -> None:
    schema = SCHEMA.append(pa.field("status", pa.string(), nullable=False))
    statuses = ["ok", "no_target", "ok", "teacher:cut"]

    commit = write_shard(tmp_path, 0, schema, {**columns(4), "status": statuses}, counts={"tokens": 5})

    assert (commit.unusable, commit.counts) == ((1, 3), {"tokens": 5})
    assert Commit.model_validate_json(commit.model_dump_json()) == commit

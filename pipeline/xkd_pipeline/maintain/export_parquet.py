"""A cache as Parquet files, for tools that do not read Arrow: the same columns, one file for each shard.

Parquet has no bfloat16. Such columns stay the uint16 bits that they are, and every file's key-value metadata names
them under `xkd_bf16` with the sentence that turns them into numbers.
"""

import filecmp
import json
from functools import partial
from pathlib import Path
from typing import Any, Final

import pyarrow.parquet as pq

from xkd_schemas.cache.manifest import to_json
from xkd_schemas.cache.table import Shard, Table, check_cache, sealed_tables
from xkd_schemas.durable_files import disk_errors, own_folder, save_file, sync_folder
from xkd_schemas.errors import UsageError

BF16: Final = "uint16 bits of bfloat16: the float32 whose upper 16 bits they are and whose lower 16 bits are 0"


def export_parquet(root: Path, out: Path) -> dict[str, Any]:
    """Write every sealed table to `out/TABLE/NNNNN.parquet`, all or nothing; each shard is checked as it is read.

    Raises:
        InputMissing: No folder, or no sealed documents table.
        UsageError: `out` is there and neither an empty folder nor the same export.
        BadData: A shard is damaged.
        DiskFailed: No room, or not writable.
    """
    check_cache(root)
    tables = [Table(root, name) for name in sealed_tables(root)]
    names = {f"{t.name}/{unit:05d}.parquet" for t in tables for unit in range(len(t.manifest.commits))}
    names |= {f"{table.name}/manifest.json" for table in tables}
    there = {path.relative_to(out).as_posix() for path in out.rglob("*") if not path.is_dir()}
    if there != names:
        refuse_full(out)
    with disk_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        with own_folder(out.parent, f".tmp-{out.name}-") as temporary:
            written = sum(_write_table(table, temporary) for table in tables)
            if not there or not all(filecmp.cmp(temporary / name, out / name, shallow=False) for name in names):
                refuse_full(out)
                if out.is_dir():
                    out.rmdir()
                temporary.rename(out)
        sync_folder(out.parent)
    return {"parquet": str(out), "tables": len(tables), "bytes": written}


def refuse_full(folder: Path) -> None:
    """Raise UsageError where a folder to be made is there already and holds something, or is a file."""
    if folder.is_symlink() or (folder.exists() and (not folder.is_dir() or any(folder.iterdir()))):
        raise UsageError(f"{folder} exists and is not empty", kept="that folder", fix="name a new folder")


def _write_table(table: Table, out: Path) -> int:
    folder = out.joinpath(*table.name.split("/"))
    folder.mkdir(parents=True)
    size = 0
    for unit, commit in enumerate(table.manifest.commits):
        shard = Shard(table.path(unit), commit)
        path = folder / f"{unit:05d}.parquet"
        save_file(path, partial(_write_parquet, shard))
        size += path.stat().st_size
    (folder / "manifest.json").write_bytes(to_json(table.manifest))
    return size


def _write_parquet(shard: Shard, path: Path) -> None:
    bf16 = [f.name for f in shard.schema if (f.metadata or {}).get(b"codec") == b"bf16"]
    about = {b"xkd_bf16": json.dumps({"columns": bf16, "meaning": BF16}).encode()} if bf16 else {}
    schema = shard.schema.with_metadata({**(shard.schema.metadata or {}), **about})
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for number in range(len(shard.commit.batches)):
            writer.write_batch(shard.batch(number).replace_schema_metadata(schema.metadata))

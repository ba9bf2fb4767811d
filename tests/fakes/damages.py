"""Ways to damage a cache, and what its readers say to it."""

import hashlib
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from xkd_pipeline.maintain.verify import verify
from xkd_schemas.cache.manifest import Commit, Manifest, Plan, read_record, seal_table, to_json
from xkd_schemas.cache.table import Table
from xkd_schemas.durable_files import xxh3_of
from xkd_schemas.errors import XkdError

ROUNDS = int(os.environ.get("XKD_FAULT_ROUNDS", "12"))
SEED = int(os.environ.get("XKD_FAULT_SEED", "20261124"))


def targets(cache: Path) -> list[Path]:
    """Every file whose bytes matter; LOCK holds nothing."""
    return sorted(p for p in cache.rglob("*") if p.is_file() and p.name != "LOCK" and "quarantine" not in p.parts)


def flipped(content: bytes, bit: int) -> bytes:
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def flip(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(flipped(content, 8 * (len(content) // 2)))


def read_all(cache: Path) -> None:
    """What a trainer reads: every column of every row of every table."""
    for name in ("documents", *(f"{p.parent.name}/{p.name}" for p in sorted(cache.glob("[ts]*/*")) if p.is_dir())):
        table = Table(cache, name)
        for at in range(len(table)):
            for column in table.shard(0).schema.names:
                table[at][column]


def outcome(check: Callable[[], object]) -> str:
    """found, silent, or crash: what a check says to damage."""
    try:
        return "found" if check() else "silent"
    except XkdError:
        return "found"
    except Exception as error:
        return f"crash: {type(error).__name__}: {error}"


def flips(cache: Path, count: int, seed: int) -> set[str]:
    """Turn `count` single bits, one at a time, files drawn first: what `verify` says of them.

    Every tenth is read too; a reader may read through a flip in a file that it does not use, but not crash.
    """
    chance = random.Random(seed)
    files = [path for path in targets(cache) if path.stat().st_size]
    said = set()
    for number in range(count):
        path = chance.choice(files)
        content = path.read_bytes()
        path.write_bytes(flipped(content, chance.randrange(8 * len(content))))
        said.add(outcome(lambda: verify(cache, "full")))
        if number % 10 == 0:
            said |= {outcome(lambda: read_all(cache))} - {"silent"}
        path.write_bytes(content)
    return said


def cuts(cache: Path, step: int) -> set[str]:
    """Cut every file at every `step` bytes, and lengthen it by one: what `verify` says of them."""
    said = set()
    for path in targets(cache):
        content = path.read_bytes()
        for damaged in (*(content[:end] for end in range(0, len(content), step)), content + b"\0"):
            path.write_bytes(damaged)
            said.add(outcome(lambda: verify(cache, "full")))
        path.write_bytes(content)
    return said


def resigned(cache: Path, table: str, unit: int, content: bytes) -> Path:
    """Put `content` in place of a shard of the same size, with every digest of the table made right."""
    folder = cache / table
    old, sha256 = read_record(folder / "manifest.json", Manifest).commits[unit], hashlib.sha256(content).hexdigest()
    batches = tuple(
        b.model_copy(update={"xxh3": xxh3_of(content[b.offset : b.offset + b.length])}) for b in old.batches
    )
    frame = content[: old.batches[0].offset] + content[old.batches[-1].offset + old.batches[-1].length :]
    new = {"file": f"{unit:05d}-{sha256[:12]}.arrow", "sha256": sha256, "batches": batches}
    commit = old.model_copy(update={**new, "frame_xxh3": xxh3_of(frame), "size": len(content)})
    (folder / old.file).unlink()
    (folder / commit.file).write_bytes(content)
    (folder / f"commits/{unit:05d}.json").write_bytes(to_json(commit))
    resealed(cache, table, lambda data: data["commits"].__setitem__(unit, commit.model_dump(mode="json")))
    return folder / commit.file


def resealed(cache: Path, table: str, change: Callable[[dict[str, Any]], object]) -> str:
    """Change a manifest as someone would who can compute digests; its root."""
    folder = cache / table
    old = read_record(folder / "manifest.json", Manifest)
    data = old.model_dump(mode="json")
    change(data)
    commits = tuple(Commit.model_validate(record) for record in data["commits"])
    plan = Plan(table=table, spec=data["spec"], units=read_record(folder / "plan.json", Plan).units)
    new = seal_table(plan, commits, data["constants"], data["files"])
    (folder / "manifest.json").write_bytes(to_json(new))
    return new.root

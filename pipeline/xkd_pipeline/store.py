"""A table while it is being made: its plan, its commit records, and the seal at the end.

Only the driver uses this, holding the cache's lock. Workers write shards (shard.py) and return
records; a record counts from the moment it is linked into commits/.
"""

import contextlib
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from xkd_pipeline.card import readme
from xkd_schemas.errors import BadData, Busy, DiskFailed, InputMissing
from xkd_schemas.files import (
    disk_errors,
    inside,
    lock_file,
    make_folder,
    put_if_absent,
    remove,
    rename,
    replace,
    sha256_of,
)
from xkd_schemas.manifest import (
    Commit,
    Manifest,
    Plan,
    Spec,
    Unit,
    is_whole,
    read_record,
    refuse_differences,
    sealed,
    to_json,
)


@contextlib.contextmanager
def locked(root: Path) -> Iterator[None]:
    """Hold the cache for writing; Busy names the process that has it. Freed by the system when we die."""
    descriptor = lock_file(root / "LOCK")
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "another process"
            raise Busy(f"{root} is being written by {holder}", next="wait for it, then run this again") from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"pid {os.getpid()} on {socket.gethostname()}".encode(), 0)
        yield
    finally:
        os.close(descriptor)


class Store:
    """A table's folder: `Store(root, "documents", spec, units)` opens it or begins it.

    Raises:
        Mismatch: The folder was begun with another spec; every differing field is named.
    """

    def __init__(self, root: Path, table: str, spec: Spec, units: tuple[Unit, ...]) -> None:
        self.root = root
        self.folder = inside(root, *table.split("/"))
        plan = Plan(table=table, spec=json.loads(json.dumps(spec)), units=units)
        path = self.folder / "plan.json"
        if (not path.exists() or path.stat().st_size == 0) and not self._records():
            replace(path, to_json(plan))
        self.plan = read_record(path, Plan)
        advice = f"repeat the first command's settings, or write to a new folder than {root}"
        if table != "documents":
            advice = (
                f"repeat the first command's settings, or give this one another --name (now {table.split('/')[-1]})"
            )
        refuse_differences(self.folder, plan.spec, self.plan.spec, advice=advice)
        if plan.units != self.plan.units:
            raise BadData(f"{path} lists other units than this corpus gives", next=advice)

    def _records(self) -> list[Path]:
        return sorted((self.folder / "commits").glob("[0-9]*.json"))

    def commits(self) -> dict[int, Commit]:
        """Units that are done: the record is whole and its shard has the right size and digest.

        What does not verify is moved to quarantine/ and will be made again.
        """
        done: dict[int, Commit] = {}
        for path in self._records():
            try:
                commit = read_record(path, Commit)
                shard = inside(self.folder, commit.file)
                whole = shard.is_file() and shard.stat().st_size == commit.size and sha256_of(shard) == commit.sha256
                if commit.rejects is not None:
                    rejects = inside(self.folder, "rejects", commit.rejects.file)
                    whole = whole and rejects.is_file() and sha256_of(rejects) == commit.rejects.sha256
            except BadData:
                whole = False
            if whole and path.name == f"{commit.unit:05d}.json" and commit.unit < len(self.plan.units):
                done[commit.unit] = commit
            else:
                self._quarantine(path)
        return done

    def _quarantine(self, record: Path) -> None:
        with disk_errors(record):
            folder = self.folder / "quarantine"
            make_folder(folder)
            for path in [record, *self.folder.glob(f"{record.stem}-*.arrow"), self.folder / "manifest.json"]:
                if path.exists():
                    rename(path, folder / path.name)

    def commit(self, record: Commit) -> None:
        """Make one finished unit count."""
        put_if_absent(self.folder / "commits" / f"{record.unit:05d}.json", to_json(record))

    def manifest(self) -> Manifest | None:
        """The sealed manifest; None where it or a file it names is missing or damaged and must be made again."""
        path = self.folder / "manifest.json"
        if not path.exists():
            return None
        try:
            manifest = read_record(path, Manifest)
        except BadData:
            return None
        whole = is_whole(manifest) and all(self._holds(name, digest) for name, digest in manifest.files.items())
        return manifest if whole else None

    def _holds(self, name: str, digest: str) -> bool:
        places = (inside(self.folder, name), inside(self.folder, "tokenizer", name))
        return any(path.is_file() and sha256_of(path) == digest for path in places)

    def seal(self, commits: dict[int, Commit], constants: dict[str, Any], files: dict[str, str]) -> Manifest:
        """Write the manifest once all units are done, and remove files that no record names."""
        ordered = tuple(commits[unit] for unit in range(len(self.plan.units)))
        manifest = sealed(self.plan, ordered, constants, files)
        self._sweep(ordered)
        replace(self.folder / "manifest.json", to_json(manifest))
        self.describe()
        return manifest

    def describe(self) -> None:
        """Bring README.md and SHA256SUMS of the cache up to date; the last run may have died before it could."""
        with disk_errors(self.root):
            for path in self.root.glob(".tmp-*"):
                remove(path)
        _write_root_files(self.root)

    def _sweep(self, commits: tuple[Commit, ...]) -> None:
        shards = {c.file for c in commits}
        rejects = {c.rejects.file for c in commits if c.rejects is not None}
        with disk_errors(self.folder):
            for path in self.folder.glob("[0-9]*.arrow"):
                if path.name not in shards:
                    remove(path)
            for path in (self.folder / "rejects").glob("*.jsonl"):
                if path.name not in rejects:
                    remove(path)
            for folder in (self.folder, self.folder / "commits", self.folder / "rejects"):
                for path in folder.glob(".tmp-*"):
                    remove(path)


def _write_root_files(root: Path) -> None:
    """README.md, so that `load_dataset(root)` works, and SHA256SUMS for `sha256sum -c`."""
    _update(root / "README.md", readme(root).encode())
    skip = {"LOCK", "SHA256SUMS"}
    lines = []
    for path in sorted(p for p in root.rglob("*") if p.is_file()):
        relative = path.relative_to(root)
        if relative.name in skip or relative.name.startswith(".tmp-") or "quarantine" in relative.parts:
            continue
        lines.append(f"{_sum(root, path)}  {relative.as_posix()}\n")
    _update(root / "SHA256SUMS", "".join(lines).encode())


def _update(path: Path, content: bytes) -> None:
    if not path.is_file() or path.read_bytes() != content:
        replace(path, content)


def _sum(root: Path, path: Path) -> str:
    """sha256 of a file; a shard's stands in its name's record already and is not read again."""
    if path.suffix == ".arrow":
        with contextlib.suppress(InputMissing, BadData):  # hashed below
            commit = read_record(path.parent / "commits" / f"{path.name[:5]}.json", Commit)
            if commit.file == path.name:
                return commit.sha256
    try:
        return sha256_of(path)
    except OSError as error:
        raise DiskFailed(f"{path.relative_to(root)}: {error.strerror}") from error

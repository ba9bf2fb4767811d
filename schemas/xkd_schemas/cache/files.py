"""Which files a cache may hold: plain files that its manifests name, and no link to anything outside."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from xkd_schemas.cache.manifest import Manifest
from xkd_schemas.errors import Refused

KINDS: Final = ("teachers", "signals", "students")
"""Folders of a cache that hold table folders."""
ROOT_FILES: Final = ("README.md", "SHA256SUMS", "LOCK")

_LEFT = re.compile(r"plan\.json|commits/\d{5}\.json|(rejects/)?\d{5}-[0-9a-f]{12}\.(arrow|jsonl)")
"""Files of units that may lie in a table without its manifest naming them: of a worker
that came too late. No command reads them; gc removes them."""


def files_below(folder: Path) -> Iterator[Path]:
    """Every file below a folder, at any depth, sorted; nothing where there is no such folder.

    Raises:
        Refused: A link, a pipe or a device is among them.
    """
    try:
        with os.scandir(folder) as entries:
            ordered = sorted(entries, key=lambda entry: entry.name)
    except (FileNotFoundError, NotADirectoryError):
        return
    for entry in ordered:
        if entry.is_symlink():
            raise Refused(f"{entry.path} is a symbolic link", fix="delete it, or copy what it names into the cache")
        if entry.is_dir():
            yield from files_below(Path(entry.path))
        elif entry.is_file():
            yield Path(entry.path)
        else:
            raise Refused(f"{entry.path} is neither a file nor a folder", fix="delete it")


def refuse_links(folder: Path) -> None:
    """Raise Refused, which names it, where a link is anywhere below the folder: nothing may be followed out of it."""
    for _ in files_below(folder):
        pass


def outside_tables(root: Path) -> Iterator[Path]:
    """Entries of a cache that belong to no table; hidden ones are left alone."""
    yield from (path for path in _visible(root) if path.name not in {*KINDS, "documents", *ROOT_FILES})
    yield from (path for kind in KINDS for path in _visible(root / kind) if not path.is_dir())


def _visible(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*") if not path.name.startswith("."))


def unnamed_files(folder: Path, manifest: Manifest) -> Iterator[Path]:
    """Files of a table's folder that its manifest does not name; hidden ones and quarantine are left alone.

    Raises:
        Refused: A link is among them.
    """
    named = {"plan.json", "manifest.json", *manifest.files, *(f"tokenizer/{name}" for name in manifest.files)}
    for number, commit in enumerate(manifest.commits):
        named |= {f"commits/{number:05d}.json", commit.file}
        named |= {f"rejects/{commit.rejects.file}"} if commit.rejects else set()
    for path in files_below(folder):
        parts = path.relative_to(folder).parts
        hidden = any(part.startswith(".") for part in parts)
        if parts[0] != "quarantine" and not hidden and "/".join(parts) not in named:
            yield path


def refuse_unnamed(root: Path, folder: Path, manifest: Manifest) -> None:
    """Raise Refused where a cache holds a file that no manifest names, beside its tables or in the one at `folder`."""
    strange = list(outside_tables(root))
    strange += [p for p in unnamed_files(folder, manifest) if not _LEFT.fullmatch(p.relative_to(folder).as_posix())]
    if strange:
        raise Refused(
            f"{strange[0]}: no manifest names it" + (f", nor {len(strange) - 1} more files" if strange[1:] else ""),
            kept="the cache as it is",
            fix="move it out of the cache, or copy the cache again from where it came",
        )

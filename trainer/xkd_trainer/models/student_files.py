"""Files of a model folder: tensors, and `xkd.json`, which says where a finished student came from.

`xkd.json` holds the digest of every file beside it.
"""

import contextlib
import errno
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from xkd_schemas.cache.manifest import OWN
from xkd_schemas.durable_files import digest, sha256_of
from xkd_schemas.errors import BadData

PROVENANCE = "xkd.json"


def check_student(folder: Path, *, weights: bool) -> None:
    """Compare the files of a finished student with their digests; without `weights` all but safetensors.

    A folder without `xkd.json` was not made here, or is not finished, and is left alone. BadData where a file is not
    there or not as it was saved.
    """
    for name, expected in read_provenance(folder).get("files", {}).items():
        path = folder / name
        if path.suffix == ".safetensors" and not weights:
            continue
        if not path.is_file() or sha256_of(path) != expected:
            what = "does not match its digest" if path.is_file() else "is not there"
            raise BadData(f"{path} {what} in {PROVENANCE}", fix=_FIX.format(folder=folder))


_FIX = "delete {folder} and train again; if you changed it yourself, delete " + PROVENANCE


def read_provenance(folder: Path) -> dict[str, Any]:
    """What `xkd.json` says; nothing where there is none; BadData where it is damaged."""
    path = folder / PROVENANCE
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_bytes())
        if data.pop(OWN) == digest(data):
            return dict(data)
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError):
        pass
    raise BadData(f"{path} does not match its own digest", fix=_FIX.format(folder=folder))


@contextlib.contextmanager
def tensor_errors() -> Iterator[None]:
    """Turn what safetensors raises while it writes into an OSError with the system's number."""
    try:
        yield
    except SafetensorError as error:
        found = re.search(r"\(os error (\d+)\)", str(error))
        number = int(found[1]) if found else errno.EIO
        raise OSError(number, os.strerror(number) if found else str(error)) from error


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a safetensors file; OSError where the disk is full or fails."""
    with tensor_errors():
        save_file(dict(tensors), path)

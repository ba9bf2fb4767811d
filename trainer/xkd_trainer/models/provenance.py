"""Where a finished student came from: `xkd.json`, which holds the digest of every file beside it."""

import json
from pathlib import Path
from typing import Any

from xkd_schemas.cache.manifest import OWN
from xkd_schemas.digests import digest
from xkd_schemas.durable_files import sha256_of
from xkd_schemas.errors import BadData

PROVENANCE = "xkd.json"


def check_student(folder: Path, *, weights: bool) -> None:
    """Compare the files of a finished student with their digests; without `weights` all but safetensors.

    A folder without `xkd.json` was not made here, or is not finished, and is left alone.

    Raises:
        BadData: A file is not there or not as it was saved.
    """
    for name, expected in _provenance(folder).get("files", {}).items():
        path = folder / name
        if path.suffix == ".safetensors" and not weights:
            continue
        if not path.is_file() or sha256_of(path) != expected:
            what = "does not match its digest" if path.is_file() else "is not there"
            raise BadData(f"{path} {what} in {PROVENANCE}", fix=_AGAIN.format(folder=folder))


_AGAIN = "delete {folder} and train again; if you changed it yourself, delete " + PROVENANCE


def _provenance(folder: Path) -> dict[str, Any]:
    """What `xkd.json` says; nothing where there is none.

    Raises:
        BadData: It is damaged.
    """
    path = folder / PROVENANCE
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_bytes())
        if data.pop(OWN) == digest(data):
            return dict(data)
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError):
        pass
    raise BadData(f"{path} does not match its own digest", fix=_AGAIN.format(folder=folder))

"""What a worker on another machine must find there before it may write a byte."""

import importlib.metadata
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from xkd_pipeline.workers.contract import KEPT
from xkd_schemas.errors import InputMissing, Mismatch

SAME: Final = ("numpy", "pyarrow", "spacy", "tokenizers", "torch", "transformers")
"""Packages that results depend on, which must be the same everywhere."""
LOOK_SECONDS: Final = 5.0
"""How long a network file system may take to show a new file."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """What a worker on another machine must find there."""

    paths: tuple[Path, ...]
    mark: Path
    """A file that was written just now: a folder without it has the same name and is another one."""
    versions: dict[str, str]

    def check(self) -> None:
        """Raise InputMissing or Mismatch that names this machine and what is not as it is on the driver's."""
        host = socket.gethostname()
        shared = f"put it on storage that all machines see at the same path, or leave {host} out of the cluster"
        for path in self.paths:
            if not path.exists():
                raise InputMissing(f"worker on {host}: {path} is not there", fix=shared)
        end = time.monotonic() + LOOK_SECONDS
        while not self.mark.exists():
            if time.monotonic() > end:
                raise InputMissing(f"worker on {host}: {self.mark.parent} is another folder there", fix=shared)
            time.sleep(0.2)
        for name, version in versions().items():
            if self.versions.get(name, version) != version:
                raise Mismatch(
                    f"worker on {host} has {name} {version}, this process {self.versions[name]}",
                    kept=KEPT,
                    fix=f"install {name} {self.versions[name]} on {host}",
                )


def versions() -> dict[str, str]:
    """Versions of the packages of SAME that are installed, without the build (+cpu, +cu130)."""
    found = {}
    for name in SAME:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name).partition("+")[0]
    return found

"""Tensors on disk: where safetensors fails to write it raises an error of its own; here it is an OSError."""

import contextlib
import errno
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


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

"""A copy of this process that may die."""

import os
from collections.abc import Callable

from xkd_schemas.errors import DiskFailed


def in_a_copy(job: Callable[[], object]) -> int:
    """Fork and do it; the status as os.waitpid gives it, of exit 0, 74 for a failing disk, or 1."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            job()
            code = 0
        except DiskFailed as error:
            code = error.exit_code
        finally:
            os._exit(code)
    return os.waitpid(child, 0)[1]

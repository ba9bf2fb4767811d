"""Every error a user can cause, with its exit code; README.md lists the codes.

What pydantic finds wrong with a run file or with settings is one of them, too.
"""

import difflib
from collections.abc import Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from pydantic import BaseModel, ValidationError


class XkdError(Exception):
    """What went wrong and where, what was kept, what to type next; printed as one line without traceback."""

    exit_code: ClassVar[int] = 2
    shared = False  # every process of a run ends with it

    def __init_subclass__(cls, *, exit_code: int = 0) -> None:
        cls.exit_code = exit_code or cls.exit_code

    def __init__(self, what: str, *, kept: str = "", fix: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.kept = kept
        self.fix = fix

    def __str__(self) -> str:
        parts = [self.what.rstrip(".") + "."]
        if self.kept:
            parts.append(f"Kept: {self.kept.rstrip('.')}.")
        if self.fix:
            parts.append(f"Next: {self.fix}")
        return " ".join(" ".join(parts).split())

    def __reduce__(self) -> tuple[object, ...]:  # so that it survives the way back from a worker process
        return partial(type(self), kept=self.kept, fix=self.fix), (self.what,)


class UsageError(XkdError):
    """A flag, a key of the run file, a value or a name is wrong."""


class BadData(XkdError, exit_code=65):
    """Data was found and cannot be used: corrupt, too many rejects, nothing left."""


class InputMissing(XkdError, exit_code=66):
    """A file, folder, model or parser that was named is not there or cannot be read."""


class WorkersGone(XkdError, exit_code=69):
    """The worker pool is gone; running the same command again resumes."""


class OutOfMemory(XkdError, exit_code=71):
    """Memory ran out and no smaller step is left."""


class DiskFailed(XkdError, exit_code=74):
    """The disk is full, read-only or failing."""


class Busy(XkdError, exit_code=75):
    """Another process is writing to this cache."""


class NonFinite(XkdError, exit_code=76):
    """A loss or a gradient is NaN or infinite."""


class Refused(XkdError, exit_code=77):
    """Refused by the security rules."""


class Mismatch(XkdError, exit_code=78):
    """Two things that must be the same are not; the message shows both."""


class Interrupted(XkdError, exit_code=130):
    """Ctrl-C or SIGINT."""


class Terminated(XkdError, exit_code=143):
    """SIGTERM or SIGUSR1, as a scheduler or a system that shuts down sends it."""


def run_error(path: str, typed: Mapping[str, str], error: "ValidationError", model: "type[BaseModel]") -> UsageError:
    """The first mistake in a run file, which begins with the flag, `--set` or file that made it.

    `typed` says which flag set a key, `path` names the file, and the keys that `model` has are suggested.
    """
    first = error.errors()[0]
    dotted = ".".join(str(part) for part in first["loc"])
    said = [name for key, name in typed.items() if f"{dotted}.".startswith(f"{key}.") or key.startswith(f"{dotted}.")]
    where = said[-1] if said else path
    if first["type"] == "extra_forbidden":
        *sections, key = map(str, first["loc"])
        section: Any = model
        for name in sections:
            section = section.model_fields[name].annotation
        return UsageError(f"{where}: {dotted!r} is not a key", fix=_suggest(key, section.model_fields))
    name = dotted if where in ("--set", "--vary", path) else where
    what = f"{first['msg'].removeprefix('Value error, ')}, found {first['input']!r}"
    return UsageError(f"{where}: {what}" if name == where else f"{where}: {dotted}: {what}", fix=f"change {name}")


def settings_error(loss: str, error: "ValidationError", fields: Iterable[str]) -> UsageError:
    """The first mistake in the settings of a loss; `fields` are those that it has."""
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return UsageError(f"losses.{loss}: {key!r} is not a setting", fix=_suggest(key, fields))
    return UsageError(f"losses.{loss}.{key}: {first['msg']}, found {first['input']!r}", fix=f"change {key}")


def _suggest(key: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(key, list(known), n=1)
    return f"did you mean {near[0]!r}?" if near else f"use one of: {', '.join(known)}"

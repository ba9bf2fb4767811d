"""Every error a user can cause, with its exit code; README.md lists the codes."""

from typing import ClassVar


class XkdError(Exception):
    """What went wrong and where, what was kept, what to type next; printed as one line without traceback."""

    exit_code: ClassVar[int] = 2

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
        return _rebuilt, (type(self), self.what, self.kept, self.fix)


def _rebuilt(kind: type[XkdError], what: str, kept: str, fix: str) -> XkdError:
    return kind(what, kept=kept, fix=fix)


class UsageError(XkdError):
    """A flag, a key of the run file, a value or a name is wrong."""


class BadData(XkdError):
    """Data was found and cannot be used: corrupt, too many rejects, nothing left."""

    exit_code = 65


class InputMissing(XkdError):
    """A file, folder, model or parser that was named is not there or cannot be read."""

    exit_code = 66


class WorkersGone(XkdError):
    """The worker pool is gone; running the same command again resumes."""

    exit_code = 69


class OutOfMemory(XkdError):
    """Memory ran out and no smaller step is left."""

    exit_code = 71


class DiskFailed(XkdError):
    """The disk is full, read-only or failing."""

    exit_code = 74


class Busy(XkdError):
    """Another process is writing to this cache."""

    exit_code = 75


class NonFinite(XkdError):
    """A loss or a gradient is NaN or infinite."""

    exit_code = 76


class Refused(XkdError):
    """Refused by the security rules."""

    exit_code = 77


class Mismatch(XkdError):
    """Two things that must be the same are not; the message shows both."""

    exit_code = 78


class Interrupted(XkdError):
    """Ctrl-C or SIGINT."""

    exit_code = 130


class Terminated(XkdError):
    """SIGTERM, as a scheduler or a system that shuts down sends it."""

    exit_code = 143

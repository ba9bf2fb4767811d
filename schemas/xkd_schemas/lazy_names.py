"""Public names of a package that are imported when they are first used, so that importing the package stays cheap."""

import pkgutil
from collections.abc import Callable, Mapping
from typing import Any


def lazy_names(package: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """A `__getattr__` for a package: each name and the `module:attribute` that it stands for.

    >>> lazy_names("math2", {"root": "math:sqrt"})("root")(9.0)
    3.0
    """

    def find(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return pkgutil.resolve_name(homes[name])

    return find

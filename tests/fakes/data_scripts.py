"""The programs of data/, which lie in no package."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

DATA = Path(__file__).parents[2] / "data"


def load_script(name: str) -> ModuleType:
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, DATA / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]

"""Run benchmarks and print their ratios: python -m benchmarks [NAME ...] [--quick] [--json] [--demo FOLDER].

The exit code is 0 whether bars are met or not, and 1 if a benchmark crashed.
"""

import argparse
import importlib
import json
import os
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Final

for _name in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS", "RAYON_NUM_THREADS"):
    os.environ[_name] = "1"  # CPU time of a spinning thread is no work
os.environ["TOKENIZERS_PARALLELISM"] = "false"

NAMES: Final = (
    "capture", "alignment", "spacy", "step", "memory", "softdtw", "kl", "signals", "size", "small", "cost", "reader",
    "start", "train", "commands", "long_documents", "plan", "streamed",
)  # fmt: skip
"""Modules bench_NAME of this package; each has run(Options) -> list of results."""
PARTS: Final = ("teacher", "tokenizer", "cache")


def main(argv: Sequence[str] | None = None) -> int:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(NAMES)}; all if none is given")
    parser.add_argument("--quick", action="store_true", help="small sizes, few repeats; bars do not apply to them")
    parser.add_argument("--json", action="store_true", help="one JSON object a row")
    parser.add_argument("--demo", type=Path, help="folder with teacher/, tokenizer/ and cache/; default: demo")
    arguments = parser.parse_args(argv)
    unknown = sorted(set(arguments.names) - set(NAMES))
    if unknown:
        parser.error(f"{unknown[0]!r} is no benchmark; there are {', '.join(NAMES)}")
    demo = arguments.demo or Path("demo")
    complete = all((demo / part).is_dir() for part in PARTS)
    if arguments.demo and not complete:
        parser.error(f"{demo} does not hold {', '.join(PARTS)}; make demo makes them")
    return _run(arguments.names or NAMES, demo if complete else None, quick=arguments.quick, as_json=arguments.json)


def _run(names: Sequence[str], demo: Path | None, *, quick: bool, as_json: bool) -> int:
    import torch

    from benchmarks.measure import Options, table
    from benchmarks.measure import as_json as row_as_json

    torch.set_num_threads(1)
    crashed = False
    if not as_json:
        models = f"models and cache of {demo}" if demo else "no demo here: random models and a cache made for this run"
        print(f"CPU time of one thread; {models}{'; quick: small sizes, not to be quoted' if quick else ''}")
    for name in names:
        with tempfile.TemporaryDirectory(prefix="xkd-bench-", dir=_memory_folder()) as scratch:
            options = Options(quick=quick, demo=demo, scratch=Path(scratch), repeats=2 if quick else 7)
            try:
                results = importlib.import_module(f"benchmarks.bench_{name}").run(options)
            except Exception:
                crashed = True
                print(f"{name} crashed:\n{traceback.format_exc()}", file=sys.stderr)
                continue
        if as_json:
            print("\n".join(json.dumps(row_as_json(name, result)) for result in results), flush=True)
        else:
            print(f"\n{name}\n{table(results)}", flush=True)
    return int(crashed)


def _memory_folder() -> str | None:
    """A memory-backed folder, or None for the system's temporary one."""
    shared = Path("/dev/shm")
    return str(shared) if shared.is_dir() and os.access(shared, os.W_OK) else None


if __name__ == "__main__":
    sys.exit(main())

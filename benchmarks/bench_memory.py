"""Peak memory of training on a cache and on one eight times as large: it should follow the batch, not the cache.

Training runs in a process of its own.
"""

import shutil
from pathlib import Path

from benchmarks.measure import Options, Result, in_subprocess, memory, peak_bytes
from benchmarks.pair import Pair, pair_of
from xkd_pipeline.tables.shard import write_shard
from xkd_pipeline.tables.writer import Store
from xkd_schemas.cache.manifest import Commit, Unit
from xkd_schemas.cache.table import Table, names_in
from xkd_trainer.training.loop import train

TIMES = 8
STEPS = 3
ALL = "mta+sra+dwa"


def run(options: Options) -> list[Result]:
    """Three steps of sixteen documents on one shard, and on eight copies of it."""
    pair = pair_of(options)
    caches = {times: repeated(pair.cache, options.scratch / f"cache-{times}", times) for times in (1, TIMES)}
    sizes = {times: sum(p.stat().st_size for p in cache.rglob("*.arrow")) for times, cache in caches.items()}
    peaks: dict[int, float] = {}
    for times, cache in caches.items():
        out = options.scratch / f"out-{times}"
        found = [
            in_subprocess(peak_of_training, cache, pair.student, pair.tokenizer, pair.template, f"{out}-{n}")
            for n in range(options.size(2, 1))
        ]
        peaks[times] = min(found)
    mib = {times: size / 2**20 for times, size in sizes.items()}
    what = f"peak of {STEPS} steps on a cache of {mib[TIMES]:.0f} MiB / on one of {mib[1]:.0f} MiB"
    return [memory(what, peaks[TIMES], peaks[1], bar=1.1)]


def repeated(source: Path, target: Path, times: int) -> Path:
    """A cache of copies of the first shard of another one's: of its first student, and of that one's teacher."""
    roots = {"documents": _repeat(source, target, "documents", times, {})}
    student = names_in(source, "students")[0]
    teacher = Table(source, f"students/{student}").manifest.spec["teacher"]
    for kind, name in (("teachers", teacher), ("students", student)):
        changed = {"documents": roots["documents"]}
        if kind == "students":
            changed["teacher_root"] = roots["teachers"]
        roots[kind] = _repeat(source, target, f"{kind}/{name}", times, changed)
    return target


def _repeat(source: Path, target: Path, name: str, times: int, changed: dict[str, str]) -> str:
    """Write one table; its root."""
    old = Table(source, name)
    rows = old.manifest.commits[0].rows
    units = tuple(Unit(source="copies", first=rows * n, rows=rows) for n in range(times))
    store = Store(target, name, {**old.manifest.spec, **changed}, units)
    shard = old.shard(0)
    columns = {f.name: [shard.row(i)[f.name] for i in range(rows)] for f in shard.schema}
    counts = old.manifest.commits[0].counts
    commits: dict[int, Commit] = {}
    for unit in range(times):
        commits[unit] = write_shard(store.folder, unit, shard.schema, columns, counts=counts)
        store.commit(commits[unit])
    for path in old.folder.iterdir():
        if path.name == "tokenizer":
            shutil.copytree(path, store.folder / path.name)
        elif path.suffix == ".safetensors":
            shutil.copy(path, store.folder / path.name)
    return store.seal(commits, old.manifest.constants, old.manifest.files).root


def peak_of_training(cache: str, student: str, tokenizer: str, template: str, out: str) -> int:
    """Train; the peak."""
    pair = Pair(teacher="", student=student, tokenizer=tokenizer, cache=Path(cache), template=template)
    train(pair.run_file(ALL, out=Path(out), steps=STEPS), quiet=True)
    return peak_bytes()

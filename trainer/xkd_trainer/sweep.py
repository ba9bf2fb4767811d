"""One cache, many students: a grid of runs, with cross-entropy as the control, in this process or on a Ray cluster.

    OUT/loss=mta+sra,lr=0.001,seed=0/  a run as xkd-train makes it; its values are its name
    OUT/sweep.json  sweep.md  sweep.html  one row for all seeds of the same values

The first row is cross-entropy with as many steps as the others, the last with as many as take the others' time.
"""

import gc
import importlib
import itertools
import json
import os
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from dataclasses import replace as replace_fields
from pathlib import Path
from typing import Any, Final

import torch
from accelerate.state import AcceleratorState

from xkd_schemas.config import RunConfig, TrainSection, change_values, toml_value
from xkd_schemas.console import note
from xkd_schemas.durable_files import digest, hold_lock, replace
from xkd_schemas.errors import UsageError, WorkersGone, XkdError
from xkd_trainer.losses.registry import parse_loss
from xkd_trainer.models.loading import short
from xkd_trainer.reports import write_report
from xkd_trainer.run_folder import read_run
from xkd_trainer.training.loop import train

LOSS, SEED, STEPS = "train.loss", "train.seed", "train.steps"
HEAD: Final = ("run", "seeds", "steps", "bits per byte", "last loss", "seconds per run", "failed")
Values = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """One run of a sweep."""

    name: str
    row: str  # name of its row: without the seed
    run: RunConfig


@dataclass(kw_only=True)
class Ended:
    """How one run of a sweep ended."""

    cell: Cell
    steps: int = 0
    loss: float | None = None
    bits_per_byte: float | None = None
    seconds: float = 0.0  # of all its steps, by the median step
    error: Exception | None = None


def sweep(run: RunConfig, vary: Sequence[str], **options: Any) -> dict[str, Any]:
    """Train every combination; `options` are those of `train`. One failure does not end it.

    Returns:
        rows, runs and remarks, which are in OUT/sweep.json too, and `failures`, (name, error) of each run that failed.

    Raises:
        UsageError: A key or value is wrong; nothing was trained.
        WorkersGone: There is no cluster at `ray_address`.
    """
    if not run.train.out:
        raise UsageError("no output folder is named", fix="--out FOLDER")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("a sweep trains in one process", fix="start it without accelerate launch")
    out, varied = Path(run.train.out), parse_vary(vary)
    control, grid = make_cells(run, varied)
    for cell in grid:
        parse_loss(cell.run.train.loss)
    with hold_lock(out):
        done = _train_all([*control, *grid], run, options)
        first, others = done[: len(control)], done[len(control) :]
        steps, remarks = steps_in_equal_time(first, others), []
        last = _train_all(make_control(run, varied, steps), run, options) if steps else []
        if not steps:
            remarks = ["no control of equal time: the time of cross-entropy or that of the others is not known"]
        return _write(out, [*first, *others, *last], remarks)


def parse_vary(texts: Sequence[str]) -> dict[str, list[Any]]:
    """Values by key. Values are read as those of --set; commas are between them, or they are a TOML list.

    >>> parse_vary(["loss=ce,mta+sra", "train.lr=[1e-3]", "seed=0,1"])
    {'train.loss': ['ce', 'mta+sra'], 'train.lr': [0.001], 'train.seed': [0, 1]}
    """
    found: dict[str, list[Any]] = {}
    for text in texts:
        key, _, value = (part.strip() for part in text.partition("="))
        key = f"train.{key}" if key in TrainSection.model_fields else key
        listed = toml_value(value)
        values = listed if isinstance(listed, list) else [toml_value(v.strip()) for v in value.split(",") if v.strip()]
        if not values or key == "train.out":
            raise UsageError(
                f"--vary {text}: not KEY=VALUE,VALUE of the run file", fix="e.g. --vary train.lr=1e-3,1e-4"
            )
        found[key] = [*found.get(key, []), *(v for v in values if v not in found.get(key, []))]
    return found


def make_cells(run: RunConfig, varied: Mapping[str, list[Any]]) -> tuple[list[Cell], list[Cell]]:
    """The control of equal steps, a run for each seed, and all combinations that are not the same as it."""
    control = make_control(run, varied, 0)
    taken = {cell.name for cell in control}
    cells = [_cell(run, varied, dict(zip(varied, v, strict=True))) for v in itertools.product(*varied.values())]
    return control, [cell for cell in cells if cell.name not in taken]


def make_control(run: RunConfig, varied: Mapping[str, list[Any]], steps: int) -> list[Cell]:
    """Cross-entropy with the run file's own values, a run for each seed; 0 steps are those of the run file."""
    more, equal = ({STEPS: steps}, "time") if steps else ({}, "steps")
    cells = [_cell(run, varied, {LOSS: "ce", SEED: seed, **more}) for seed in varied.get(SEED, [run.train.seed])]
    return [replace_fields(cell, row=f"{cell.row} (control of equal {equal})") for cell in cells]


def _cell(run: RunConfig, varied: Mapping[str, list[Any]], values: Values) -> Cell:
    changed = change_values(run, values, "--vary")
    keys = dict.fromkeys((LOSS, *varied, *({STEPS} & set(values))))
    shown = {key: _value_of(changed, key) for key in keys}
    seed = {SEED: shown.pop(SEED)} if SEED in shown else {}
    row, name = _name(shown), _name(shown | seed)
    folder = re.sub(r"[^A-Za-z0-9=+.,_-]", "-", name)
    if folder != name or len(folder) > 120:
        folder = f"{folder[:100]}-{digest(name)[:8]}"
    out = Path(run.train.out) / folder
    return Cell(folder, row, change_values(changed, {"train.out": str(out)}, "--vary"))


def _name(values: Values) -> str:
    lasts = [key.rpartition(".")[2] for key in values]
    names = (last if lasts.count(last) == 1 else key for key, last in zip(values, lasts, strict=True))
    return ",".join(f"{name}={value}" for name, value in zip(names, values.values(), strict=True))


def _value_of(run: Any, dotted: str) -> Any:
    for part in dotted.split("."):
        run = run.get(part) if isinstance(run, dict) else getattr(run, part, None)
    return run


def _train_all(cells: Sequence[Cell], run: RunConfig, options: Mapping[str, Any]) -> list[Ended]:
    """One after another, or as many at once as the cluster has room for."""
    if run.ray_address is None:
        return [_train(cell, options) for cell in _count(cells)]
    import ray
    from ray.exceptions import RayError

    modules = [
        str(Path(str(importlib.import_module(name).__file__)).parent) for name in ("xkd_schemas", "xkd_trainer")
    ]
    try:
        ray.init(run.ray_address, runtime_env={"py_modules": modules}, log_to_driver=False, logging_level="error")
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise WorkersGone(
            f"no Ray cluster at {run.ray_address}: {short(error)}",
            fix="start it (docs/cluster.md), or leave the address out",
        ) from error
    try:
        task = ray.remote(num_cpus=1, num_gpus=run.gpus_per_worker, max_retries=0)(_train_there)
        references = [task.remote(cell, options, str(Path.cwd())) for cell in cells]
        ended = []
        for cell, reference in zip(_count(cells), references, strict=True):
            try:
                ended.append(ray.get(reference))
            except RayError as error:
                ended.append(Ended(cell=cell, error=WorkersGone(f"its worker on Ray ended: {short(error)}")))
        return ended
    finally:
        ray.shutdown()


def _train_there(cell: Cell, options: Mapping[str, Any], folder: str) -> Ended:
    os.chdir(folder)  # the cache and the output are on storage that all machines see
    return _train(cell, options)


def _count(cells: Sequence[Cell]) -> Iterator[Cell]:
    for number, cell in enumerate(cells, start=1):
        note(f"{number} of {len(cells)}: {cell.name}")
        yield cell


def _train(cell: Cell, options: Mapping[str, Any]) -> Ended:
    """Train a cell, or find it finished; whatever goes wrong in it is its own."""
    try:
        trained = train(cell.run, quiet=True, **options)
    except Exception as error:  # also of other people's code: the next run may be a smaller one
        return Ended(cell=cell, error=error)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)  # the next may have another precision
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    seen, bits = read_run(trained.out), trained.evaluation.get("bits_per_byte")
    loss = seen.metrics[-1]["loss"] if seen.metrics else None
    seconds = seen.seconds_per_step * trained.steps
    return Ended(cell=cell, steps=trained.steps, loss=loss, bits_per_byte=bits, seconds=seconds)


def steps_in_equal_time(control: Sequence[Ended], others: Sequence[Ended]) -> int:
    """Steps of cross-entropy that take as long as the other losses' runs do on average; 0 where that is not known."""
    times = [e.seconds for e in others if e.error is None and e.cell.run.train.loss != "ce" and e.seconds]
    steps, seconds = sum(e.steps for e in control), sum(e.seconds for e in control)
    return max(1, round(statistics.mean(times) * steps / seconds)) if times and seconds else 0


def _write(out: Path, ended: Sequence[Ended], remarks: list[str]) -> dict[str, Any]:
    groups: dict[str, list[Ended]] = {}
    for one in ended:
        groups.setdefault(one.cell.row, []).append(one)
    rows = [summarise(name, group) for name, group in groups.items()]
    failures = [(e.cell.name, e.error) for e in ended if e.error is not None]
    remarks = [*remarks, *(f"{name} failed: {error}" for name, error in failures)]
    lines = [[_show(row[name]) for name in HEAD] for row in rows]
    runs = [
        {"run": e.cell.name, "steps": e.steps, "bits_per_byte": e.bits_per_byte, "loss": e.loss, "seconds": e.seconds,
         "error": str(e.error or "")}
        for e in ended
    ]  # fmt: skip
    result = {"rows": rows, "runs": runs, "remarks": remarks}
    replace(out / "sweep.json", (json.dumps(result, indent=1) + "\n").encode())
    texts = [" | ".join(cell.replace("|", "\\|") for cell in line) for line in (HEAD, ["---"] * len(HEAD), *lines)]
    replace(out / "sweep.md", "".join(f"| {text} |\n" for text in texts).encode() + "\n".join(["", *remarks]).encode())
    table = {"title": "Sweep", "head": HEAD, "rows": lines, "remarks": remarks}
    seen = [path for e in ended if (path := Path(e.cell.run.train.out) / "metrics.jsonl").is_file()]
    write_report([path.parent for path in seen], out / "sweep.html", table)
    return {**result, "failures": failures}


def summarise(row: str, ended: Sequence[Ended]) -> dict[str, Any]:
    """One row of the table: mean and standard deviation over the seeds that were finished."""
    good = [one for one in ended if one.error is None]

    def spread(values: Sequence[float | None]) -> dict[str, float] | None:
        known = [value for value in values if value is not None]
        return (
            {"mean": statistics.mean(known), "std": statistics.stdev(known) if known[1:] else 0.0} if known else None
        )

    return {
        "run": row, "seeds": len(good), "steps": spread([one.steps for one in good]),
        "bits per byte": spread([one.bits_per_byte for one in good]), "last loss": spread([one.loss for one in good]),
        "seconds per run": spread([one.seconds for one in good]), "failed": len(ended) - len(good),
    }  # fmt: skip


def _show(value: Any) -> str:
    """A cell of the table.

    >>> _show({"mean": 2.0, "std": 0.25}), _show({"mean": 40, "std": 0.0}), _show(None), _show(3)
    ('2 ± 0.25', '40', '', '3')
    """
    if isinstance(value, dict):
        return f"{value['mean']:.5g}" + (f" ± {value['std']:.2g}" if value["std"] else "")
    return "" if value is None else str(value)


def failure_of(result: Mapping[str, Any]) -> XkdError | None:
    """What the command ends with where runs failed."""
    failures = result["failures"]
    if not failures:
        return None
    name, error = failures[0]
    kind = type(error) if isinstance(error, XkdError) else XkdError
    what = f"{len(failures)} of {len(result['runs'])} runs failed; {name}: {getattr(error, 'what', error)}"
    return kind(what, kept="the other runs and the table", fix="the same command trains what is not finished")

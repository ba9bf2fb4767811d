"""Make one table: what is there is kept, what is missing is made, and the whole is sealed."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from xkd_pipeline.tables.writer import Store
from xkd_pipeline.workers.contract import Stage, Workers
from xkd_pipeline.workers.scheduler import make_shards
from xkd_schemas.cache.manifest import Commit, Manifest
from xkd_schemas.console import tell_kept, warn
from xkd_schemas.progress import Progress

Finish = Callable[[Sequence[Commit]], tuple[dict[str, Any], dict[str, str]]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Built:
    """A sealed table, with the number of shards made now and of those that were there already."""

    manifest: Manifest
    made: int
    kept: int
    seconds: float = 0.0  # that making them took, with the start of workers
    tokens: int = 0  # in the shards made now


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What one stage did, for people and for --json."""

    line: str
    values: dict[str, Any]


def build(
    store: Store,
    stage: Stage,
    jobs: Callable[[Sequence[int]], Iterable[Any]],
    workers: Workers,
    *,
    watch: Callable[[Sequence[Commit]], None] = lambda _commits: None,
    finish: Finish = lambda _commits: ({}, {}),
) -> Built:
    """Make the shards that are not there yet, then seal.

    `jobs` gives the jobs for the missing shards, lazily and in order. `watch` sees all records after each new one, and
    raises to stop, e.g. on too many rejects. `finish` turns all records into the manifest's constants and further
    files (name -> sha256).
    """
    manifest = store.manifest()  # before bad shards are quarantined, and it with them
    done = store.commits()
    kept = len(done)
    missing = [unit for unit in range(len(store.plan.units)) if unit not in done]
    watch(list(done.values()))
    if manifest is not None and not missing and list(manifest.commits) == [done[n].bound for n in sorted(done)]:
        store.describe()
        return Built(manifest=manifest, made=0, kept=kept)
    start = time.monotonic()
    if missing:
        kinds = {commit.made_on for commit in done.values() if commit.made_on}
        rows = {unit: store.plan.units[unit].rows for unit in missing}
        with Progress(store.plan.table, sum(rows.values())) as progress:

            def take(commit: Commit) -> None:
                store.commit(commit)
                done[commit.unit] = commit
                made = [unit for unit in missing if unit in done]
                progress.reach(sum(rows[unit] for unit in made), f"{len(made)} of {len(missing)} shards done")
                _tell_other_kind(store.plan.table, commit, kinds)
                watch(list(done.values()))

            def describe_kept() -> str:
                kept = f"{len(done)} of {len(store.plan.units)} shards of {store.plan.table}"
                documents = sum(commit.rows for commit in done.values())
                return f"{kept} ({documents} documents); lost: what was done of the shards in work"

            with tell_kept(describe_kept):
                make_shards(stage, jobs(missing), workers, take, store.cares(missing))
    seconds = time.monotonic() - start
    constants, files = finish([done[unit] for unit in sorted(done)])
    manifest = store.seal(done, constants, files)
    tokens = sum(done[unit].counts.get("tokens", 0) for unit in missing)
    return Built(manifest=manifest, made=len(missing), kept=kept, seconds=seconds, tokens=tokens)


def _tell_other_kind(table: str, commit: Commit, kinds: set[str]) -> None:
    """Say once that a table goes on on another kind of processor than `kinds`, and take that one up."""
    if commit.made_on and commit.made_on not in kinds:
        if kinds:
            warn(
                f"{table} continues on {commit.made_on}, after {', '.join(sorted(kinds))}: numbers may differ within "
                "the rounding of its dtype; xkd-cache verify --recompute measures how far"
            )
        kinds.add(commit.made_on)

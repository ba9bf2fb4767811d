"""The training loop: batches from the cache, terms divided once per step, AdamW, checkpoints, one metrics file."""

import itertools
import json
import math
import signal
from collections import deque
from collections.abc import Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any, Final, TypeVar

import torch
from torch import Tensor

from xkd_schemas.cache.manifest import refuse_differences
from xkd_schemas.config import RunConfig
from xkd_schemas.console import rank, say, signals_noted, tell_kept, warn
from xkd_schemas.durable_files import disk_errors, hold_lock, rename, replace
from xkd_schemas.errors import DiskFailed, Mismatch, NonFinite, OutOfMemory, UsageError
from xkd_schemas.progress import Progress
from xkd_schemas.text.encode import reading_of
from xkd_trainer.data.batch import Batch, blank
from xkd_trainer.data.collate import batch_of
from xkd_trainer.data.sampler import ORDER, Int64s, Order, learning_rate
from xkd_trainer.training.devices import (
    agree,
    gather,
    gather_student,
    is_out_of_memory,
    join,
    largest,
    losing_no_process,
    make_accelerator,
    prepare,
    seed_step,
    sum_gradients,
    whole_root,
)
from xkd_trainer.training.files import (
    METRICS,
    Snapshot,
    export_student,
    is_finished,
    load_newest,
    save,
    tidy_up,
    was_exporting,
)
from xkd_trainer.training.prepare import Ready, set_up

T = TypeVar("T")
Value = TypeVar("Value", float, Tensor)

LOOKED_AT: Final = 1024  # rows whose end tokens are looked up when the student is saved
_UNASKED: Final = " (no --loss: cross-entropy alone, nothing of the teacher; xkd-train losses lists the others)"
SAVE_SECONDS: Final = 600.0  # where nobody says how often, a checkpoint is written after so long


@dataclass(frozen=True, kw_only=True)
class Trained:
    """How a run ended."""

    out: Path
    steps: int
    resumed_at: int  # step of the checkpoint it went on from; `steps` if there was nothing left to do
    terms: dict[str, float]  # means over the last logged stretch of steps
    weights: dict[str, float]  # what each term is multiplied by at the last step
    saved_in: str  # dtype of the student's weights on disk


def train(run: RunConfig, *, student_table: str = "", on_missing: str = "fail", quiet: bool = False) -> Trained:
    """Train a student from a cache, or go on where the same command stopped.

    Ctrl-C, SIGTERM and SIGUSR1 end it after the step in work, with a checkpoint of it.

    Raises:
        UsageError, InputMissing, Mismatch: Something does not fit; nothing was changed.
        NonFinite: A loss or gradient is NaN or infinite; the weights of the last checkpoint are untouched.
        BadData: The cache is corrupt, or the finished student that is there already.
        Busy: Another process trains into the same folder.
        WorkersGone: Another process of this run ended; all do.
        DiskFailed: The disk is full or failing; earlier checkpoints are untouched.
    """
    if not run.train.out:
        raise UsageError("no output folder is named", fix="--out FOLDER")
    out = Path(run.train.out)
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out {out} is a file", kept="it as it is", fix="--out FOLDER")
    if run.train.threads:
        torch.set_num_threads(run.train.threads)
    with losing_no_process(lambda: f"what {out} holds"):
        join()
        ready = agree(lambda: set_up(run, student_table, on_missing=on_missing, quiet=quiet))
    size = len(ready.cache.rows(0, run.train.seed))
    if size == 0:
        raise UsageError(f"{ready.cache.root} has no usable document for this student")
    order = Order(size=size, batch_size=run.train.batch_size, seed=run.train.seed)
    total = run.train.steps or max(1, round(run.train.epochs * order.steps_per_epoch))
    fingerprint = _fingerprint(run, ready, total)
    with ExitStack() as held, losing_no_process(lambda: f"what {out} held before"):
        agree(lambda: None if rank() else held.enter_context(hold_lock(out)))
        if agree(lambda: is_finished(out, fingerprint)):
            if rank() == 0:
                tidy_up(out, keep_checkpoints=bool(run.train.save_every))
            resumed_at, terms = total, dict[str, float]()
        else:
            resumed_at, terms = _Run(run, ready, order, total, fingerprint, quiet).go()
    return Trained(
        out=out, steps=total, resumed_at=resumed_at, terms=terms, weights=fingerprint["weights"],
        saved_in=str(ready.save_dtype).removeprefix("torch."),
    )  # fmt: skip


def _fingerprint(run: RunConfig, ready: Ready, total: int) -> dict[str, Any]:
    reading = reading_of(ready.cache.students.manifest.spec["encoder"])
    train = run.train.model_dump(exclude={"out", "shards", "threads", "log_every", "save_every"})
    return {
        "cache": ready.cache.identity(ready.wanted),
        "student": run.student.model,
        "template": reading["template"],
        "losses": {name: dict(values) for name, values in sorted(run.losses.items())},
        "weights": ready.distiller.term_weights(total - 1),
        "projectors": {n: how.model_dump() for n, how in ready.distiller.trained_projectors().items()},
        "steps": total,
        "order": ORDER,
        "train": train,
    } | ({} if reading["enable_thinking"] is None else {"enable_thinking": reading["enable_thinking"]})


def prefetch(items: Iterator[T], depth: int = 2) -> Generator[T]:
    """The items, none of them None, made in a thread at most `depth` ahead; its errors are raised here."""
    with ThreadPoolExecutor(1, thread_name_prefix="produce") as pool:
        ahead = deque(pool.submit(next, items, None) for _ in range(depth))
        while (item := ahead.popleft().result()) is not None:
            ahead.append(pool.submit(next, items, None))
            yield item


class Metrics:
    """Appends lines to OUT/metrics.jsonl: one JSON object each, what a run measured, in that order.

    A run that goes on takes up what its checkpoint says was logged `before`. One that starts at its first step gets a
    new file, and what an earlier run measured is kept as metrics-1.jsonl, metrics-2.jsonl, ...
    """

    def __init__(self, out: Path, *, before: bytes | None) -> None:
        self.path = out / METRICS
        if before is not None:
            replace(self.path, before)
        elif self.path.exists():
            taken = {path.name for path in out.glob("metrics-*.jsonl")}
            free = next(name for n in itertools.count(1) if (name := f"metrics-{n}.jsonl") not in taken)
            rename(self.path, out / free)

    def write(self, **values: Any) -> None:
        """Append one line."""
        with disk_errors(self.path), self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(values) + "\n")


def add_values(sums: dict[str, Value], values: Mapping[str, Value]) -> None:
    """Add numbers or tensors by name to what is there, or put them there."""
    for name, value in values.items():
        sums[name] = sums[name] + value if name in sums else value


@dataclass(kw_only=True, slots=True)
class Window:
    """Sums of the terms and of their counts since the last logged step."""

    steps: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, float] = field(default_factory=dict)


class _Run:
    """The state of one run."""

    def __init__(
        self, run: RunConfig, ready: Ready, order: Order, total: int, fingerprint: dict[str, Any], quiet: bool
    ) -> None:
        self.settings, self.ready, self.order, self.total = run.train, ready, order, total
        self.fingerprint, self.quiet = fingerprint, quiet
        self.micro_batch_size = run.train.micro_batch_size
        self.out, self.saved, self.seen = Path(run.train.out), 0, Window()
        self.accelerator = make_accelerator(run.train.mixed_precision)
        self.distiller = ready.distiller
        groups = self.distiller.parameter_groups(lr=run.train.lr, weight_decay=run.train.weight_decay)
        self.optimizer: Any = torch.optim.AdamW(groups)
        self.peaks = [float(group["lr"]) for group in self.optimizer.param_groups]
        self.logged: bytes | None = None  # in the metrics of the checkpoint
        self.start = agree(self._resume)
        agree(self._check_start)
        self.module, self.optimizer = prepare(self.accelerator, self.distiller, self.optimizer)

    def _resume(self) -> int:
        snapshot, skipped = load_newest(self.out)
        for line in skipped:
            warn(line)
        if snapshot is None:
            if (self.out / "model.safetensors").exists() and not was_exporting(self.out, self.fingerprint):
                raise Mismatch(f"{self.out} holds a student of another run", fix="choose another --out")
            return 0
        before = dict(snapshot.fingerprint["train"])
        asked, own = before.get("micro_batch_size"), self.settings.micro_batch_size  # which may be another now
        before["micro_batch_size"] = own
        refuse_differences(
            self.out, self.fingerprint, {**snapshot.fingerprint, "train": before},
            advice="choose another --out, or the same settings",
        )  # fmt: skip
        self.distiller.student.load_state_dict(snapshot.student, strict=False)  # tied weights are stored once
        self.distiller.losses.load_state_dict(snapshot.projectors)
        self.optimizer.load_state_dict(dict(snapshot.optimizer))
        self.seen = Window(**snapshot.window)
        self.saved, self.logged = snapshot.step, snapshot.metrics
        if asked == own:
            self.micro_batch_size = snapshot.micro_batch_size or own
        return snapshot.step

    def _check_start(self) -> None:
        if self.start != largest(self.start)[0]:
            raise Mismatch(
                f"process {self.accelerator.process_index} finds the checkpoint of step {self.start} in {self.out}, "
                "another process a later one", fix="name a folder as --out that all machines of the run share",
            )  # fmt: skip

    def _micro_batches(self, step: int) -> list[Batch]:
        """This process's micro-batches of a step; every process gets the same number, blank ones if need be."""
        shares = self._shares(step)
        cache, wanted = self.ready.cache, self.ready.wanted
        rows_of_epoch = cache.rows(step // self.order.steps_per_epoch, self.settings.seed)
        batches = [batch_of(cache, rows_of_epoch[places].tolist(), wanted) for places in shares[rank()]]
        while len(batches) < max(len(share) for share in shares):
            batches.append(blank(batch_of(cache, rows_of_epoch[shares[0][0]].tolist(), wanted)))
        return batches

    def _shares(self, step: int) -> list[list[Int64s]]:
        world = self.accelerator.num_processes
        return [self.order.share(step, number, world, self.micro_batch_size) for number in range(world)]

    def _halve(self, step: int, rows: tuple[int, ...]) -> None:
        """Half the documents in a micro-batch from here on, as memory ran out on `rows`, or on those of others."""
        self.optimizer.zero_grad(set_to_none=True)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        most = max(len(places) for share in self._shares(step) for places in share)
        agree(lambda: self._refuse_one_document(step, rows if most == 1 else ()))
        self.micro_batch_size = most // 2
        warn(
            f"step {step + 1}: out of memory with micro-batches of {most} documents; this step is done again with "
            f"{self.micro_batch_size}, and so are all others; the result is that of --micro-batch-size "
            f"{self.micro_batch_size}"
        )

    def _refuse_one_document(self, step: int, rows: tuple[int, ...]) -> None:
        if rows:
            raise self._memory_error(step, rows)

    def _memory_error(self, step: int, rows: tuple[int, ...]) -> OutOfMemory:
        smaller = f"--micro-batch-size {len(rows) // 2}" if len(rows) > 1 else "--gradient-checkpointing"
        return OutOfMemory(
            f"step {step + 1}: out of memory with a micro-batch of {len(rows)}, cache rows {list(rows[:8])}",
            kept=self._kept(), fix=f"add {smaller} or --mixed-precision bf16, or align with a smaller --max-tokens",
        )  # fmt: skip

    def _prefetch(self, step: int) -> Generator[list[Batch]]:
        return prefetch(map(self._micro_batches, range(step, self.total)))

    def go(self) -> tuple[int, dict[str, float]]:
        """Run all remaining steps, save, and export the student: the step it began at, and the last logged means."""
        self.saved_at = monotonic()
        main = self.accelerator.is_main_process
        if main and not self.quiet:
            alone = "" if "loss" in self.settings.model_fields_set else _UNASKED
            say(f"loss: {self.distiller.describe(self.total - 1)}{alone}")
        metrics = agree(lambda: Metrics(self.out, before=self.logged) if main else None)
        self.module.train()
        last, stop = dict[str, float](), 0
        with self._telling_what_is_kept():
            progress = Progress("train", self.total - self.start, of="steps", quiet=not main)
            with progress, signals_noted() as noted:
                made, step = self._prefetch(self.start), self.start
                while step < self.total:
                    batches = agree(partial(next, made))
                    done = self._step(step, [b.to(self.accelerator.device) for b in batches])
                    if done is None:  # memory ran out, and the step begins again with smaller micro-batches
                        made.close()
                        made = self._prefetch(step)
                        continue
                    step, (terms, counts, norm) = step + 1, done
                    self.seen.steps += 1
                    add_values(self.seen.sums, terms)
                    add_values(self.seen.counts, counts)
                    if step % self.settings.log_every == 0 or step == self.total:
                        last = agree(partial(self._log, step, norm, metrics))
                    stop, due = self._look_around(noted(), self._is_due(step))
                    if stop or due:
                        agree(partial(self._save, step))
                    if stop:
                        break
                    progress.reach(step - self.start, f"loss {last['loss']:.4f}" if last else "")
            if stop:  # by a signal to another process
                signal.raise_signal(stop)
                raise KeyboardInterrupt
            agree(self._export)
        return self.start, last

    def _log(self, step: int, norm: float, metrics: Metrics | None) -> dict[str, float]:
        """Write what was measured since the last logged step, and return the means."""
        seen, self.seen = self.seen, Window()
        means = {name: value / seen.steps for name, value in seen.sums.items()}
        if metrics is not None:
            if idle := sorted(name for name, count in seen.counts.items() if count == 0):
                warn(f"step {step}: nothing qualified for {', '.join(idle)} since the last logged step")
            lr = float(self.optimizer.param_groups[0]["lr"])
            totals = {f"{name}.count": round(value, 6) for name, value in seen.counts.items()}
            size = self.micro_batch_size
            cut = {} if size == self.settings.micro_batch_size else {"micro_batch_size": size}
            metrics.write(step=step, grad_norm=norm, lr=lr, **means, **totals, **cut)
        return means

    def _export(self) -> None:
        if self.settings.save_every and self.saved != self.total:
            self._save(self.total)
        student = gather_student(self.distiller.student, self.ready.save_dtype)
        if not self.accelerator.is_main_process:
            return
        rows = self.ready.cache.rows_of_student(LOOKED_AT)
        export_student(self.out, student, self.ready.tokenizer, self.fingerprint, rows)
        tidy_up(self.out, keep_checkpoints=bool(self.settings.save_every))

    @contextmanager
    def _telling_what_is_kept(self) -> Iterator[None]:
        """Where a signal or the disk ends the work inside, the last line says what is kept of this run."""
        try:
            with tell_kept(self._kept), losing_no_process(self._kept):
                yield
        except DiskFailed as error:
            error.kept = self._kept()
            raise

    def _look_around(self, noted: int, due: bool) -> tuple[int, bool]:
        """The signal that came to any process, 0 for none, so that all end at the same step; is a checkpoint due?"""
        stop, save = largest(noted, due)
        return int(stop), bool(save)

    def _is_due(self, step: int) -> bool:
        if self.settings.save_every:
            return step % self.settings.save_every == 0
        return step < self.total and monotonic() - self.saved_at >= SAVE_SECONDS

    def _kept(self) -> str:
        if self.saved:
            return f"the checkpoint of step {self.saved} of {self.total} in {self.out}"
        return f"nothing of this run: no step of {self.total} was finished and saved"

    def _step(self, step: int, batches: list[Batch]) -> tuple[dict[str, float], dict[str, float], float] | None:
        """One optimizer step; means of the terms, their counts, and the gradient's norm before clipping.

        None, and no update, where memory ran out in a process; micro-batches are smaller from here on.
        """
        seed_step(self.settings.seed, step)
        factor = learning_rate(step, self.total, self.settings)
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * factor
        denominators: dict[str, Tensor] = {}
        with whole_root(self.module):
            for batch in batches:
                add_values(denominators, {n: count.double() for n, count in self.distiller.counts(batch).items()})
        denominators = self.accelerator.reduce(denominators, reduction="sum")
        parts: dict[str, Tensor] = {}
        full: tuple[int, ...] = ()  # rows on which memory ran out
        for batch in batches:
            try:
                add_values(parts, self._backward(step, batch, denominators))
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if self.accelerator.is_fsdp2:  # the others wait in the middle of a pass for what this one has
                    raise self._memory_error(step, batch.rows) from None
                full = batch.rows
                break
        if largest(len(full))[0]:
            self._halve(step, full)
            return None
        sum_gradients(self.accelerator, self.module)
        means = self.accelerator.reduce(parts, reduction="sum")
        norm = float(gather(self.accelerator.clip_grad_norm_(self.module.parameters(), self.settings.max_grad_norm)))
        values = {name: float(value) for name, value in means.items()}
        self._refuse_non_finite(step, values, norm, batches, parts)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return values, {name: float(n) for name, n in denominators.items()}, norm

    def _backward(self, step: int, batch: Batch, denominators: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Add a micro-batch to this process's gradients, and return its share of the terms."""
        fsdp = self.accelerator.is_fsdp2
        with self.accelerator.autocast() if fsdp else self.accelerator.no_sync(self.module):
            loss, terms = self.module(batch, denominators, step)
            self.accelerator.backward(loss * self.accelerator.num_processes)  # wrappers average over processes
        return {"loss": loss.detach().float(), **terms}

    def _refuse_non_finite(
        self, step: int, values: dict[str, float], norm: float, batches: list[Batch], parts: dict[str, Tensor]
    ) -> None:
        """Name the rows of a process whose own `parts` are not finite, or of the first where only the sum is not."""
        bad = [name for name, value in {**values, "gradient norm": norm}.items() if not math.isfinite(value)]
        if not bad:
            return
        rows = [row for batch in batches for row in batch.rows]
        error = NonFinite(
            f"step {step + 1}: {', '.join(bad)} not finite on cache rows {rows[:8]}{'...' if rows[8:] else ''}",
            kept=f"{self._kept()}; no update was made",
            fix="lower --lr, raise train.warmup_ratio, or set train.mixed_precision=no",
        )

        def refuse(*, concerned: bool) -> None:
            if concerned:
                raise error

        own = all(bool(part.isfinite()) for part in parts.values())
        agree(lambda: refuse(concerned=not own))
        agree(lambda: refuse(concerned=True))

    def _save(self, step: int) -> None:
        snapshot = Snapshot(
            step=step,
            student=gather(self.distiller.student.state_dict(keep_vars=True)),
            projectors=gather(self.distiller.losses.state_dict(keep_vars=True)),
            optimizer=gather(self.optimizer.state_dict()),
            fingerprint=self.fingerprint,
            window=asdict(self.seen),
            micro_batch_size=self.micro_batch_size,
            metrics=path.read_bytes() if (path := self.out / METRICS).exists() else b"",
        )
        if self.accelerator.is_main_process:
            save(self.out, snapshot)
        self.saved, self.saved_at = step, monotonic()

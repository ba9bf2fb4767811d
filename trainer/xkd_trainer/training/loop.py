"""The training loop: batches from the cache, terms divided once per step, AdamW, checkpoints, one metrics file."""

import math
import os
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any, Final, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor

from xkd_schemas.cache.manifest import refuse_differences
from xkd_schemas.config import RunConfig
from xkd_schemas.console import say, signals_noted, tell_kept, warn
from xkd_schemas.durable_files import hold_lock
from xkd_schemas.errors import DiskFailed, Mismatch, NonFinite, UsageError
from xkd_schemas.progress import Progress
from xkd_schemas.text.encode import reading_of
from xkd_trainer.data.batch import Batch, blank
from xkd_trainer.data.collate import batch_of
from xkd_trainer.data.sampler import ORDER, Order, learning_rate
from xkd_trainer.run_folder import METRICS, evaluation_of, read_lines
from xkd_trainer.training.files import (
    Snapshot,
    export_student,
    is_finished,
    load_newest,
    save,
    tidy_up,
    was_exporting,
)
from xkd_trainer.training.held_out import EVALUATION, Evaluations, check_evaluation, without_choice
from xkd_trainer.training.prepare import Ready, set_up
from xkd_trainer.training.tracking import Meter, Records, check_trackers, tracker_options

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
    evaluation: dict[str, float]  # of the exported student on held-out rows, with its step; empty without any


def train(run: RunConfig, *, student_table: str = "", on_missing: str = "fail", quiet: bool = False) -> Trained:
    """Train a student from a cache, or go on where the same command stopped.

    Ctrl-C and SIGTERM end it after the step in work, with a checkpoint of it.

    Raises:
        UsageError, InputMissing, Mismatch: Something does not fit; nothing was changed.
        NonFinite: A loss or gradient is NaN or infinite; the weights of the last checkpoint are untouched.
        BadData: The cache is corrupt, or the finished student that is there already.
        Busy: Another process trains into the same folder.
        DiskFailed: The disk is full or failing; earlier checkpoints are untouched.
    """
    if not run.train.out:
        raise UsageError("no output folder is named", fix="--out FOLDER")
    out = Path(run.train.out)
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out {out} is a file", kept="it as it is", fix="--out FOLDER")
    if run.train.threads:
        torch.set_num_threads(run.train.threads)
    check_trackers(run.train.track)
    check_evaluation(run.train)
    ready = set_up(run, student_table, on_missing=on_missing, quiet=quiet)
    size = len(ready.cache.rows(0, run.train.seed))
    if size == 0:
        raise UsageError(f"{ready.cache.root} has no usable document for this student")
    evaluations = Evaluations(run, ready) if run.train.eval_data else None
    order = Order(size=size, batch_size=run.train.batch_size, seed=run.train.seed)
    total = run.train.steps or max(1, round(run.train.epochs * order.steps_per_epoch))
    fingerprint = _fingerprint(run, ready, total)
    if evaluations is not None:
        fingerprint["evaluation"] = evaluations.describe()
    first = os.environ.get("RANK", "0") == "0"  # of the processes of one run
    with hold_lock(out) if first else nullcontext():
        if is_finished(out, fingerprint):
            tidy_up(out, keep_checkpoints=bool(run.train.save_every))
            steps = resumed_at = int((read_lines(out / METRICS) or [{}])[-1].get("step", total))
            terms = dict[str, float]()
        else:
            going = _Run(run, ready, order, total, fingerprint, evaluations)
            terms, resumed_at, steps = going.go(quiet), going.start, going.done
    return Trained(
        out=out, steps=steps, resumed_at=resumed_at, terms=terms, weights=fingerprint["weights"],
        saved_in=str(ready.save_dtype).removeprefix("torch."),
        evaluation=evaluation_of(out, best=run.train.load_best_at_end),
    )  # fmt: skip


def _fingerprint(run: RunConfig, ready: Ready, total: int) -> dict[str, Any]:
    reading = reading_of(ready.cache.students.manifest.spec["encoder"])
    apart = {"out", "shards", "threads", "log_every", "save_every", "track", *EVALUATION}
    train = run.train.model_dump(exclude=apart)
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


def prefetch(items: Iterator[T], depth: int = 2) -> Iterator[T]:
    """The items, none of them None, made in a thread at most `depth` ahead; its errors are raised here."""
    with ThreadPoolExecutor(1, thread_name_prefix="produce") as pool:
        ahead = deque(pool.submit(next, items, None) for _ in range(depth))
        while (item := ahead.popleft().result()) is not None:
            ahead.append(pool.submit(next, items, None))
            yield item


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
        self, run: RunConfig, ready: Ready, order: Order, total: int, fingerprint: dict[str, Any],
        evaluations: Evaluations | None,
    ) -> None:  # fmt: skip
        self.settings, self.ready, self.order, self.total = run.train, ready, order, total
        self.fingerprint, self.evaluations = fingerprint, evaluations
        self.out, self.saved, self.seen = Path(run.train.out), 0, Window()
        precision = run.train.mixed_precision
        self.meter, tracked = Meter(), tracker_options(self.out, run.train.track)
        self.accelerator = Accelerator(mixed_precision=precision, cpu=not torch.cuda.is_available(), **tracked)
        self.distiller = ready.distiller
        groups = self.distiller.parameter_groups(lr=run.train.lr, weight_decay=run.train.weight_decay)
        self.optimizer: Any = torch.optim.AdamW(groups)
        self.peaks = [float(group["lr"]) for group in self.optimizer.param_groups]
        self.logged: bytes | None = None  # in the metrics of the checkpoint
        self.start = self.done = self._resume()
        self.module, self.optimizer = self.accelerator.prepare(self.distiller, self.optimizer)

    def _resume(self) -> int:
        snapshot, skipped = load_newest(self.out)
        for line in skipped:
            warn(line)
        if snapshot is None:
            if (self.out / "model.safetensors").exists() and not was_exporting(self.out, self.fingerprint):
                raise Mismatch(f"{self.out} holds a student of another run", fix="choose another --out")
            torch.manual_seed(self.settings.seed + 2)
            return 0
        refuse_differences(
            self.out, without_choice(self.fingerprint), without_choice(snapshot.fingerprint),
            advice="choose another --out, or the same settings",
        )  # fmt: skip
        if self.evaluations is not None:
            self.evaluations.restore(snapshot.evaluated)
        self.distiller.student.load_state_dict(snapshot.student, strict=False)  # tied weights are stored once
        self.distiller.losses.load_state_dict(snapshot.projectors)
        self.optimizer.load_state_dict(dict(snapshot.optimizer))
        torch.set_rng_state(snapshot.random)
        self.seen = Window(**snapshot.window)
        self.saved, self.logged = snapshot.step, snapshot.metrics
        return snapshot.step

    def _micro_batches(self, step: int) -> list[Batch]:
        """This process's micro-batches of a step; every process gets the same number, blank ones if need be."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        shares = [self.order.share(step, r, world, self.settings.micro_batch_size) for r in range(world)]
        cache, wanted = self.ready.cache, self.ready.wanted
        rows_of_epoch = cache.rows(step // self.order.steps_per_epoch, self.settings.seed)
        batches = [batch_of(cache, rows_of_epoch[places].tolist(), wanted) for places in shares[rank]]
        while len(batches) < max(len(share) for share in shares):
            batches.append(blank(batch_of(cache, rows_of_epoch[shares[0][0]].tolist(), wanted)))
        return batches

    def go(self, quiet: bool) -> dict[str, float]:
        """Run all remaining steps, save, and export the student: the last logged means."""
        self.saved_at = monotonic()
        main = self.accelerator.is_main_process
        if main and not quiet:
            alone = "" if "loss" in self.settings.model_fields_set else _UNASKED
            say(f"loss: {self.distiller.describe(self.total - 1)}{alone}")
        logged, at = self.logged, self.start
        records = Records(self.out, self.accelerator, self.fingerprint, before=logged, start=at) if main else None
        self.module.train()
        last, stop = dict[str, float](), False
        with self._telling_what_is_kept(), nullcontext() if records is None else closing(records):
            progress = Progress("train", self.total - self.start, of="steps", quiet=not main)
            with progress, signals_noted() as noted:
                left = range(self.start, self.start if self._is_enough() else self.total)
                made = prefetch(map(self._micro_batches, left))
                for step, batches in enumerate(self.meter.watch(made), start=self.start + 1):
                    terms, counts, norm = self._step(step - 1, [b.to(self.accelerator.device) for b in batches])
                    self.meter.count(batches)
                    self.seen.steps += 1
                    add_values(self.seen.sums, terms)
                    add_values(self.seen.counts, counts)
                    self._evaluate(step, records)
                    self.done, enough = step, self._is_enough()
                    if step % self.settings.log_every == 0 or step == self.total or enough:
                        last = self._log(step, norm, records)
                    stop = self._stop(noted())
                    if main and (stop or self._is_due(step)):
                        self._save(step)
                    if stop or enough:
                        break
                    progress.reach(step - self.start, f"loss {last['loss']:.4f}" if last else "")
            if stop:  # by a signal to another process
                raise KeyboardInterrupt
            if main:
                self._export()
        return last

    def _evaluate(self, step: int, records: Records | None) -> None:
        """Measure the student on held-out rows where that is due, and keep it where it is the best."""
        found = self.evaluations
        if found is not None and found.is_due(step, self.total):
            self.module.eval()
            values = found.measure(self.distiller.student, step, self.accelerator)
            self.module.train()
            if records is not None:
                records.write(step, values)
                if step < self.total:  # the last one is at hand
                    found.keep(self.distiller.student.state_dict(), step)

    def _is_enough(self) -> bool:
        return self.evaluations is not None and self.evaluations.is_enough

    def _log(self, step: int, norm: float, records: Records | None) -> dict[str, float]:
        """Write what was measured since the last logged step, and return the means."""
        seen, self.seen = self.seen, Window()
        means = {name: value / seen.steps for name, value in seen.sums.items()}
        timing = self.meter.take(self.accelerator)
        if records is not None:
            if idle := sorted(name for name, count in seen.counts.items() if count == 0):
                warn(f"step {step}: nothing qualified for {', '.join(idle)} since the last logged step")
            lr = float(self.optimizer.param_groups[0]["lr"])
            totals = {f"{name}.count": round(value, 6) for name, value in seen.counts.items()}
            records.write(step, {"grad_norm": norm, "lr": lr, **means, **totals}, timing)
        return means

    def _export(self) -> None:
        if self.settings.save_every and self.saved != self.done:
            self._save(self.done)
        if self.evaluations is not None and self.evaluations.wants_best(self.done):
            self.evaluations.load_best(self.distiller.student, self._keep_last)
        rows = self.ready.cache.rows_of_student(LOOKED_AT)
        student = self.distiller.student.to(self.ready.save_dtype)
        export_student(self.out, student, self.ready.tokenizer, self.fingerprint, rows)
        tidy_up(self.out, keep_checkpoints=bool(self.settings.save_every))

    def _keep_last(self) -> str:
        """Save the last step where that was not done, and say so."""
        if self.saved != self.done:
            self._save(self.done)
        return self._kept()

    @contextmanager
    def _telling_what_is_kept(self) -> Iterator[None]:
        """Where a signal or the disk ends the work inside, the last line says what is kept of this run."""
        try:
            with tell_kept(self._kept):
                yield
        except DiskFailed as error:
            raise DiskFailed(error.what, kept=self._kept(), fix=error.fix) from error

    def _stop(self, noted: bool) -> bool:
        """Whether a signal came to any of the processes: all of them end at the same step."""
        if self.accelerator.num_processes == 1:
            return noted
        flag = torch.tensor(float(noted), device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, reduction="sum") > 0)

    def _is_due(self, step: int) -> bool:
        if self.settings.save_every:
            return step % self.settings.save_every == 0
        return step < self.total and monotonic() - self.saved_at >= SAVE_SECONDS

    def _kept(self) -> str:
        if self.saved:
            return f"the checkpoint of step {self.saved} of {self.total} in {self.out}"
        return f"nothing of this run: no step of {self.total} was finished and saved"

    def _step(self, step: int, batches: list[Batch]) -> tuple[dict[str, float], dict[str, float], float]:
        """One optimizer step; means of the terms, their counts, and the gradient's norm before clipping."""
        factor = learning_rate(step, self.total, self.settings)
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * factor
        denominators: dict[str, Tensor] = {}
        for batch in batches:
            add_values(denominators, {n: count.double() for n, count in self.distiller.counts(batch).items()})
        denominators = self.accelerator.reduce(denominators, reduction="sum")
        parts: dict[str, Tensor] = {}
        for number, batch in enumerate(batches, start=1):
            with nullcontext() if number == len(batches) else self.accelerator.no_sync(self.module):
                loss, terms = self.module(batch, denominators, step)
                self.accelerator.backward(loss * self.accelerator.num_processes)  # wrappers average over processes
            add_values(parts, {"loss": loss.detach().float(), **terms})
        means = self.accelerator.reduce(parts, reduction="sum")
        norm = float(self.accelerator.clip_grad_norm_(self.module.parameters(), self.settings.max_grad_norm))
        values = {name: float(value) for name, value in means.items()}
        self._refuse_non_finite(step, values, norm, batches)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return values, {name: float(n) for name, n in denominators.items()}, norm

    def _refuse_non_finite(self, step: int, values: dict[str, float], norm: float, batches: list[Batch]) -> None:
        bad = [name for name, value in {**values, "gradient norm": norm}.items() if not math.isfinite(value)]
        if bad:
            rows = [row for batch in batches for row in batch.rows]
            raise NonFinite(
                f"step {step + 1}: {', '.join(bad)} not finite on cache rows {rows[:8]}{'...' if rows[8:] else ''}",
                kept=f"{self._kept()}; no update was made",
                fix="lower --lr, raise train.warmup_ratio, or set train.mixed_precision=no",
            )

    def _save(self, step: int) -> None:
        snapshot = Snapshot(
            step=step,
            student=self.distiller.student.state_dict(),
            projectors=self.distiller.losses.state_dict(),
            optimizer=self.optimizer.state_dict(),
            random=torch.get_rng_state(),
            fingerprint=self.fingerprint,
            window=asdict(self.seen),
            metrics=path.read_bytes() if (path := self.out / METRICS).exists() else b"",
            evaluated=self.evaluations.note_saved() if self.evaluations is not None else {},
        )
        save(self.out, snapshot)
        self.saved, self.saved_at = step, monotonic()

"""The training loop: batches from the cache, terms divided once per step, AdamW, checkpoints, one metrics file."""

import math
import signal
from collections.abc import Generator, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any, Final

import torch
from torch import Tensor

from xkd_schemas.config import RunConfig
from xkd_schemas.console import rank, say, signals_noted, tell_kept, warn
from xkd_schemas.durable_files import hold_lock
from xkd_schemas.errors import DiskFailed, Mismatch, NonFinite, OutOfMemory, UsageError
from xkd_schemas.progress import Progress
from xkd_trainer.data.batch import Batch
from xkd_trainer.data.sampler import Order, StepBatches, learning_rate, prefetch
from xkd_trainer.models.architecture import evaluating
from xkd_trainer.models.lora import trained_state
from xkd_trainer.run_folder import METRICS, evaluation_of, read_lines, read_provenance
from xkd_trainer.training import devices
from xkd_trainer.training.card import card_text
from xkd_trainer.training.distiller import make_optimizer
from xkd_trainer.training.files import (
    Snapshot,
    export_student,
    is_finished,
    load_newest,
    save,
    tidy_up,
    was_exporting,
)
from xkd_trainer.training.fingerprint import fingerprint_of, refuse_another_run
from xkd_trainer.training.held_out import Evaluations, check_evaluation
from xkd_trainer.training.prepare import Ready, set_up
from xkd_trainer.training.tracking import Meter, Records, Window, add_values, check_trackers

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
    check_trackers(run.train.track)
    check_evaluation(run.train)
    with devices.losing_no_process(lambda: f"what {out} holds"):
        devices.join()
        ready = devices.agree(lambda: set_up(run, student_table, on_missing=on_missing, quiet=quiet))
    size = len(ready.cache.rows(0, run.train.seed))
    evaluations = devices.agree(lambda: Evaluations(run, ready)) if run.train.eval_data else None
    order = Order(size=size, batch_size=run.train.batch_size, seed=run.train.seed)
    total = run.train.steps or max(1, round(run.train.epochs * order.steps_per_epoch))
    fingerprint = fingerprint_of(run, ready, total)
    if evaluations is not None:
        fingerprint["evaluation"] = evaluations.describe()
    with ExitStack() as held, devices.losing_no_process(lambda: f"what {out} held before"):
        devices.agree(lambda: None if rank() else held.enter_context(hold_lock(out)))
        if devices.agree(lambda: is_finished(out, fingerprint)):
            if rank() == 0:
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


class _Run:
    """The state of one run."""

    def __init__(
        self, run: RunConfig, ready: Ready, order: Order, total: int, fingerprint: dict[str, Any],
        evaluations: Evaluations | None,
    ) -> None:  # fmt: skip
        self.run, self.settings, self.ready, self.total = run, run.train, ready, total
        self.fingerprint, self.evaluations = fingerprint, evaluations
        self.out, self.saved, self.seen = Path(run.train.out), 0, Window()
        self.meter, self.accelerator = Meter(), devices.make_accelerator(run.train)
        self.batches = StepBatches(ready.cache, ready.wanted, order, run.train, self.accelerator.num_processes)
        self.distiller = ready.distiller
        groups = self.distiller.parameter_groups(lr=run.train.lr, weight_decay=run.train.weight_decay)
        self.optimizer = make_optimizer(run.train.optimizer, groups)
        self.peaks = [float(group["lr"]) for group in self.optimizer.param_groups]
        self.logged: bytes | None = None  # in the metrics of the checkpoint
        self.start = self.done = devices.agree(self._resume)
        devices.agree(self._check_start)
        self.module, self.optimizer = devices.prepare(self.accelerator, self.distiller, self.optimizer)

    def _resume(self) -> int:
        snapshot, skipped = load_newest(self.out)
        for line in skipped:
            warn(line)
        if snapshot is None:
            if any(self.out.glob("*model*.safetensors")) and not was_exporting(self.out, self.fingerprint):
                if saved := read_provenance(self.out).get("run"):
                    refuse_another_run(self.out, self.fingerprint, saved, "student")
                raise Mismatch(f"{self.out} holds a student of another run", fix="choose another --out")
            return 0
        refuse_another_run(self.out, self.fingerprint, snapshot.fingerprint, "checkpoint")
        if self.evaluations is not None:
            self.evaluations.restore(snapshot.evaluated)
        self.distiller.student.load_state_dict(snapshot.student, strict=False)  # tied weights are stored once
        self.distiller.losses.load_state_dict(snapshot.projectors)
        self.optimizer.load_state_dict(dict(snapshot.optimizer))
        self.seen = Window(**snapshot.window)
        self.saved, self.logged = snapshot.step, snapshot.metrics
        if snapshot.fingerprint["train"].get("micro_batch_size") == self.settings.micro_batch_size:
            self.batches.micro_batch_size = snapshot.micro_batch_size or self.settings.micro_batch_size
        return snapshot.step

    def _check_start(self) -> None:
        if self.start != devices.largest(self.start)[0]:
            raise Mismatch(
                f"process {self.accelerator.process_index} finds the checkpoint of step {self.start} in {self.out}, "
                "another process a later one", fix="name a folder as --out that all machines of the run share",
            )  # fmt: skip

    def _halve(self, step: int, rows: tuple[int, ...]) -> None:
        """Half the documents in a micro-batch from here on, as memory ran out on `rows`, or on those of others."""
        self.optimizer.zero_grad(set_to_none=True)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        most = self.batches.largest(step)
        devices.agree_to_raise(self._memory_error(step, rows) if rows and most == 1 else None)
        self.batches.micro_batch_size = most // 2
        warn(
            f"step {step + 1}: out of memory with micro-batches of {most} documents; this step is done again with "
            f"{most // 2}, and so are all others; the result is that of --micro-batch-size {most // 2}"
        )

    def _memory_error(self, step: int, rows: tuple[int, ...]) -> OutOfMemory:
        smaller = f"--micro-batch-size {len(rows) // 2}" if len(rows) > 1 else "--gradient-checkpointing"
        return OutOfMemory(
            f"step {step + 1}: out of memory with a micro-batch of {len(rows)}, cache rows {list(rows[:8])}",
            kept=self._kept(), fix=f"add {smaller} or --mixed-precision bf16, or align with a smaller --max-tokens",
        )  # fmt: skip

    def _read_ahead(self) -> Generator[list[Batch]]:
        with closing(prefetch(map(self.batches.read, range(self.done, self.total)))) as made:
            yield from self.meter.watch(made)

    def go(self, quiet: bool) -> dict[str, float]:
        """Run all remaining steps, save, and export the student: the last logged means."""
        self.saved_at = monotonic()
        main = self.accelerator.is_main_process
        if main and not quiet:
            alone = "" if "loss" in self.settings.model_fields_set else _UNASKED
            say(f"loss: {self.distiller.describe(self.total - 1)}{alone}")
        where = self.out, self.accelerator, self.fingerprint
        records = devices.agree(lambda: Records(*where, before=self.logged, start=self.start) if main else None)
        self.module.train()
        last, stop = dict[str, float](), 0
        with self._telling_what_is_kept(), nullcontext() if records is None else closing(records):
            progress = Progress("train", self.total - self.start, of="steps", quiet=not main)
            with progress, signals_noted() as noted:
                made = self._read_ahead()
                while self.done < self.total and not self._is_enough():
                    batches = devices.agree(partial(next, made))
                    measured = self._step(self.done, [b.to(self.accelerator.device) for b in batches])
                    if measured is None:  # memory ran out, and the step begins again with smaller micro-batches
                        made.close()
                        made = self._read_ahead()
                        continue
                    self.done += 1
                    self.meter.count(batches)
                    self.seen.add(*measured[:2])
                    self._evaluate(records)
                    if self.done % self.settings.log_every == 0 or self.done == self.total or self._is_enough():
                        last = devices.agree(partial(self._log, measured[2], records))
                    stop, due = self._look_around(noted(), self._is_due(self.done))
                    if stop or due:
                        devices.agree(lambda: self._save(self.done))
                    if stop:
                        break
                    progress.reach(self.done - self.start, f"loss {last['loss']:.4f}" if last else "")
            if stop:  # by a signal to another process
                signal.raise_signal(stop)
                raise KeyboardInterrupt
            devices.agree(lambda: self._export(last))
        return last

    def _evaluate(self, records: Records | None) -> None:
        """Measure the student on held-out rows where that is due, and keep it where it is the best."""
        found, step = self.evaluations, self.done
        if found is not None and found.is_due(step, self.total):
            with evaluating(self.module), devices.whole_root(self.module):
                values = found.measure(self.distiller.student, step, self.accelerator)
            weights = devices.gather(trained_state(self.distiller.student))
            if records is not None:
                records.write(step, values)
                if step < self.total:  # the last one is at hand
                    found.keep(weights, step)

    def _is_enough(self) -> bool:
        return self.evaluations is not None and self.evaluations.is_enough

    def _log(self, norm: float, records: Records | None) -> dict[str, float]:
        """Write what was measured since the last logged step, and return the means."""
        seen, self.seen = self.seen, Window()
        means = {name: value / seen.steps for name, value in seen.sums.items()}
        timing = self.meter.take(self.accelerator)
        if records is not None:
            if idle := sorted(name for name, count in seen.counts.items() if count == 0):
                warn(f"step {self.done}: nothing qualified for {', '.join(idle)} since the last logged step")
            lr = float(self.optimizer.param_groups[0]["lr"])
            totals = {f"{name}.count": round(value, 6) for name, value in seen.counts.items()}
            size = self.batches.micro_batch_size
            cut = {} if size == self.settings.micro_batch_size else {"micro_batch_size": size}
            records.write(self.done, {"grad_norm": norm, "lr": lr, **means, **totals, **cut}, timing)
        return means

    def _export(self, last: Mapping[str, float]) -> None:
        if self.settings.save_every and self.saved != self.done:
            self._save(self.done)
        if self.evaluations is not None and self.evaluations.wants_best(self.done):
            self.evaluations.load_best(self.distiller.student, self._keep_last)
        student = devices.gather_student(self.distiller.student, self.ready.save_dtype)
        if not self.accelerator.is_main_process:
            return
        rows = self.ready.cache.rows_of_student(LOOKED_AT)
        card = card_text(self.run, self.ready.cache, self.fingerprint, last)
        export_student(self.out, student, self.ready.tokenizer, self.fingerprint, rows, card)
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
            with tell_kept(self._kept), devices.losing_no_process(self._kept):
                yield
        except DiskFailed as error:
            error.kept = self._kept()
            raise

    def _look_around(self, noted: int, due: bool) -> tuple[int, bool]:
        """The signal that came to any process, 0 for none, so that all end at the same step; is a checkpoint due?"""
        stop, save = devices.largest(noted, due)
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
        devices.seed_step(self.settings.seed, step)
        factor = learning_rate(step, self.total, self.settings)
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * factor
        with devices.whole_root(self.module):
            counts = self.distiller.step_counts(batches)
        denominators = self.accelerator.reduce(counts, reduction="sum")
        parts: dict[str, Tensor] = {}
        full: tuple[int, ...] = ()  # rows on which memory ran out
        for batch in batches:
            try:
                add_values(parts, self._backward(step, batch, denominators))
            except (RuntimeError, MemoryError) as error:
                if not devices.is_out_of_memory(error):
                    raise
                if self.accelerator.is_fsdp2:  # the others wait in the middle of a pass for what this one has
                    raise self._memory_error(step, batch.rows) from None
                full = batch.rows
                break
        if devices.largest(len(full))[0]:
            self._halve(step, full)
            return None
        devices.sum_gradients(self.accelerator, self.module)
        means = self.accelerator.reduce(parts, reduction="sum")
        norm = self.accelerator.clip_grad_norm_(self.module.parameters(), self.settings.max_grad_norm)
        norm = float(devices.gather(norm))
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
        own = all(bool(part.isfinite()) for part in parts.values())
        devices.agree_to_raise(None if own else error)
        devices.agree_to_raise(error)

    def _save(self, step: int) -> None:
        snapshot = Snapshot(
            step=step,
            student=devices.gather(trained_state(self.distiller.student)),
            projectors=devices.gather(self.distiller.losses.state_dict(keep_vars=True)),
            optimizer=devices.gather(self.optimizer.state_dict()),
            fingerprint=self.fingerprint,
            window=asdict(self.seen),
            micro_batch_size=self.batches.micro_batch_size,
            metrics=path.read_bytes() if (path := self.out / METRICS).exists() else b"",
            evaluated=self.evaluations.note_saved() if self.evaluations is not None else {},
        )
        if self.accelerator.is_main_process:
            save(self.out, snapshot)
        self.saved, self.saved_at = step, monotonic()

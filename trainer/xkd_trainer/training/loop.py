"""The training loop: batches from the cache, terms divided once per step, AdamW, checkpoints, one metrics file."""

import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

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
from xkd_trainer.data.prefetch import prefetch
from xkd_trainer.data.sampler import ORDER, Order, learning_rate
from xkd_trainer.training.checkpoint import Snapshot, drop_checkpoints, load_newest, save
from xkd_trainer.training.export import export_student, find_learnt_ends, find_turn_ends, is_finished, was_exporting
from xkd_trainer.training.metrics import Metrics, Window
from xkd_trainer.training.prepare import Ready, set_up

LOOKED_AT: Final = 1024
"""Rows whose end tokens are looked up when the student is saved."""

SAVE_SECONDS: Final = 600.0
"""Where nobody says how often, a checkpoint is written after so long."""


@dataclass(frozen=True, kw_only=True)
class Trained:
    """How a run ended."""

    out: Path
    steps: int
    resumed_at: int
    """Step of the checkpoint it went on from; `steps` if there was nothing left to do."""
    terms: dict[str, float]
    """Means over the last logged stretch of steps."""
    weights: dict[str, float]
    """What each term is multiplied by at the last step."""


def train(
    run: RunConfig,
    *,
    student_table: str = "",
    on_missing: str = "fail",
    quiet: bool = False,
    clock: Callable[[], float] = time.monotonic,
) -> Trained:
    """Train a student from a cache, or go on where the same command stopped. `clock` is monotonic seconds.

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
    ready = set_up(run, student_table, on_missing=on_missing, quiet=quiet)
    order = Order(size=ready.cache.size, batch_size=run.train.batch_size, seed=run.train.seed)
    if order.size == 0:
        raise UsageError(f"{ready.cache.root} has no usable document for this student")
    total = run.train.steps or max(1, round(run.train.epochs * order.steps_per_epoch))
    fingerprint = _fingerprint(run, ready, total)
    first = os.environ.get("RANK", "0") == "0"  # of the processes of one run
    with hold_lock(out) if first else nullcontext():
        if is_finished(out, fingerprint):
            return Trained(out=out, steps=total, resumed_at=total, terms={}, weights=fingerprint["weights"])
        return _Run(run, ready, order, total, fingerprint, quiet).go(clock)


def _fingerprint(run: RunConfig, ready: Ready, total: int) -> dict[str, Any]:
    thinking = reading_of(ready.cache.students.manifest.spec["encoder"])["enable_thinking"]
    train = run.train.model_dump(exclude={"out", "shards", "threads", "log_every", "save_every"})
    return {
        "cache": ready.cache.identity(ready.wanted),
        "student": run.student.model,
        "template": ready.cache.students.manifest.constants["template"],
        "losses": {name: dict(values) for name, values in sorted(run.losses.items())},
        "weights": ready.distiller.term_weights(total - 1),
        "projectors": {n: how.model_dump() for n, how in ready.distiller.trained_projectors().items()},
        "steps": total,
        "order": ORDER,
        "train": train,
    } | ({} if thinking is None else {"enable_thinking": thinking})


class _Run:
    """The state of one run."""

    def __init__(
        self, run: RunConfig, ready: Ready, order: Order, total: int, fingerprint: dict[str, Any], quiet: bool
    ) -> None:
        self.settings, self.ready, self.order, self.total = run.train, ready, order, total
        self.fingerprint, self.quiet = fingerprint, quiet
        self.out = Path(run.train.out)
        self.saved = 0
        self.seen = Window()
        precision = run.train.mixed_precision
        self.accelerator = Accelerator(mixed_precision=precision, cpu=not torch.cuda.is_available())
        self.distiller = ready.distiller
        groups = self.distiller.parameter_groups(lr=run.train.lr, weight_decay=run.train.weight_decay)
        self.optimizer: Any = torch.optim.AdamW(groups)
        self.peaks = [float(group["lr"]) for group in self.optimizer.param_groups]
        self.start = self._resume()
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
            self.out, self.fingerprint, dict(snapshot.fingerprint), advice="choose another --out, or the same settings"
        )
        self.distiller.student.load_state_dict(snapshot.student, strict=False)  # tied weights are stored once
        self.distiller.losses.load_state_dict(snapshot.projectors)
        self.optimizer.load_state_dict(dict(snapshot.optimizer))
        torch.set_rng_state(snapshot.random)
        self.seen = Window(**snapshot.window)
        self.saved = snapshot.step
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

    def _steps(self) -> Iterator[list[Batch]]:
        for step in range(self.start, self.total):
            yield self._micro_batches(step)

    def go(self, clock: Callable[[], float]) -> Trained:
        """Run all remaining steps, save, and export the student."""
        self.clock, self.saved_at = clock, clock()
        main = self.accelerator.is_main_process
        if main and not self.quiet:
            say(f"loss: {self.distiller.describe(self.total - 1)}")
        metrics = Metrics(self.out, resumed_step=self.start) if main else None
        self.module.train()
        last: dict[str, float] = {}
        with Progress("train", self.total - self.start, of="steps", quiet=not main) as progress, self._stoppable():
            for step, batches in enumerate(prefetch(self._steps), start=self.start):
                terms, counts, norm = self._step(step, [b.to(self.accelerator.device) for b in batches])
                self.seen.add(terms, counts)
                if (step + 1) % self.settings.log_every == 0 or step + 1 == self.total:
                    last = self.seen.means()
                    if main and (idle := self.seen.idle()):
                        warn(f"step {step + 1}: nothing qualified for {', '.join(idle)} since the last logged step")
                    if metrics is not None:
                        lr = float(self.optimizer.param_groups[0]["lr"])
                        metrics.write(step=step + 1, grad_norm=norm, lr=lr, **last, **self.seen.totals())
                    self.seen = Window()
                stop = self._stop()
                if main and (stop or self._is_due(step + 1)):
                    self._save(step + 1)
                if stop:
                    break
                progress.reach(step + 1 - self.start, f"loss {last['loss']:.4f}" if last else "")
        if main:
            if self.settings.save_every and self.saved != self.total:
                self._save(self.total)
            with tell_kept(self._kept), self._kept_on_a_full_disk():
                self._export()
        weights = self.fingerprint["weights"]
        return Trained(out=self.out, steps=self.total, resumed_at=self.start, terms=last, weights=weights)

    def _export(self) -> None:
        student, tokenizer = self.distiller.student, self.ready.tokenizer
        ends = find_turn_ends(student, tokenizer, find_learnt_ends(self.ready.cache.rows_of_student(LOOKED_AT)))
        export_student(self.out, student, tokenizer, self.fingerprint, ends=ends)
        if not self.settings.save_every:
            drop_checkpoints(self.out)

    @contextmanager
    def _stoppable(self) -> Iterator[None]:
        """Steps inside are ended whole by Ctrl-C and SIGTERM, which come out at the end."""
        with tell_kept(self._kept), signals_noted() as noted:
            self.noted = noted
            yield

    @contextmanager
    def _kept_on_a_full_disk(self) -> Iterator[None]:
        """What is kept of this run, where the disk fails inside."""
        try:
            yield
        except DiskFailed as error:
            raise DiskFailed(error.what, kept=self._kept(), fix=error.fix) from error

    def _stop(self) -> bool:
        """Whether a signal came to any of the processes: all of them end at the same step."""
        if self.accelerator.num_processes == 1:
            return self.noted()
        flag = torch.tensor(float(self.noted()), device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, reduction="sum") > 0)

    def _is_due(self, step: int) -> bool:
        """Whether a checkpoint is to be written after so many steps."""
        if self.settings.save_every:
            return step % self.settings.save_every == 0
        return step < self.total and self.clock() - self.saved_at >= SAVE_SECONDS

    def _kept(self) -> str:
        if self.saved:
            return f"the checkpoint of step {self.saved} of {self.total} in {self.out}"
        return f"nothing of this run: no step of {self.total} was finished and saved"

    def _step(self, step: int, batches: list[Batch]) -> tuple[dict[str, float], dict[str, float], float]:
        """One optimizer step; means of the terms, their counts, and the gradient's norm before clipping."""
        factor = learning_rate(step, self.total, self.settings)
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * factor
        denominators = self._denominators(batches)
        parts: dict[str, Tensor] = {}
        for number, batch in enumerate(batches):
            share, terms = self._backward(batch, denominators, step, last=number + 1 == len(batches))
            for name, value in {"loss": share, **terms}.items():
                parts[name] = parts[name] + value if name in parts else value
        means = self.accelerator.reduce(parts, reduction="sum")
        norm = float(self.accelerator.clip_grad_norm_(self.module.parameters(), self.settings.max_grad_norm))
        values = {name: float(value) for name, value in means.items()}
        self._refuse_non_finite(step, values, norm, batches)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return values, {name: float(n) for name, n in denominators.items()}, norm

    def _denominators(self, batches: list[Batch]) -> dict[str, Tensor]:
        counts: dict[str, Tensor] = {}
        for batch in batches:
            for name, count in self.distiller.counts(batch).items():
                count = count.detach().double()
                counts[name] = counts[name] + count if name in counts else count
        reduced: dict[str, Tensor] = self.accelerator.reduce(counts, reduction="sum")
        return reduced

    def _backward(
        self, batch: Batch, denominators: dict[str, Tensor], step: int, *, last: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Gradient of one micro-batch. Wrappers average over processes, hence the factor."""
        with nullcontext() if last else self.accelerator.no_sync(self.module):
            loss, terms = self.module(batch, denominators, step)
            self.accelerator.backward(loss * self.accelerator.num_processes)
        return loss.detach().float(), terms

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
        )
        with self._kept_on_a_full_disk():
            save(self.out, snapshot)
        self.saved, self.saved_at = step, self.clock()


def describe(trained: Trained) -> None:
    """Say how a run ended."""
    if trained.resumed_at == trained.steps:
        say(f"{trained.out}: already trained for {trained.steps} steps with these settings, nothing to do")
        return
    resumed = f" (resumed at step {trained.resumed_at})" if trained.resumed_at else ""
    terms = ", ".join(f"{name} {value:.4f}" for name, value in sorted(trained.terms.items()))
    say(f"{trained.out}: trained for {trained.steps} steps{resumed}; {terms}")

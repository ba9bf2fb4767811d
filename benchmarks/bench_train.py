"""A training step as the loop does it, against a bare transformers loop, a live teacher, and transformers' Trainer.

One batch of the cache again and again, so that all read, compute and update the same.
"""

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler
from transformers import TrainerCallback, TrainingArguments

from benchmarks.bench_step import ALL, Step
from benchmarks.measure import Options, Result, cost, interleaved, ratio
from benchmarks.pair import Pair, fast_dtype, pair_of, wanted_signals
from xkd_pipeline.capture.capture import TeacherSettings, capture
from xkd_pipeline.capture.stage import read_rows
from xkd_pipeline.tables.shard import DocumentRows, encoder_for
from xkd_schemas.cache.table import Table
from xkd_trainer.bridge import CacheDataset, DistillTrainer
from xkd_trainer.data.sampler import prefetch
from xkd_trainer.models.architecture import num_layers
from xkd_trainer.models.compute_dtype import dtype_named
from xkd_trainer.models.loading import load_model, load_tokenizer

STUDENT = "new:llama,layers=5,width=320"
"""10 million parameters under the demo's tokenizer."""


def run(options: Options) -> list[Result]:
    """All rows; the demo's teacher has 135 million parameters."""
    pair = pair_of(options)
    pair = pair if options.quick else replace(pair, student=STUDENT)
    documents, repeats = options.size(8, 4), min(options.repeats, 4)
    full, plain = (Step(pair, loss, documents) for loss in (ALL, "ce=1"))
    live = _LiveTeacher(pair, full)
    calls = {"full": full, "plain": _with_reading(plain), "bare": _Bare(Step(pair, "ce=1", documents)), "live": live}
    seconds = interleaved(calls, repeats)
    waited, total = _waiting(full, options.size(12, 6))
    ours, theirs = _trainer_step(pair, documents, options), _least(_with_reading(full))
    online = 1e3 * (seconds["live"] + seconds["full"])
    return [
        cost("waiting for data / training step with ce+mta+sra+dwa, on the clock", waited, total, bar=0.02),
        cost("step with ce alone, with reading / bare transformers loop", seconds["plain"], seconds["bare"], bar=1.1),
        ratio("live teacher and the same step / step from the cache", online, 1e3 * seconds["full"], "ms",
              bar=2.5, at_least=True),
        cost("step of DistillTrainer / of xkd-train, both with reading", ours, theirs, bar=1.15),
    ]  # fmt: skip


def _with_reading(step: Step) -> Any:
    def call() -> None:
        step.batch = step.read()
        step()

    return call


def _least(call: Any, times: int = 4) -> float:
    return interleaved({"": call}, times)[""]


class _Bare:
    """Cross-entropy as transformers' own forward gives it, on the same padded batch, with the same optimizer."""

    def __init__(self, step: Step) -> None:
        self.model: Any = step.ready.distiller.student
        batch, self.optimizer = step.batch, step._optimizer
        labels_BS = torch.full_like(batch.student_ids_BS, -100)
        for row, valid_N in enumerate(batch.predict_valid_BN):
            labels_BS[row, batch.predict_BN[row, valid_N] + 1] = batch.target_BN[row, valid_N]
        self.inputs: dict[str, Tensor] = {
            "input_ids": batch.student_ids_BS, "attention_mask": batch.student_valid_BS.long(), "labels": labels_BS,
        }  # fmt: skip

    def __call__(self) -> float:
        """Forward, backward, update; the loss."""
        loss = self.model(**self.inputs, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())


class _LiveTeacher:
    """What a step without a cache does before it: the teacher on the batch, and its signals, spans known before."""

    def __init__(self, pair: Pair, step: Step) -> None:
        self.settings = TeacherSettings(model=pair.teacher, dtype=fast_dtype(), template=pair.template)
        self.model = load_model(pair.teacher, dtype=dtype_named(self.settings.dtype))
        documents = Table(pair.cache, "documents")
        rows = DocumentRows.of([documents[i] for i in step.rows])
        _, self.readings = read_rows(rows, encoder_for(pair.teacher, self.settings))
        self.wanted = wanted_signals(num_layers(self.model))

    def __call__(self) -> None:
        """One forward pass of the teacher with everything of it measured, nothing written."""
        capture(self.model, self.readings, self.wanted, self.settings)


def _waiting(step: Step, steps: int) -> tuple[float, float]:
    """Seconds on the clock that so many steps waited for their batches, and that they took, as the loop reads them."""
    waited = 0.0
    made, start = prefetch(step.read() for _ in range(steps)), time.perf_counter()
    while True:
        asked = time.perf_counter()
        if (batch := next(made, None)) is None:
            return waited, asked - start
        waited += time.perf_counter() - asked
        step.batch = batch
        step()


class _SameRows(Sampler[int]):
    def __init__(self, documents: int, steps: int) -> None:
        self.indices = [*range(documents)] * steps

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)

    def __len__(self) -> int:
        return len(self.indices)


class _Clock(TrainerCallback):  # type: ignore[misc]
    def __init__(self) -> None:
        self.ends = [time.process_time()]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.ends.append(time.process_time())


def _trainer_step(pair: Pair, documents: int, options: Options) -> float:
    """CPU time of the fastest step of DistillTrainer from end to end, its batch read between them."""
    steps = options.size(6, 3)
    student = Step(pair, "ce=1", documents).ready.distiller.student
    args = TrainingArguments(
        str(options.scratch / "trainer"), per_device_train_batch_size=documents, max_steps=steps, report_to="none",
        save_strategy="no", logging_strategy="no", disable_tqdm=True, use_cpu=True, optim="adamw_torch",
    )  # fmt: skip
    dataset, clock = CacheDataset(pair.cache, load_tokenizer(pair.tokenizer), ALL), _Clock()
    trainer = DistillTrainer(student, args, cache=dataset, callbacks=[clock])
    trainer.order = _SameRows(documents, steps)  # type: ignore[assignment]
    trainer.train()
    return min(after - before for before, after in zip(clock.ends[1:], clock.ends[2:], strict=False))

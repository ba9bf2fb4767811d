"""A training step with all three methods, against the step with cross-entropy alone and what nobody can leave out.

What nobody can leave out are three products with a full head: the projected teacher read with the student's head and
the projected student with the teacher's, both there and back, and the teacher's own logits. And tokens per second of a
student that reads several documents in one row, against one row for each document.

Shape legend for this file
    P predictions    C predictions of a chunk    V classes    D width
"""

import functools
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.measure import Options, Result, cost, interleaved, ratio
from benchmarks.pair import Pair, Shape, pair_of
from xkd_trainer.data.batch import Batch
from xkd_trainer.data.collate import batch_of
from xkd_trainer.losses.declaration import constant_head
from xkd_trainer.losses.ops.lazy_logits import CHUNK_BYTES, WIDER
from xkd_trainer.losses.ops.shared_pass import PASS_BYTES
from xkd_trainer.training.prepare import Ready, set_up

ALL = "mta+sra+dwa"
CHUNKS = (WIDER * CHUNK_BYTES, PASS_BYTES)
"""Sizes of a chunk of logits that the losses use; the unavoidable products are made in the faster one."""
LATE = 1_000_000
"""An optimizer step behind every warm-up: all terms are on."""
LARGE = Shape(
    documents=8, characters=400, teacher_layers=4, teacher_width=512, student_layers=4, student_width=256,
    teacher_classes=151_936, student_classes=151_936,
)  # fmt: skip


def run(options: Options) -> list[Result]:
    """On the demo pair, and on one with two heads of 152,000 classes."""
    pair = pair_of(options)
    small = _measured("demo pair" if options.demo else "pair of the demo's shape", pair, options)
    large_options = Options(quick=options.quick, demo=None, scratch=options.scratch / "large", repeats=2)
    large = _measured("V=152k, random models", pair_of(large_options, LARGE), large_options)
    return [*small, *large, _packed(pair, options)]


class Step:
    """One optimizer step of a run on one batch of its cache, as the loop does it, repeated on demand."""

    def __init__(self, pair: Pair, loss: str, documents: int, **train: object) -> None:
        torch.set_num_threads(1)
        run = pair.run_file(loss, out=Path("unused"))
        self.ready: Ready = set_up(run.model_copy(update={"train": run.train.model_copy(update=train)}), "")
        self.rows = self.ready.cache.usable[:documents].tolist()
        self.batch: Batch = self.read()
        self._optimizer = torch.optim.AdamW(
            self.ready.distiller.parameter_groups(lr=1e-5, weight_decay=0.0)  # type: ignore[arg-type]
        )

    def read(self) -> Batch:
        """The batch out of the cache, which the loop does in a thread."""
        return batch_of(self.ready.cache, self.rows, self.ready.wanted)

    def __call__(self) -> float:
        """Forward, backward, update; the loss."""
        distiller = self.ready.distiller
        loss, _ = distiller(self.batch, {n: c.double() for n, c in distiller.counts(self.batch).items()}, LATE)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(distiller.parameters(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())


def unavoidable(step: Step, chunk_bytes: int) -> Callable[[], None]:
    """The three extra products of a step on random states, in chunks whose logits take that much, in memory kept."""
    student_VD = step.ready.distiller.student.get_output_embeddings().weight.detach()
    teacher_VD = constant_head(step.ready.cache.head(), "benchmark").weight_VD
    students, teachers = int(step.batch.predict_valid_BN.sum()), int(step.batch.teacher_predict_valid_BM.sum())
    sides = [(torch.randn(n, w.shape[1]), w) for n, w in ((students, student_VD), (teachers, teacher_VD))]
    kept = [torch.empty(rows_at_once(*side, chunk_bytes), len(side[1])) for side in sides]

    def products() -> None:
        there_and_back(*sides[0], kept[0])
        there_and_back(*sides[1], kept[1])
        there_and_back(*sides[1], kept[1], back=False)

    return products


def rows_at_once(hidden_PD: Tensor, weight_VD: Tensor, chunk_bytes: int) -> int:
    """Positions of a chunk of logits."""
    return min(len(hidden_PD), max(1, chunk_bytes // (4 * len(weight_VD))))


@torch.no_grad()
def there_and_back(hidden_PD: Tensor, weight_VD: Tensor, logits_CV: Tensor, *, back: bool = True) -> None:
    """Logits, and from numbers of their shape the gradient of the states."""
    for chunk_PD in hidden_PD.split(len(logits_CV)):
        torch.mm(chunk_PD, weight_VD.T, out=logits_CV[: len(chunk_PD)])
        if back:
            logits_CV[: len(chunk_PD)] @ weight_VD


def _measured(name: str, pair: Pair, options: Options) -> list[Result]:
    documents = options.size(8, 4)
    full, plain = (Step(pair, loss, documents) for loss in (ALL, "ce=1"))
    calls: dict[str, Callable[[], object]] = {"full": full, "plain": plain, "read": full.read}
    calls |= {f"products {size}": unavoidable(full, size) for size in CHUNKS}
    seconds = interleaved(calls, min(options.repeats, 4))
    wall = interleaved({str(n): functools.partial(_with_threads, full, n) for n in (1, 2)}, 3, clock=time.perf_counter)
    base = seconds["plain"] + min(seconds[f"products {size}"] for size in CHUNKS)
    return [
        cost(f"{name}: step with ce+mta+sra+dwa / with ce alone", seconds["full"], seconds["plain"]),
        cost(f"{name}: the same / ce alone and three head products", seconds["full"], base, bar=1.4),
        cost(f"{name}: reading its batch in the thread / step with ce alone", seconds["read"], seconds["plain"]),
        cost(f"{name}: the full step with two threads / with one, on the clock", wall["2"], wall["1"]),
    ]


def _packed(pair: Pair, options: Options) -> Result:
    """Cross-entropy alone, packed against padded, on the same documents: forward, backward and update."""
    documents = options.size(16, 4)
    steps = {packing: Step(pair, "ce", documents, packing=packing) for packing in (True, False)}
    times = interleaved({str(packing): step for packing, step in steps.items()}, options.repeats)
    tokens = int(steps[False].batch.student_valid_BS.sum())
    padded = steps[False].batch.student_valid_BS.numel()
    what = f"CE step packed / padded, {documents} documents of {tokens} tokens, {padded} with padding"
    return ratio(what, tokens / times["True"], tokens / times["False"], "tokens/s", at_least=True)


def _with_threads(step: Step, threads: int) -> None:
    torch.set_num_threads(threads)
    step()
    torch.set_num_threads(1)

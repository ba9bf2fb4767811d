"""KL over 152,000 classes in both spaces of DWA-KD: memory beyond the inputs and CPU time, against plain torch.

Every form runs in a process of its own.

Shape legend for this file
    T tokens    V classes    D width
"""

import contextlib
import functools
import time
from collections.abc import Callable
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import Options, Result, cost, forget_peak, in_subprocess, interleaved, memory, peak_bytes
from xkd_trainer.losses.ops import softmax_rows as head_rows
from xkd_trainer.losses.ops.divergence import Comparison
from xkd_trainer.losses.ops.lazy_logits import LazyLogits
from xkd_trainer.losses.ops.shared_pass import head_divergence
from xkd_trainer.models import measures

SPACES = ("student", "teacher")
FORMS = ("plain", "ours")
TEMPERATURE = 2.0


def run(options: Options) -> list[Result]:
    """T=512, V=151,936, D=256: states and head of the student learn, then states alone under the teacher's head."""
    size = (options.size(512, 64), options.size(151_936, 4_096), options.size(256, 32))
    results: list[Result] = []
    for space in SPACES:
        best = {form: {"cpu": float("inf"), "peak": float("inf")} for form in FORMS}
        for _ in range(1 if options.quick else 3):
            for form in FORMS:
                found = in_subprocess(measured, space, form, *size)
                best[form] = {key: min(best[form][key], found[key]) for key in best[form]}
        ours, plain = best["ours"], best["plain"]
        what = f"{space} space, T={size[0]} V={size[1]}"
        results.append(memory(f"{what}: memory beyond the inputs / plain", ours["peak"], plain["peak"], bar=1 / 8))
        results.append(cost(f"{what}: CPU time / plain", ours["cpu"], plain["cpu"], bar=1.25))
    return [*results, *rows_of_logits(options)]


def rows_of_logits(options: Options) -> list[Result]:
    """What is done to logits between the products: compiled kernels against the same functions in torch's steps."""
    rows, classes = options.size(40, 4), options.size(151_936, 4_096)
    seconds = interleaved(row_calls(rows, classes), options.repeats)
    return [
        cost(f"{rows} rows of {classes} logits, {name}: compiled / torch", seconds[name], seconds[f"{name} torch"])
        for name in ("forward KL", "cross-entropy", "entropy")
    ]


def row_calls(rows: int, classes: int) -> dict[str, Callable[[], Tensor]]:
    """Name, and name with " torch" behind it, to a call that gives one number a row, in float32 on one thread."""
    generator = torch.Generator().manual_seed(0)
    student_PV, teacher_PV = (3.0 * torch.randn(rows, classes, generator=generator) for _ in range(2))
    target_P, one, weights_P1 = torch.arange(rows), torch.ones(()), torch.ones(rows, 1)
    into_PV, scratch = torch.empty_like(student_PV), head_rows.Scratch()
    how = Comparison(kind="forward_kl", temperature=TEMPERATURE)

    def each(work: Callable[[slice], Tensor], compiled: bool) -> Tensor:
        parts = head_rows.parts(student_PV) if compiled else head_rows.slices(0, rows, 1)
        with contextlib.ExitStack() as off:
            for module in () if compiled else (head_rows, measures):
                off.enter_context(mock.patch.object(module, "has_cpu_kernels", return_value=False))
            return torch.cat([work(part) for part in parts])

    works: dict[str, Callable[[slice], Tensor]] = {
        "forward KL": lambda p: head_rows.divergence_rows(
            student_PV[p], teacher_PV[p], weights_P1[p], how, scratch, into_PV[p]
        ),
        "cross-entropy": lambda p: head_rows.cross_entropy_rows(into_PV[p].copy_(student_PV[p]), target_P[p], one),
        "entropy": lambda p: measures.prediction_stats(student_PV[p])[0],
    }
    compiled = {name: functools.partial(each, work, compiled=True) for name, work in works.items()}
    return compiled | {f"{name} torch": functools.partial(each, work, compiled=False) for name, work in works.items()}


def inputs(space: str, size: tuple[int, int, int]) -> tuple[LazyLogits, LazyLogits]:
    """Student and teacher side of one space. In the student space both read with the student's head."""
    tokens, classes, width = size
    generator = torch.Generator().manual_seed(0)
    head_VD = torch.randn(classes, width, generator=generator) * 0.05
    hidden_TD, constant_TD = (torch.randn(tokens, width, generator=generator) for _ in range(2))
    head_VD.requires_grad_(space == "student")
    student = LazyLogits(hidden=hidden_TD.requires_grad_(), weight=head_VD)
    return student, LazyLogits(hidden=constant_TD, weight=head_VD.detach())


def loss_of(form: str, student: LazyLogits, teacher: LazyLogits) -> Tensor:
    """Sum over tokens of KL(teacher || student) at the temperature."""
    if form == "ours":
        return head_divergence(student, teacher, None, Comparison(kind="forward_kl", temperature=TEMPERATURE))
    log_p_TV = (teacher.dense() / TEMPERATURE).log_softmax(-1)
    return F.kl_div((student.dense() / TEMPERATURE).log_softmax(-1), log_p_TV, log_target=True, reduction="sum")


def measured(space: str, form: str, tokens: str, classes: str, width: str) -> dict[str, float]:
    """CPU time and memory of one form."""
    torch.set_num_threads(1)
    warm = inputs(space, (2, 8, 4))
    loss_of(form, *warm).backward()
    student, teacher = inputs(space, (int(tokens), int(classes), int(width)))
    before, start = forget_peak(), time.process_time()
    loss_of(form, student, teacher).backward()
    return {"cpu": time.process_time() - start, "peak": peak_bytes() - before}
